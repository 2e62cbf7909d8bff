"""Where a replica runs, and what it uses of its node: GPUs and their memory, or cores and memory of the process."""

import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from deployments.channel.messages import Gpu, Machine
from deployments.replica.nvml import Nvml, find_nvml

_INTERVAL_S = 1.0
_STATM = Path("/proc/self/statm")


class MachineWatch:
    """Measures once a second what the replica's process uses, on its own thread, as the driver may answer slowly.

    Args:
        devices: indices of the replica's GPUs as torch counts them; none where it runs on a CPU.
        num_cores: cores that the process may use.
    """

    def __init__(self, devices: Sequence[int], num_cores: int) -> None:
        self._gpus = [_GpuProbe(device) for device in devices]
        self._nvml = find_nvml() if devices else None
        self._num_cores = num_cores
        self._node = socket.gethostname()
        self._cpu_s, self._looked_at = _cpu_seconds(), time.monotonic()
        self._is_closing = threading.Event()
        self.latest = self._look()
        self._thread = threading.Thread(target=self._run, name="machine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop looking."""
        self._is_closing.set()

    def _run(self) -> None:
        while not self._is_closing.wait(_INTERVAL_S):
            self.latest = self._look()

    def _look(self) -> Machine:
        cpu_s, now = _cpu_seconds(), time.monotonic()
        elapsed_s = now - self._looked_at
        busy_cores = (cpu_s - self._cpu_s) / elapsed_s if elapsed_s > 0 else 0.0
        self._cpu_s, self._looked_at = cpu_s, now
        return Machine(
            node=self._node,
            pid=os.getpid(),
            memory_bytes=_process_memory(),
            num_cores=self._num_cores,
            busy_cores=round(busy_cores, 2),
            gpus=[gpu.look(self._nvml) for gpu in self._gpus],
        )


class _GpuProbe:
    """One GPU of the replica.

    Args:
        device: its index, as torch counts.
    """

    def __init__(self, device: int) -> None:
        import torch

        properties = torch.cuda.get_device_properties(device)
        self._device = device
        self._name = properties.name
        self._total_bytes = properties.total_memory
        self._uuid = f"GPU-{properties.uuid}"

    def look(self, nvml: Nvml | None) -> Gpu:
        """How much of the GPU is in use; without NVML, only this process's use."""
        import torch

        # Torch's own count, which asks neither the device nor the driver.
        used_bytes, total_bytes = torch.cuda.memory_reserved(self._device), self._total_bytes
        memory = nvml.memory(self._uuid) if nvml is not None else None
        if memory is not None:
            used_bytes, total_bytes = memory
        busy_percent = nvml.busy_percent(self._uuid) if nvml is not None else None
        return Gpu(self._device, self._name, used_bytes, total_bytes, busy_percent)


def gpu_indices(device: str, num_gpus: int = 1) -> list[int]:
    """The GPUs of a replica.

    Args:
        device: torch's name of the first; any other device has none.
        num_gpus: number of GPUs that hold the model together.
    """
    kind, _, index = device.partition(":")
    return [int(index or 0) + place for place in range(num_gpus)] if kind == "cuda" else []


def _cpu_seconds() -> float:
    """CPU time of this process, all threads together."""
    times = os.times()
    return times.user + times.system


def _process_memory() -> int:
    """Bytes of this process's resident memory; where the system does not tell, the highest so far."""
    try:
        return int(_STATM.read_text().split()[1]) * resource.getpagesize()
    except OSError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
