"""Where adapters may be on a model, and which part of each a process holds with its part of the model."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from llm.checkpoint.cut_slots import held_rows
from llm.models.cuts import find_cut
from llm.models.decoder import DecoderModel
from llm.models.experts import ROUTING, ExpertProjections, Experts, Router, ShareGate
from llm.models.family import Destination
from llm.models.registry import destinations


@dataclass(frozen=True, slots=True)
class Factors:
    """The factors of one module of a checkpoint, as its adapter's files have them, or of one projection of experts.

    Attributes:
        a: A, (rank, in), or (experts, rank, in).
        b: B, (out, rank), or (experts, out, rank), in the model's order of outputs.
        place: the rows of the model's module that they add to.
        scaling: factor on `b @ a`.
        experts: whose factors they are, in a module that holds the projections of several; None for others.
    """

    a: torch.Tensor
    b: torch.Tensor
    place: Destination
    scaling: float
    experts: range | None = None

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a.shape[-2]


@dataclass(frozen=True, slots=True)
class HeldPart:
    """A part of an adapter that a process holds, with its part of the model.

    Attributes:
        inputs: columns of A.
        source: rows of B.
        rows: rows of the module that they add to, as far as this process holds it.
        experts: which of the factors' experts, and which of the process's experts these are; None for other modules.
    """

    inputs: slice
    source: slice
    rows: slice
    experts: tuple[slice, slice] | None = None


def shape_of(module: nn.Module) -> tuple[int, int]:
    """The inputs and outputs of a module that adapters may be on."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, ExpertProjections):
        return module.num_inputs, module.num_outputs
    assert isinstance(module, Router | ShareGate), "no others have adapters"
    num_outputs, num_inputs = module.weight.shape
    return num_inputs, num_outputs


def adapted_places(model: DecoderModel) -> dict[str, Destination]:
    """Destination of each module that an adapter may be on, by its name in checkpoints."""
    modules = dict(model.named_modules())
    return {
        name: place
        for name, place in destinations(model.config).items()
        if place.module.startswith("layers.")
        and place.stack is None
        and isinstance(modules.get(place.module), nn.Linear | Router | ShareGate | ExpertProjections)
    }


def module_parts(model: DecoderModel, *, with_experts: bool) -> dict[str, list[Destination]]:
    """For each module of the model, the parts that have an A of their own, in order of rows.

    Args:
        model: whole.
        with_experts: whether `ROUTING` is among them.
    """
    parts: dict[str, dict[int, Destination]] = {}
    for place in adapted_places(model).values():
        if not isinstance(model.get_submodule(place.module), ROUTING):
            parts.setdefault(place.module, {})[place.rows.start or 0] = place
    found = {module: [of_module[row] for row in sorted(of_module)] for module, of_module in parts.items()}
    if not with_experts:
        return found
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            places = expert_places(name, module.size)
            found |= {place.module: [place] for place in (Destination(f"{name}.router"), places[-1])}
            found[places[0].module] = places[:2]
        elif isinstance(module, ShareGate):
            found[name] = [Destination(name)]
    return found


def expert_places(experts: str, size: int) -> list[Destination]:
    """The places of each expert's gate, of what it gates, and of its last projection, in an `Experts` of this name."""
    gate_up = f"{experts}.gate_up_proj"
    ranges = slice(0, size), slice(size, 2 * size)
    return [*(Destination(gate_up, rows) for rows in ranges), Destination(f"{experts}.down_proj")]


def held_parts(
    model: DecoderModel, place: Destination, num_rows: int, experts: range | None = None
) -> Iterator[HeldPart]:
    """The parts that a process holds of the factors for a place of `num_rows` rows: one, in a model that is whole.

    Args:
        experts: see `Factors`.
    """
    cut = find_cut(model.config, model.partition, place.module)
    first = place.rows.start or 0
    inputs = slice(None) if cut.inputs is None else slice(cut.inputs.start, cut.inputs.stop)
    both = None
    if experts is not None:
        held = range(model.config.num_experts) if cut.experts is None else cut.experts
        begin, end = max(experts.start, held.start), min(experts.stop, held.stop)
        if begin >= end:
            return
        both = slice(begin - experts.start, end - experts.start), slice(begin - held.start, end - held.start)
    for source, rows in held_rows(range(first, first + num_rows), cut.outputs):
        yield HeldPart(inputs, source, rows, both)


def held_factors(factors: Factors, part: HeldPart) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of a part."""
    a, b = factors.a[..., part.inputs], factors.b[..., part.source, :]
    return (a, b) if part.experts is None else (a[part.experts[0]], b[part.experts[0]])


def of_one_expert(factors: Factors, expert: int) -> Factors:
    """Factors from a module that is one expert's, as those of a projection of experts."""
    place = replace(factors.place, expert=None)
    return Factors(factors.a[None], factors.b[None], place, factors.scaling, range(expert, expert + 1))
