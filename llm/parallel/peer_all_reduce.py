"""Sums over a node's GPUs through each other's memory.

Memory is shared between processes by the CUDA driver ("Interprocess Communication" in the CUDA C++ programming guide),
without NVLink multicast.
"""

import ctypes
from dataclasses import dataclass

import torch

from llm.core.partition import Exchange, Partition
from llm.kernels.all_reduce import WORDS_PER_PROGRAM, all_reduce
from llm.kernels.chunked_all_reduce import Chunking, chunked_all_reduce, chunked_gather

_MAX_SMALL_BYTES_SENT = 2 << 20
"""Most bytes that a rank sends to all others in total, in the largest message that travels with its counts."""
_HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1


@dataclass(frozen=True, slots=True)
class PeerMemory:
    """Memory through which the ranks of a model exchange data.

    Attributes:
        inboxes: (ranks,) int64, the address of each rank's inbox, as this process sees it.
        inbox: (words,) int64, this rank's inbox, which the others write to; zeros at the start.
    """

    inboxes: torch.Tensor
    inbox: torch.Tensor

    @staticmethod
    def on_gpus(exchange: Exchange, partition: Partition, device: torch.device, num_bytes: int) -> "PeerMemory":
        """Allocate memory on `device` that the other ranks' GPUs can write to, for as long as this process lives.

        All ranks must call this together.

        Args:
            num_bytes: of an inbox.

        Raises:
            RuntimeError: the GPUs have no access to each other's memory.
        """
        inbox = torch.zeros(-(-num_bytes // 8), dtype=torch.int64, device=device)
        with torch.cuda.device(device):
            torch.cuda.synchronize()
            exported = torch.tensor(list(_export(inbox)), dtype=torch.uint8, device=device)
            addresses = [
                inbox.data_ptr() if rank == partition.rank else _open(bytes(other))
                for rank, other in enumerate(exchange.all_gather(exported).tolist())
            ]
        return PeerMemory(torch.tensor(addresses, dtype=torch.int64, device=device), inbox)


class PeerAllReduce:
    """Sums tensors over all ranks, with the same bits on every rank: in the order of ranks, whatever their size.

    The sums may be captured in CUDA graphs. All ranks must request the same sums, of the same sizes, in the same order.

    Args:
        small: what messages travel through with their counts, those that fit; `small_inbox_bytes` or more.
        large: what larger ones travel through in chunks.
        chunking: how those are cut.
    """

    def __init__(self, partition: Partition, small: PeerMemory, large: PeerMemory, chunking: Chunking) -> None:
        self._rank = partition.rank
        self._inboxes = small.inboxes
        self._large = large  # with its inbox, which only the others' kernels and addresses lead to
        num_programs = small.inbox.numel() // (2 * partition.size * WORDS_PER_PROGRAM)
        self._inbox = small.inbox.view(2, partition.size, num_programs * WORDS_PER_PROGRAM)
        self.max_small_bytes = 4 * self._inbox.shape[2]
        self._chunking = chunking
        self._calls, self._turns = (
            torch.zeros(number, dtype=torch.int32, device=small.inbox.device)
            for number in (num_programs, chunking.num_programs)
        )

    @staticmethod
    def on_gpus(
        exchange: Exchange,
        partition: Partition,
        device: torch.device,
        *,
        max_small_bytes: int | None = None,
        chunking: Chunking | None = None,
    ) -> "PeerAllReduce":
        """Allocate the memory for it on `device`. All ranks must call this together.

        Args:
            max_small_bytes: size of the longest message that travels with its counts; None for the largest for which
                that is faster.
            chunking: how larger ones are cut; None for the fastest way.

        Raises:
            RuntimeError: the GPUs have no access to each other's memory.
        """
        chunking = chunking or Chunking(owns_parts=partition.size > 2)
        if max_small_bytes is None:
            max_small_bytes = _MAX_SMALL_BYTES_SENT // (partition.size - 1)
        sizes = small_inbox_bytes(max_small_bytes, partition.size), 4 * chunking.inbox_words(partition.size)
        small, large = (PeerMemory.on_gpus(exchange, partition, device, size) for size in sizes)
        return PeerAllReduce(partition, small, large, chunking)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Overwrite `tensor` with the sum of all ranks' tensors and return it: contiguous, whole words of 4 bytes."""
        self._sum(tensor, tensor)
        return tensor

    def add_all_reduce(self, tensor: torch.Tensor, total: torch.Tensor) -> None:
        """Add the sum of all ranks' tensors to `total`, of the same shape and format, contiguous."""
        self._sum(tensor, total, adds=True)

    def gather_columns(self, tensor: torch.Tensor) -> torch.Tensor:
        """All ranks' tensors (…, size), contiguous, beside each other on rank 0: (…, ranks size).

        Rows are of whole words of 4 bytes. What it holds on the other ranks is not defined.
        """
        *rows, size = tensor.shape
        gathered = tensor.new_empty(*rows, len(self._inboxes) * size)
        flat, into = tensor.view(-1, size), gathered.view(-1, gathered.shape[-1])
        chunked_gather(flat, into, self._large.inboxes, self._turns, self._chunking, rank=self._rank)
        return gathered

    def _sum(self, x: torch.Tensor, output: torch.Tensor, *, adds: bool = False) -> None:
        if x.nbytes <= self.max_small_bytes:
            all_reduce(x, output, self._inboxes, self._inbox, self._calls, rank=self._rank, adds=adds)
        else:
            chunked_all_reduce(x, output, self._large.inboxes, self._turns, self._chunking, rank=self._rank, adds=adds)


def small_inbox_bytes(max_bytes: int, num_ranks: int) -> int:
    """Bytes of an inbox for messages of up to `max_bytes` with their counts."""
    num_words = -(-max_bytes // (4 * WORDS_PER_PROGRAM)) * WORDS_PER_PROGRAM
    return 2 * num_ranks * num_words * 8


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
