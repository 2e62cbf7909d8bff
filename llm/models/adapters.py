"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) that each token chooses: their memory, and what they add.

All adapters of an engine have places of one size, its slots. A slot holds the factors of every module that an adapter
may be on, zeros where it is not on one. A module may be made of several of a checkpoint's modules (queries, keys and
values), which have factors of their own: its parts. B includes the adapter's scaling.

Of a module that holds one projection of every expert, a slot holds the factors of each expert.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

NO_ADAPTER = -1
"""Stands for the slot of a token that the model itself computes."""


@dataclass(frozen=True, slots=True)
class AdaptedModule:
    """Where a slot holds the factors of one module.

    Attributes:
        num_inputs, num_outputs: of the module, as far as this process holds it.
        num_parts: factors A, each of which reads all inputs.
        ranges: (part, first, end) of outputs that a part adds to, in order; no output is in two of them.
        first_a: place of A, (parts, rank, inputs), within the slot.
        first_b: place of B, (outputs, rank), within the slot.
        num_experts: experts whose projections the module holds, each with an A and a B of its own, one behind the
            other; None for a module that is one projection.
    """

    num_inputs: int
    num_outputs: int
    num_parts: int
    ranges: tuple[tuple[int, int, int], ...]
    first_a: int
    first_b: int
    num_experts: int | None = None

    def factor_a(self, slots: torch.Tensor, rank: int) -> torch.Tensor:
        """A of all `slots`, (slots, numbers): (slots, parts · rank, inputs), or (slots, experts, …); a view."""
        return _view(slots, self.first_a, self._shape(self.num_parts * rank, self.num_inputs))

    def factor_b(self, slots: torch.Tensor, rank: int) -> torch.Tensor:
        """B of all `slots`, (slots, numbers): (slots, outputs, rank), or (slots, experts, …); a view."""
        return _view(slots, self.first_b, self._shape(self.num_outputs, rank))

    def num_a(self, rank: int) -> int:
        """How many numbers A takes in a slot."""
        return math.prod(self._shape(self.num_parts * rank, self.num_inputs))

    def num_b(self, rank: int) -> int:
        """How many numbers B takes in a slot."""
        return math.prod(self._shape(self.num_outputs, rank))

    def _shape(self, *shape: int) -> tuple[int, ...]:
        return shape if self.num_experts is None else (self.num_experts, *shape)


def _view(slots: torch.Tensor, first: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.unflatten(slots[:, first : first + math.prod(shape)], 1, shape)


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """What a slot holds.

    Attributes:
        modules: by their names in the model.
        rank: of a slot; adapters of lower rank have zeros behind theirs.
        size: numbers of a slot.
    """

    modules: Mapping[str, AdaptedModule]
    rank: int
    size: int


class AdapterMemory:
    """The slots on a model's device.

    Args:
        model: has the layout's modules, in their final form: the engine may have converted them.
        num_slots: adapters that fit at once.

    Attributes:
        slots: (num_slots, layout.size), in the format of the activations.
        ranks: (num_slots,) int32, on the host: the rank of the adapter in each slot.
    """

    def __init__(self, model: nn.Module, layout: AdapterLayout, num_slots: int, dtype: torch.dtype) -> None:
        device = next(model.parameters()).device
        self.layout = layout
        self.slots = torch.zeros(num_slots, layout.size, dtype=dtype, device=device)
        self.ranks: npt.NDArray[np.int32] = np.zeros(num_slots, np.int32)
        self._modules = {model.get_submodule(name): adapted for name, adapted in layout.modules.items()}

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def modules(self) -> Mapping[nn.Module, AdaptedModule]:
        """The modules that adapters may be on."""
        return self._modules

    def of(self, module: nn.Module) -> AdaptedModule | None:
        """Where slots hold the factors of a module; None for one that no adapter can be on."""
        return self._modules.get(module)


class TokenAdapters:
    """The adapters of a pass's tokens, in plain PyTorch.

    Args:
        memory: of the engine.
        slots: (tokens,) int64, the slot of each token's adapter, `NO_ADAPTER` for none; on the device.
    """

    def __init__(self, memory: AdapterMemory, slots: torch.Tensor) -> None:
        self._memory = memory
        self._slots = slots
        present: Sequence[int] = torch.unique(slots).tolist()
        self._tokens = {slot: (slots == slot).nonzero().squeeze(1) for slot in present if slot != NO_ADAPTER}

    def kept(self, kept: torch.Tensor) -> Self:
        """Those of the tokens at `kept`, (kept,)."""
        return type(self)(self._memory, self._slots[kept])

    def factors(
        self, module: nn.Module, expert: int | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """For each adapter of the pass on a module: its tokens, A (parts · rank, inputs), and B (outputs, rank).

        Args:
            expert: which of the module's experts, in a module that holds several; None for others.
        """
        adapted = self._memory.of(module)
        if adapted is None:
            return
        rank = self._memory.layout.rank
        factor_a, factor_b = (each(self._memory.slots, rank) for each in (adapted.factor_a, adapted.factor_b))
        for slot, tokens in self._tokens.items():
            place = slot if expert is None else (slot, expert)
            yield tokens, factor_a[place], factor_b[place]

    def add(self, module: nn.Module, x: torch.Tensor, product: torch.Tensor, expert: int | None = None) -> None:
        """Add what the adapters make of a module's inputs, (tokens, in), to its product, (tokens, out)."""
        adapted, rank = self._memory.of(module), self._memory.layout.rank
        for tokens, factor_a, factor_b in self.factors(module, expert):
            assert adapted is not None, "it has factors"
            shrunk = x[tokens] @ factor_a.t()
            for part, first, end in adapted.ranges:
                update = shrunk[:, part * rank : (part + 1) * rank] @ factor_b[first:end].t()
                product[tokens, first:end] += update


def product(projection: nn.Module, x: torch.Tensor, adapters: TokenAdapters | None) -> torch.Tensor:
    """A projection of x, (tokens, in), to which tokens' adapters have added; (…, in) where there are none."""
    found: torch.Tensor = projection(x)
    if adapters is not None:
        adapters.add(projection, x, found)
    return found
