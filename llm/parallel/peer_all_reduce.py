"""Sums over a node's GPUs through each other's memory, faster than a library's for small messages.

Memory is shared between processes by the CUDA driver ("Interprocess Communication" in the CUDA C++ programming guide),
without NVLink multicast.
"""

import ctypes
from dataclasses import dataclass

import torch

from llm.core.partition import Exchange, Partition
from llm.kernels.all_reduce import WORDS_PER_PROGRAM, all_reduce

_MAX_BYTES_SENT = 4 << 20
"""Most bytes that a rank sends to all others in total, in the largest message: beyond that NCCL is faster."""
_HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1


@dataclass(frozen=True, slots=True)
class PeerMemory:
    """Memory through which the ranks of a model exchange data.

    Attributes:
        inboxes: (ranks,) int64, the address of each rank's inbox, as this process sees it.
        inbox: (2, ranks, words) int64, this rank's inbox, which the others write to; zeros at the start.
    """

    inboxes: torch.Tensor
    inbox: torch.Tensor

    @staticmethod
    def on_gpus(
        exchange: Exchange, partition: Partition, device: torch.device, max_bytes: int | None = None
    ) -> "PeerMemory":
        """Allocate memory on `device` that the other ranks' GPUs can write to, for as long as this process lives.

        All ranks must call this together.

        Args:
            max_bytes: size of the longest message; None for the largest for which this way is faster than NCCL's.

        Raises:
            RuntimeError: the GPUs have no access to each other's memory.
        """
        num_bytes = _MAX_BYTES_SENT // (partition.size - 1) if max_bytes is None else max_bytes
        num_words = -(-num_bytes // (4 * WORDS_PER_PROGRAM)) * WORDS_PER_PROGRAM
        inbox = torch.zeros(2, partition.size, num_words, dtype=torch.int64, device=device)
        with torch.cuda.device(device):
            torch.cuda.synchronize()
            exported = torch.tensor(list(_export(inbox)), dtype=torch.uint8, device=device)
            addresses = [
                inbox.data_ptr() if rank == partition.rank else _open(bytes(other))
                for rank, other in enumerate(exchange.all_gather(exported).tolist())
            ]
        return PeerMemory(torch.tensor(addresses, dtype=torch.int64, device=device), inbox)


class PeerAllReduce:
    """Sums tensors over all ranks, with the same bits on every rank. The sums may be captured in CUDA graphs.

    All ranks must request the same sums, of the same sizes, in the same order.

    Args:
        deterministic: take messages of any size, large ones in pieces, so that a number's sum depends neither on the
            size of its message nor on its place there.
    """

    def __init__(self, memory: PeerMemory, partition: Partition, *, deterministic: bool = False) -> None:
        self._memory = memory
        self._rank = partition.rank
        capacity = memory.inbox.shape[2]
        self._max_piece = 4 * capacity
        self._takes_all = deterministic
        self._calls = torch.zeros(capacity // WORDS_PER_PROGRAM, dtype=torch.int32, device=memory.inbox.device)

    @property
    def max_bytes(self) -> int:
        """Size of the largest tensor that it takes."""
        return 1 << 62 if self._takes_all else self._max_piece

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Overwrite `tensor` with the sum of all ranks' tensors and return it: contiguous, whole words of 4 bytes."""
        assert tensor.nbytes <= self.max_bytes, "a message that fits"
        for piece in self._pieces(tensor):
            self._sum(piece, piece)
        return tensor

    def add_all_reduce(self, tensor: torch.Tensor, total: torch.Tensor) -> None:
        """Add the sum of all ranks' tensors to `total`, of the same shape and format, contiguous."""
        assert tensor.nbytes <= self.max_bytes, "a message that fits"
        for piece, into in zip(self._pieces(tensor), self._pieces(total), strict=True):
            self._sum(piece, into, adds=True)

    def _pieces(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.split(tensor.view(-1), self._max_piece // tensor.element_size())

    def _sum(self, x: torch.Tensor, output: torch.Tensor, *, adds: bool = False) -> None:
        memory = self._memory
        all_reduce(x, output, memory.inboxes, memory.inbox, self._calls, rank=self._rank, adds=adds)


class _Handle(ctypes.Structure):
    """CUipcMemHandle."""

    _fields_ = (("reserved", ctypes.c_char * _HANDLE_BYTES),)


def _export(memory: torch.Tensor) -> bytes:
    """What another process needs to `_open` the memory: the handle of its allocation, and its offset there."""
    driver, handle = ctypes.CDLL("libcuda.so.1"), _Handle()
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    address = ctypes.c_uint64(memory.data_ptr())
    _check(driver, driver.cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), address))
    _check(driver, driver.cuIpcGetMemHandle(ctypes.byref(handle), base))
    return ctypes.string_at(ctypes.byref(handle), _HANDLE_BYTES) + (address.value - base.value).to_bytes(8, "little")


def _open(exported: bytes) -> int:
    """Address of another process's memory, for kernels on the current device."""
    driver, base = ctypes.CDLL("libcuda.so.1"), ctypes.c_uint64()
    handle = _Handle.from_buffer_copy(exported[:_HANDLE_BYTES])
    _check(driver, driver.cuIpcOpenMemHandle_v2(ctypes.byref(base), handle, ctypes.c_uint(_LAZY_PEER_ACCESS)))
    return base.value + int.from_bytes(exported[_HANDLE_BYTES:], "little")


def _check(driver: ctypes.CDLL, status: int) -> None:
    if status != 0:
        name = ctypes.c_char_p()
        driver.cuGetErrorName(status, ctypes.byref(name))
        reason = (name.value or b"").decode() or f"error {status}"
        raise RuntimeError(f"the GPUs of a model could not share memory ({reason})")
