"""Adapters that requests choose, on their way from files to a slot of the engine's memory."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from llm.checkpoint.adapter import AdapterReader, Factors, adapted_places, held_parts
from llm.config import EngineConfig
from llm.errors import CheckpointError
from llm.models.adapters import AdaptedModule, AdapterLayout
from llm.models.decoder import DecoderModel
from llm.models.family import Destination

_RANK_MULTIPLE = 16
"""Ranks of slots are multiples of what a tensor core takes at once."""
_ALIGNMENT = 64
"""Numbers; factors begin at multiples of it."""


class AdapterPacker:
    """Reads adapters and packs each into the memory of one slot.

    Args:
        model: whose modules they are for. Only shapes are read, before the engine converts any module.
        max_rank: largest rank of an adapter.

    Attributes:
        layout: of a slot.
    """

    def __init__(self, model: DecoderModel, max_rank: int) -> None:
        self._max_rank = max_rank
        self._reader = AdapterReader(model)
        places: dict[str, list[Destination]] = {}
        for place in adapted_places(model).values():
            places.setdefault(place.module, []).append(place)
        self._parts = {
            (module, place.rows.start): index
            for module, parts in places.items()
            for index, place in enumerate(sorted(parts, key=_first_row))
        }
        self._model = model
        is_whole = model.partition.size == 1
        self._whole = model if is_whole else DecoderModel.from_config(model.config, device="meta")
        rank = -(-max_rank // _RANK_MULTIPLE) * _RANK_MULTIPLE
        modules, size = {}, 0
        for module, parts in places.items():
            modules[module] = adapted = self._lay_out(module, parts, size, rank)
            size = _aligned(adapted.first_b + adapted.num_outputs * rank)
        self.layout = AdapterLayout(modules, rank, size)

    def read(self, adapter_dir: str | Path, numbers: torch.Tensor) -> int:
        """Fill the memory of a slot, (layout.size,) on the host, with an adapter; return its rank.

        Raises:
            CheckpointError, ConfigError: it cannot be read, does not fit, or is not supported; see `AdapterReader`.
        """
        factors = self._reader.read(adapter_dir, max_rank=self._max_rank)
        numbers.zero_()
        self._fill(factors, numbers.unsqueeze(0))
        if not numbers.isfinite().all():
            raise CheckpointError(
                f"{adapter_dir}: the factors hold numbers that are not finite in {numbers.dtype}; train the adapter "
                "again, or serve the model in another dtype"
            )
        return max(len(each.a) for each in factors)

    def _fill(self, factors: Iterable[Factors], slot: torch.Tensor) -> None:
        """Write factors to zeros, B times the scaling. Few calls each, since the engine's thread runs meanwhile."""
        rank = self.layout.rank
        for each in factors:
            place, own_rank = each.place, len(each.a)
            adapted, part = self.layout.modules[place.module], self._parts[place.module, place.rows.start]
            factor_a, factor_b = adapted.factor_a(slot, rank)[0], adapted.factor_b(slot, rank)[0]
            for held in held_parts(self._model, place, len(each.b)):
                factor_a[part * rank : part * rank + own_rank].copy_(each.a[:, held.inputs])
                torch.mul(each.b[held.source], each.scaling, out=factor_b[held.rows, :own_rank])

    def _lay_out(self, module: str, parts: list[Destination], first: int, rank: int) -> AdaptedModule:
        linear, whole = (_linear(each, module) for each in (self._model, self._whole))
        ranges = []
        for place in parts:
            num_rows = len(range(*place.rows.indices(whole.out_features)))
            for held in held_parts(self._model, place, num_rows):
                begin, end, _ = held.rows.indices(linear.out_features)
                ranges.append((self._parts[module, place.rows.start], begin, end))
        first_b = _aligned(first + len(parts) * rank * linear.in_features)
        return AdaptedModule(linear.in_features, linear.out_features, len(parts), _joined(ranges), first, first_b)


def make_packer(model: DecoderModel, config: EngineConfig) -> AdapterPacker | None:
    """Make what reads adapters for an engine, before that converts any module; None if requests cannot choose any."""
    return AdapterPacker(model, config.max_adapter_rank) if config.max_adapters else None


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


def _linear(model: DecoderModel, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear), "adapters fit linear layers"
    return module


def _aligned(place: int) -> int:
    return -(-place // _ALIGNMENT) * _ALIGNMENT
