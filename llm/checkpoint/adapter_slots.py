"""Adapters that requests choose, on their way from files to a slot of the engine's memory."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from llm.checkpoint.adapter import AdapterReader
from llm.checkpoint.adapter_places import Factors, held_factors, held_parts, module_parts, shape_of
from llm.config import EngineConfig
from llm.errors import CheckpointError
from llm.models.adapters import AdaptedModule, AdapterLayout
from llm.models.decoder import DecoderModel
from llm.models.experts import ExpertProjections
from llm.models.family import Destination

_RANK_MULTIPLE = 16
"""Ranks of slots are multiples of what a tensor core takes at once."""
_ALIGNMENT = 64
"""Factors begin at multiples of this many numbers."""
_CHECKED_AT_ONCE = 1 << 24


class AdapterPacker:
    """Reads adapters and packs each into the memory of one slot.

    Args:
        model: the model that adapters are for. Only its shapes are read, before the engine converts any module.
        max_rank: largest rank of an adapter.
        with_experts: whether slots have room for adapters on routers and on what these choose among.

    Attributes:
        layout: where in a slot the factors of each module are.
    """

    def __init__(self, model: DecoderModel, max_rank: int, *, with_experts: bool = False) -> None:
        self._max_rank = max_rank
        self._reader = AdapterReader(model, with_experts=with_experts)
        self._model = model
        is_whole = model.partition.size == 1
        self._whole = model if is_whole else DecoderModel.from_config(model.config, device="meta")
        places = module_parts(self._whole, with_experts=with_experts)
        self._parts = {
            (module, _first_row(place)): index for module, parts in places.items() for index, place in enumerate(parts)
        }
        rank = -(-max_rank // _RANK_MULTIPLE) * _RANK_MULTIPLE
        modules, size = {}, 0
        for module, parts in places.items():
            modules[module] = adapted = self._lay_out(module, parts, size, rank)
            size = _aligned(adapted.first_b + adapted.num_b(rank))
        self.layout = AdapterLayout(modules, rank, size)

    def read(self, adapter_dir: str | Path, numbers: torch.Tensor) -> int:
        """Fill the memory of a slot, (layout.size,) on the host, with an adapter; return its rank.

        Raises:
            CheckpointError, ConfigError: the adapter cannot be read, does not fit, or is not supported; see
            `AdapterReader`.
        """
        factors = self._reader.read(adapter_dir, max_rank=self._max_rank)
        numbers.zero_()
        self._fill(factors, numbers.unsqueeze(0))
        if not all(some.isfinite().all() for some in torch.split(numbers, _CHECKED_AT_ONCE)):
            raise CheckpointError(
                f"{adapter_dir}: the factors hold numbers that are not finite in {numbers.dtype}; train the adapter "
                "again, or serve the model in another dtype"
            )
        return max(each.rank for each in factors)

    def _fill(self, factors: Iterable[Factors], slot: torch.Tensor) -> None:
        """Write factors to zeros, B times the scaling. Few calls each, since the engine's thread runs meanwhile."""
        rank = self.layout.rank
        for each in factors:
            module = each.place.module
            adapted, part = self.layout.modules[module], self._parts[module, _first_row(each.place)]
            factor_a, factor_b = adapted.factor_a(slot, rank)[0], adapted.factor_b(slot, rank)[0]
            numbers = slice(part * rank, part * rank + each.rank)
            for held in held_parts(self._model, each.place, each.b.shape[-2], each.experts):
                own_a, own_b = (factor_a, factor_b) if held.experts is None else (
                    factor_a[held.experts[1]], factor_b[held.experts[1]],
                )  # fmt: skip
                a, b = held_factors(each, held)
                own_a[..., numbers, :].copy_(a)
                torch.mul(b, each.scaling, out=own_b[..., held.rows, : each.rank])

    def _lay_out(self, module: str, parts: list[Destination], first: int, rank: int) -> AdaptedModule:
        own, (_, whole_outputs) = self._model.get_submodule(module), shape_of(self._whole.get_submodule(module))
        num_inputs, num_outputs = shape_of(own)
        num_experts = own.num_experts if isinstance(own, ExpertProjections) else None
        ranges = []
        for place in parts:
            num_rows = len(range(*place.rows.indices(whole_outputs)))
            for held in held_parts(self._model, place, num_rows):
                begin, end, _ = held.rows.indices(num_outputs)
                ranges.append((self._parts[module, _first_row(place)], begin, end))
        adapted = AdaptedModule(num_inputs, num_outputs, len(parts), _joined(ranges), first, first, num_experts)
        return replace(adapted, first_b=_aligned(first + adapted.num_a(rank)))


def make_packer(model: DecoderModel, config: EngineConfig) -> AdapterPacker | None:
    """Make an engine's packer, before the engine converts any module; None if requests cannot choose adapters."""
    if not config.max_adapters:
        return None
    return AdapterPacker(model, config.max_adapter_rank, with_experts=config.adapter_experts)


def _first_row(place: Destination) -> int:
    return place.rows.start or 0


def _joined(ranges: list[tuple[int, int, int]]) -> tuple[tuple[int, int, int], ...]:
    """Ranges (part, first, end) in order, those of one part as one where they touch: a rank may hold several pieces of
    a part, one behind the other."""
    joined: list[tuple[int, int, int]] = []
    for part, first, end in sorted(ranges, key=lambda each: each[1]):
        if joined and joined[-1][0] == part and joined[-1][2] == first:
            joined[-1] = part, joined[-1][1], end
        else:
            joined.append((part, first, end))
    return tuple(joined)


def _aligned(place: int) -> int:
    return -(-place // _ALIGNMENT) * _ALIGNMENT
