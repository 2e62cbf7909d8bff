"""GPU figures from NVIDIA's driver, through NVML: https://docs.nvidia.com/deploy/nvml-api.

The library comes with the driver, so nothing has to be installed. It is used instead of the CUDA runtime, which other
threads must not call while the engine captures a graph.
"""

import ctypes
from contextlib import suppress
from typing import Any

_LIBRARY = "libnvidia-ml.so.1"


class _Memory(ctypes.Structure):
    """`nvmlMemory_t`, in bytes."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class _Utilization(ctypes.Structure):
    """`nvmlUtilization_t`: percent of the last sampling period, a second at most."""

    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class Nvml:
    """The driver's view of all GPUs of the node.

    Args:
        library: the loaded library.

    Raises:
        OSError: it cannot be used.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        if library.nvmlInit_v2() != 0:
            raise OSError("NVML cannot be initialized")

    def memory(self, uuid: str) -> tuple[int, int] | None:
        """Bytes in use on a GPU, by any process, and total bytes; None if the driver does not tell."""
        memory = _Memory()
        is_told = self._ask("nvmlDeviceGetMemoryInfo", uuid, memory)
        return (memory.used, memory.total) if is_told else None

    def busy_percent(self, uuid: str) -> int | None:
        """Percentage of time in which a GPU ran any kernel; None if the driver does not tell."""
        utilization = _Utilization()
        is_told = self._ask("nvmlDeviceGetUtilizationRates", uuid, utilization)
        return int(utilization.gpu) if is_told else None

    def _ask(self, function: str, uuid: str, answer: ctypes.Structure) -> bool:
        """Have the driver fill in `answer`; returns whether it did."""
        handle = ctypes.c_void_p()
        if self._library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)) != 0:
            return False
        return bool(getattr(self._library, function)(handle, ctypes.byref(answer)) == 0)


def find_nvml() -> Nvml | None:
    """The driver's library; None on a machine that has none."""
    with suppress(OSError):
        return Nvml(ctypes.CDLL(_LIBRARY))
    return None
