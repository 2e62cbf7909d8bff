"""Collectives: the data that ranks exchange within a step, over NCCL on GPUs and over gloo on CPUs.

Sums may bypass the library: `PeerSums` is the interface for that.
"""

import ctypes
import os
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
from torch._C._distributed_c10d import (
    AllgatherOptions,
    AllreduceOptions,
    BroadcastOptions,
    FileStore,
    PrefixStore,
    ProcessGroupGloo,
)

from llm.core.partition import Partition
from llm.parallel.environment import ENVIRONMENT


class PeerSums(Protocol):
    """Sums by the project's own kernels, through the ranks' memory. Made on all ranks at the same time."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum all ranks' tensors, contiguous: the same on every rank, bit by bit, and in the order of ranks.

        Enqueued on the current stream; may be captured in a graph. Every rank makes these calls and other collectives
        in the same order. The result may be `tensor` itself; later calls must not change it.
        """
        ...

    def add_all_reduce(self, tensor: torch.Tensor, total: torch.Tensor) -> None:
        """Add the sum to `total`, of the same shape and format, contiguous."""
        ...

    def gather_columns(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Exchange.gather_columns`; rows of whole words of 4 bytes."""
        ...


class Collectives:
    """The `Exchange` of a rank.

    Args:
        group: what `connect` returned: NCCL's for tensors on a GPU, gloo's for those on a CPU.
        partition: says which rank this is.
        peers: takes all sums; None to use the group's all-reduce.
        deterministic: a sum depends only on its terms, however many are added up in one call.
    """

    def __init__(
        self,
        group: Any,
        partition: Partition,
        *,
        peers: PeerSums | None = None,
        deterministic: bool = False,
    ) -> None:
        self._group = group
        self._size = partition.size
        self._peers = peers
        # Two terms have only one sum; with more, the library's order of addition depends on the message's size.
        self._in_order = deterministic and partition.size > 2
        self._all_reduce_options = AllreduceOptions()
        self._all_gather_options = AllgatherOptions()
        self._broadcast_options = BroadcastOptions()
        self._broadcast_options.rootRank = 0
        for options in (self._all_reduce_options, self._all_gather_options, self._broadcast_options):
            options.asyncOp = False  # on the current stream, which graphs are captured from

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Exchange.all_reduce`."""
        if self._peers is not None:
            return self._peers.all_reduce(tensor)
        if self._in_order:
            return self.all_gather(tensor).sum(0)
        _finish(self._group.allreduce([tensor], self._all_reduce_options))
        return tensor

    def adds(self, tensor: torch.Tensor) -> bool:  # noqa: ARG002  # others decide by size
        """See `Exchange.adds`."""
        return self._peers is not None

    def add_all_reduce(self, tensor: torch.Tensor, total: torch.Tensor) -> None:
        """See `Exchange.add_all_reduce`."""
        assert self._peers is not None, "asked by `adds`"
        self._peers.add_all_reduce(tensor, total)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Exchange.all_gather`."""
        gathered = tensor.new_empty(self._size, *tensor.shape)
        # As bytes, because not every library knows every number format.
        output, own = (each.view(-1).view(torch.uint8) for each in (gathered, tensor))
        _finish(self._group._allgather_base(output, own, self._all_gather_options))
        return gathered

    def gather_columns(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Exchange.gather_columns`."""
        if self._peers is not None and tensor.shape[-1] * tensor.element_size() % 4 == 0:
            return self._peers.gather_columns(tensor)
        return self.all_gather(tensor).movedim(0, -2).flatten(-2)

    def broadcast(self, tensor: torch.Tensor) -> None:
        """See `Exchange.broadcast`."""
        _finish(self._group.broadcast([tensor], self._broadcast_options))

    def close(self) -> None:
        """Give the library's connections up; nothing may be exchanged after this.

        NCCL ends a connection only once no captured graph uses it, and waits for that however long it takes. So a
        thread waits; while this process ends, nobody does.
        """
        try:
            threading.Thread(target=self._group.abort, name="collectives", daemon=True).start()
        except RuntimeError:  # the interpreter ends, and takes no more threads
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._group))  # or its destructor would wait


def _finish(work: Any) -> None:
    """Wait for a collective. If NCCL has enqueued it on the current stream, there is nothing to wait for."""
    if work is not None:
        work.wait()


def connect(partition: Partition, store_path: Path, device: torch.device, timeout_s: float) -> Any:
    """Connect this rank with the others, which do the same. Does not use torch's one default group of a process.

    Args:
        store_path: a file by which the ranks find each other, the same for all of them and used once.
        device: of the tensors.
        timeout_s: how long to wait for the other ranks; on a CPU also for each collective.
    """
    os.environ.update(ENVIRONMENT)
    store = PrefixStore(device.type, FileStore(str(store_path), partition.size))
    timeout = timedelta(seconds=timeout_s)
    if device.type == "cuda":
        from torch._C._distributed_c10d import ProcessGroupNCCL  # builds for CPUs lack it

        nccl = ProcessGroupNCCL.Options()
        nccl._timeout = timeout
        return ProcessGroupNCCL(store, partition.rank, partition.size, nccl)
    gloo: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # the stubs lack it
    gloo._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    gloo._timeout = timeout
    return ProcessGroupGloo(store, partition.rank, partition.size, gloo)
