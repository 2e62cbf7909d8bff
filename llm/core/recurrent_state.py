"""What layers with a gated delta rule remember of a sequence: one state of fixed size, however long the sequence is.

A state is the tail of what goes through the layer's short convolution, and a matrix for each head. It belongs to a
place in a batch: to a row of the scheduler's in `RecurrentStates`, to a sequence of a batch in `RecurrentCache`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch

from llm.config import DeltaConfig
from llm.errors import CapacityError


@dataclass(frozen=True, slots=True)
class DeltaSpec:
    """Shape of one layer's gated delta rule (Yang et al. 2024, arXiv:2412.06464).

    Each head of queries and keys serves `num_value_heads / num_key_heads` neighbouring heads of values.

    Attributes:
        num_key_heads: heads of queries, and as many of keys.
        num_value_heads: heads of values.
        key_dim: width of a head of queries or keys.
        value_dim: width of a head of values.
        kernel_size: tokens that the short convolution in front of the rule sees, each token's own included.
    """

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    kernel_size: int

    @classmethod
    def of(cls, delta: DeltaConfig) -> Self:
        """That of the layers of a model."""
        return cls(delta.num_key_heads, delta.num_value_heads, delta.key_dim, delta.value_dim, delta.kernel_size)

    @property
    def conv_size(self) -> int:
        """Width of a token's queries, keys and values together, in this order: what the convolution runs over."""
        return 2 * self.num_key_heads * self.key_dim + self.output_size

    @property
    def output_size(self) -> int:
        """Width of what the rule gives for a token, and of the gate on it."""
        return self.num_value_heads * self.value_dim


class RecurrentState(NamedTuple):
    """States of some sequences in one layer.

    Attributes:
        tail: (sequences, kernel_size - 1, conv_size), what the last tokens put into the short convolution.
        matrix: (sequences, num_value_heads, value_dim, key_dim) float32, the rule's memory of each head.
    """

    tail: torch.Tensor
    matrix: torch.Tensor

    @classmethod
    def zeros(cls, spec: DeltaSpec, num: int, device: torch.device | str, dtype: torch.dtype) -> Self:
        """States of sequences that have no token yet."""
        tail = torch.zeros(num, spec.kernel_size - 1, spec.conv_size, device=device, dtype=dtype)
        shape = num, spec.num_value_heads, spec.value_dim, spec.key_dim
        return cls(tail, torch.zeros(shape, device=device, dtype=torch.float32))


class RecurrentStates:
    """The states of every row in every layer that has them; a row is used by one sequence at a time.

    Nobody clears a row: whoever runs a part of a sequence begins from zeros where the part's first position is 0, which
    is where a sequence begins, and begins again after it was preempted.

    Args:
        specs: of the layers, by their index; all the same.
        num_rows: rows that the scheduler gives out. There is one more, for what belongs to nobody.
        device: where the states live.
        dtype: of the activations.
        num_snapshots: places for states as they were at a time.

    Attributes:
        layers: for each such layer the states of all rows, and behind these the snapshots.
    """

    def __init__(
        self,
        specs: Mapping[int, DeltaSpec],
        num_rows: int,
        device: torch.device | str,
        dtype: torch.dtype,
        num_snapshots: int = 0,
    ) -> None:
        assert len(set(specs.values())) <= 1, "layers with states of several shapes"
        self._first_snapshot = num_rows + 1
        self._all: RecurrentState | None = None
        self.layers: dict[int, RecurrentState] = {}
        num_places = num_rows + 1 + num_snapshots
        for spec in set(specs.values()):
            zeros = RecurrentState.zeros(spec, len(specs) * num_places, device, dtype)
            self._all = stacked = RecurrentState(*(x.view(len(specs), num_places, *x.shape[1:]) for x in zeros))
            self.layers = {layer: RecurrentState(*(x[i] for x in stacked)) for i, layer in enumerate(specs)}

    def restore(self, pairs: npt.NDArray[np.int32]) -> None:
        """Copy snapshots to rows, in the device's order of work.

        Args:
            pairs: (2 snapshots,), row and place of each.
        """
        for row, place in pairs.reshape(-1, 2).tolist():
            self._copy(self._first_snapshot + place, row)

    def save(self, pairs: npt.NDArray[np.int32]) -> None:
        """Copy rows to snapshots; see `restore`."""
        for row, place in pairs.reshape(-1, 2).tolist():
            self._copy(row, self._first_snapshot + place)

    def _copy(self, source: int, target: int) -> None:
        for states in self._all or ():
            states[:, target].copy_(states[:, source])


class RecurrentCache:
    """What `KVCache` is to attention, for one layer with a recurrent state: a batch of sequences of equal length.

    Args:
        max_batch_size: most sequences.
        spec: of the layer.
        device: where the states live.
        dtype: of the activations.

    Attributes:
        length: tokens seen so far by every sequence of the batch.
    """

    def __init__(
        self,
        max_batch_size: int,
        spec: DeltaSpec,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size is {max_batch_size}; it must be at least 1")
        self.max_batch_size = max_batch_size
        self._state = RecurrentState.zeros(spec, max_batch_size, device, dtype)
        self.reset()

    @property
    def num_bytes(self) -> int:
        """Memory held, in bytes."""
        return sum(tensor.nbytes for tensor in self._state)

    def reset(self) -> None:
        """Forget every token. The memory stays allocated."""
        self.length = 0
        self._batch_size: int | None = None
        for tensor in self._state:
            tensor.zero_()

    def state(self, batch_size: int) -> RecurrentState:
        """The states of a batch, views; `update` changes them.

        Raises:
            CapacityError: a larger batch than `max_batch_size`, or another one than before.
        """
        if batch_size > self.max_batch_size:
            raise CapacityError(
                f"batch of {batch_size} sequences; this RecurrentCache holds max_batch_size={self.max_batch_size}"
            )
        if self._batch_size is not None and batch_size != self._batch_size:
            raise CapacityError(
                f"batch of {batch_size} sequences after one of {self._batch_size}; reset the caches between batches"
            )
        return RecurrentState(*(tensor[:batch_size] for tensor in self._state))

    def update(self, state: RecurrentState, num_new: int) -> None:
        """Take in the states of the batch behind `num_new` more tokens."""
        self._batch_size = len(state.tail)
        self.length += num_new
        for own, new in zip(self._state, state, strict=True):
            own[: self._batch_size] = new.detach()
