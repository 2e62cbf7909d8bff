"""Reads adapters into host memory and copies them to slots on the device, in threads of its own."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from llm.checkpoint.adapter_digest import ADAPTER_FILES, adapter_digest
from llm.checkpoint.adapter_slots import AdapterPacker
from llm.checkpoint.hub import fetch_origin
from llm.config import EngineConfig
from llm.errors import AdapterChangedError, ConfigError
from llm.models.adapters import AdapterMemory
from llm.schemas import AdapterRef

MOST_READINGS = 2
"""Adapters that are read at once."""
_MOST_PLACES = 4096


class AdapterCopies:
    """Places in host memory, each as large as a slot, and the threads that fill them and copy them.

    Host memory is pinned where the device is a GPU, and allocated at once: pinning later would stop the device.

    Args:
        packer: reads adapters.
        memory: the slots.
        num_places: adapters that host memory holds.
    """

    def __init__(self, packer: AdapterPacker, memory: AdapterMemory, num_places: int) -> None:
        self.num_places = num_places
        self._memory = memory
        self._packer = packer
        slots = memory.slots
        self._device = slots.device
        is_cuda = self._device.type == "cuda"
        self._places = torch.empty(num_places, slots.shape[1], dtype=slots.dtype, pin_memory=is_cuda)
        self._stream = torch.cuda.Stream(self._device) if is_cuda else None  # type: ignore[no-untyped-call]
        # A copy takes milliseconds and does not wait for files that are being read, nor one file for a download.
        self._reader, self._mover = (
            ThreadPoolExecutor(num, thread_name_prefix="adapters") for num in (MOST_READINGS, 1)
        )

    def read(self, adapter: AdapterRef, place: int) -> Future[int]:
        """Read an adapter into a place that nobody uses; gives its rank.

        What goes wrong is raised by the result: `AdapterChangedError`, or as `AdapterPacker.read`.
        """
        return self._reader.submit(self._read, adapter, place)

    def move(self, place: int, slot: int, rank: int) -> Future[None]:
        """Copy a place, with an adapter of this rank, to a slot that no later step uses before this is done."""
        if self._stream is None:
            return self._mover.submit(self._copy, place, slot, rank)
        launched = torch.cuda.Event()  # type: ignore[no-untyped-call]
        launched.record(torch.cuda.current_stream(self._device))
        return self._mover.submit(self._copy_after, place, slot, rank, launched)

    def close(self) -> None:
        """End the threads; what they are doing is finished first."""
        self._reader.shutdown(wait=False, cancel_futures=True)
        self._mover.shutdown(wait=False, cancel_futures=True)

    def _read(self, adapter: AdapterRef, place: int) -> int:
        directory = _directory_of(adapter)
        rank = self._packer.read(directory, self._places[place])
        # Compared behind the reading: whatever files were read, they are those of this digest, or it shows now.
        if adapter_digest(directory) != adapter.digest:
            raise AdapterChangedError(
                f"the files of the adapter {adapter.name!r} in {directory} have changed since the request chose it; "
                "load the adapter again"
            )
        return rank

    @torch.inference_mode()
    def _copy(self, place: int, slot: int, rank: int) -> None:
        self._memory.slots[slot].copy_(self._places[place])
        self._memory.ranks[slot] = rank

    @torch.inference_mode()
    def _copy_after(self, place: int, slot: int, rank: int, launched: torch.cuda.Event) -> None:
        """Copy beside the steps in progress, of which the last that read the slot are over first."""
        assert self._stream is not None, "on a GPU"
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(launched)
            self._memory.slots[slot].copy_(self._places[place], non_blocking=True)
            copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            copied.record(self._stream)
        copied.synchronize()
        self._memory.ranks[slot] = rank


def _directory_of(adapter: AdapterRef) -> Path:
    """Where its files are on this machine; they are downloaded if another machine has got them from the Hub."""
    directory = Path(adapter.path)
    if adapter.origin is None or all((directory / name).is_file() for name in ADAPTER_FILES):
        return directory
    return fetch_origin(adapter.origin, ADAPTER_FILES)


def num_host_places(memory: AdapterMemory, config: EngineConfig) -> int:
    """How many adapters each rank of an engine has host memory for, of which all ranks have an equal share.

    Raises:
        ConfigError: not even one does.
    """
    bytes_each = config.tensor_parallel_size * memory.slots.shape[1] * memory.slots.itemsize
    num_places = int(config.adapter_host_gib * (1 << 30)) // bytes_each
    if not num_places:
        raise ConfigError(
            f"adapter_host_gib: one adapter takes {bytes_each} bytes; raise it, or lower max_adapter_rank"
            + (", or leave out adapter_experts" if config.adapter_experts else "")
        )
    return min(num_places, _MOST_PLACES)
