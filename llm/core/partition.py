"""What a rank knows of itself and of the others where several run one model, each with its part of the weights."""

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class Partition:
    """Which part of a model a process holds.

    Attributes:
        rank: of the process, from 0.
        size: processes that hold the model together; 1 for one that holds all of it.
        by_expert: experts are cut by expert, not by column: each rank holds some of them, whole.
    """

    rank: int = 0
    size: int = 1
    by_expert: bool = False


WHOLE = Partition()
"""The partition of a process that holds a whole model."""


class Exchange(Protocol):
    """What the ranks of a model tell each other within a step. Every rank calls the same in the same order.

    On a GPU the calls are enqueued on the current stream, and may be captured in a graph.
    """

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' tensors, contiguous; the same on every rank, bit by bit.

        It may be `tensor` itself, whose content is lost in any case; later calls leave it alone.
        """
        ...

    def adds(self, tensor: torch.Tensor) -> bool:
        """Whether a sum of such tensors is best added to what it belongs to at once, by `add_all_reduce`."""
        ...

    def add_all_reduce(self, tensor: torch.Tensor, total: torch.Tensor) -> None:
        """Add the sum of all ranks' tensors, contiguous, to `total`, of the same shape and format, contiguous."""
        ...

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """All ranks' tensors (…), contiguous, one behind the other: (ranks, …)."""
        ...

    def gather_columns(self, tensor: torch.Tensor) -> torch.Tensor:
        """All ranks' tensors (…, size), contiguous, beside each other on rank 0: (…, ranks size).

        What it holds on the other ranks is not defined.
        """
        ...

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Overwrite `tensor`, contiguous, with rank 0's."""
        ...
