"""Which part of each tensor of a checkpoint a rank takes if it holds a part of the model, and where that part goes."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import nn

from llm.checkpoint.slots import Piece, Slot
from llm.checkpoint.weight_slots import find_slots
from llm.core.weight_groups import WeightGroups
from llm.errors import ConfigError
from llm.models.cuts import Cut, find_cut
from llm.models.decoder import DecoderModel
from llm.models.experts import ExpertProjections
from llm.models.family import Destination, ExpertStack
from llm.models.quantized import Quantized, QuantizedExperts, QuantizedLinear
from llm.models.registry import destinations

Pieces = tuple[Piece, ...]
_CODES = ("weight", "weight_packed", "qweight")
_SCALES = ("weight_scale", "scales")
_ZEROS = ("weight_zero_point", "qzeros")
_ORDERS = ("weight_g_idx", "g_idx")
_STACK_LEAVES = ("_bias", "_blocks", "_scales")


def find_held_slots(model: DecoderModel) -> dict[str, Slot]:
    """The slot of each tensor of a checkpoint, with the pieces that `model` takes if it is a part of a model.

    Raises:
        ConfigError: the weights cannot be split this way.
    """
    if model.partition.size == 1:
        return find_slots(model)
    whole = DecoderModel.from_config(model.config, device="meta", dtype=model.dtype)
    places = destinations(model.config)
    slots = find_slots(whole)
    for name, slot in slots.items():
        if slot.target is None:
            continue
        theirs, leaf = _owner(name, places)
        if theirs is None:
            slots[name] = replace(slot, pieces=_cache_scale(model, name))
        elif leaf not in _ORDERS:
            pieces = tuple(_pieces(model, whole, places[theirs], leaf))
            slots[name] = replace(slot, pieces=pieces)
        else:
            slots[name] = replace(slot, pieces=_order(model, places[theirs]))
    return slots


def held_rows(rows: range, outputs: tuple[range, ...] | None) -> Iterator[tuple[slice, slice]]:
    """Find which of some rows of a whole module a rank holds.

    Args:
        rows: consecutive rows of the whole module.
        outputs: the rows of the whole module that the rank holds, as in `Cut`.

    Yields:
        A slice within `rows`, and the slice of the rank's own rows that it fills.
    """
    begin = 0
    for held in (rows,) if outputs is None else outputs:
        both = range(max(rows.start, held.start), min(rows.stop, held.stop))
        if both:
            first = begin + both.start - held.start if outputs is not None else rows.start
            yield slice(both.start - rows.start, both.stop - rows.start), slice(first, first + len(both))
        begin += len(held)


def _owner(name: str, places: Mapping[str, Destination]) -> tuple[str | None, str]:
    """Split a slot's name into a module's or tensor's, as families name it, and the rest; None if there is none."""
    if name in places:
        return name, ""
    module, _, leaf = name.rpartition(".")
    if module in places:
        return module, leaf
    for suffix in _STACK_LEAVES:
        if name.removesuffix(suffix) in places:
            return name.removesuffix(suffix), suffix
    return None, ""


def _cache_scale(model: DecoderModel, name: str) -> Pieces:
    """The piece of a scale of keys or values, which every rank holds whole."""
    assert model.cache_scales is not None, "the whole model has them"
    layer = int(name.split(".")[2])
    return (Piece((), model.cache_scales[layer, int(name.endswith("v_scale"))]),)


def _pieces(model: DecoderModel, whole: DecoderModel, place: Destination, leaf: str) -> Iterator[Piece]:
    """The pieces of one tensor of a module, or of a parameter."""
    cut = find_cut(model.config, model.partition, place.module)
    module, whole_module = (_get(each, place.module) for each in (model, whole))
    if isinstance(module, nn.Parameter):
        assert isinstance(whole_module, nn.Parameter), "the same model"
        yield from _plain(cut, place, module, whole_module)
    elif place.stack is not None:
        assert isinstance(module, ExpertProjections), "a stack is of experts"
        yield from _stack(cut, place, module, whole_module, leaf)
    elif isinstance(module, QuantizedLinear | QuantizedExperts) and leaf != "bias":
        assert isinstance(whole_module, QuantizedLinear | QuantizedExperts), "the same model"
        if cut.experts is None or place.expert in cut.experts:
            yield from _quantized(cut, place, module, whole_module, leaf)
    else:
        assert isinstance(whole_module, nn.Module), "the same model"
        parameter, whole_parameter = module.get_parameter(leaf), whole_module.get_parameter(leaf)
        if leaf == "bias" and not cut.has_bias:
            parameter.zero_()
        else:
            yield from _plain(cut, place, parameter, whole_parameter)


def _get(model: DecoderModel, name: str) -> nn.Module | nn.Parameter:
    owner, _, leaf = name.rpartition(".")
    found: nn.Module | nn.Parameter = getattr(model.get_submodule(owner), leaf)
    return found


def _plain(cut: Cut, place: Destination, parameter: torch.Tensor, whole: torch.Tensor) -> Iterator[Piece]:
    """The pieces of a weight or bias; of one expert's if the module holds several experts."""
    expert = place.expert
    if expert is not None:
        if cut.experts is not None and expert not in cut.experts:
            return
        parameter = parameter[expert - (cut.experts.start if cut.experts is not None else 0)]
        whole = whole[expert]
    rows = range(*place.rows.indices(len(whole)))
    columns = () if cut.inputs is None or parameter.dim() == 1 else (_slice(cut.inputs),)
    for source, target in held_rows(rows, cut.outputs):
        yield Piece((source, *columns), parameter.detach()[target])


def _stack(
    cut: Cut, place: Destination, module: ExpertProjections, whole: nn.Module | nn.Parameter, leaf: str
) -> Iterator[Piece]:
    """The pieces of a projection of all experts, or of its biases, once `weight_slots` has converted it."""
    if isinstance(module, QuantizedExperts) and leaf != "_bias":
        assert isinstance(whole, QuantizedExperts), "the same model"
        yield from _coded_stack(cut, place, module, whole, leaf)
        return
    parameter = module.weight
    if leaf == "_bias":
        assert module.bias is not None, "the whole model has them"
        parameter = module.bias
        if not cut.has_bias:
            parameter.zero_()
            return
    experts = slice(None) if cut.experts is None else _slice(cut.experts)
    columns = () if cut.inputs is None or leaf == "_bias" else (_slice(cut.inputs),)
    target = parameter.detach()
    if place.stack is ExpertStack.ALTERNATING:
        pairs = slice(None) if cut.outputs is None else _slice(cut.outputs[0])
        target = torch.unflatten(target, 1, (2, -1)).transpose(1, 2)
        yield Piece((experts, pairs, slice(None), *columns), target)
        return
    assert isinstance(whole, ExpertProjections), "the same model"
    for source, rows in held_rows(range(whole.weight.shape[1]), cut.outputs):
        yield Piece((experts, source, *columns), target[:, rows])


def _coded_stack(
    cut: Cut, place: Destination, module: QuantizedExperts, whole: QuantizedExperts, leaf: str
) -> Iterator[Piece]:
    """Codes or scales of all experts, as `_stack`; scales are (experts, groups, out), codes (experts, out, in)."""
    experts = slice(None) if cut.experts is None else _slice(cut.experts)
    inputs = range(_num_inputs(whole)) if cut.inputs is None else cut.inputs
    groups = _groups(whole.groups, inputs, _num_inputs(whole), place)
    target = (module.weight if leaf == "_blocks" else module.scales).detach()
    outputs: tuple[slice, ...] = (slice(None),)
    if place.stack is ExpertStack.ALTERNATING:
        dim = 1 if leaf == "_blocks" else 2
        target = torch.unflatten(target, dim, (2, -1)).transpose(dim, dim + 1)
        outputs = (slice(None) if cut.outputs is None else _slice(cut.outputs[0]), slice(None))
    if leaf != "_blocks":
        yield Piece((experts, groups, *outputs), target)
        return
    repack = _repack(whole.groups, module.groups, inputs, _num_inputs(whole))
    yield Piece((experts, *outputs), target, lambda packed: repack(packed.flatten(0, -2)).view(target.shape))


def _quantized(cut: Cut, place: Destination, module: Quantized, whole: Quantized, leaf: str) -> Iterator[Piece]:
    """The pieces of a quantized projection's codes, scales or zeros."""
    codes, groups, whole_groups, num_inputs = module.weight.detach(), module.groups, whole.groups, _num_inputs(whole)
    if place.expert is not None:
        held = place.expert - (0 if cut.experts is None else cut.experts.start)
        codes, groups, whole_groups = codes[held], groups.of_expert(held), whole_groups.of_expert(place.expert)
    rows = range(*place.rows.indices(whole.weight.shape[-2]))
    inputs = range(num_inputs) if cut.inputs is None else cut.inputs
    those = _groups(whole_groups, inputs, num_inputs, place)
    for source, target in held_rows(rows, cut.outputs):
        if leaf in _CODES and codes.dtype == torch.uint8:
            yield Piece((source,), codes[target], _repack(whole_groups, groups, inputs, num_inputs))
        elif leaf in _CODES:
            yield Piece((source, _slice(inputs)), codes[target])
        elif leaf in _SCALES:
            yield Piece((those, source), groups.scales.detach()[:, target])
        elif leaf in _ZEROS:
            assert groups.zeros is not None, "the whole model has them"
            yield Piece((those, source), groups.zeros.detach()[:, target])


def _num_inputs(whole: Quantized) -> int:
    return int(whole.weight.shape[-1]) * (2 if whole.weight.dtype == torch.uint8 else 1)


def _groups(whole: WeightGroups, inputs: range, num_inputs: int, place: Destination) -> slice:
    """The groups that a rank's inputs are in: those of whole groups, or one that all are in."""
    if whole.scales.shape[-2] == 1:
        return slice(None)
    size = whole.size
    if inputs.start % size or (inputs.stop % size and inputs.stop != num_inputs):
        raise ConfigError(
            f"tensor_parallel_size: {place.module} has {len(inputs)} inputs on each rank, which are not whole groups "
            f"of {size} as the checkpoint is quantized; use fewer GPUs a model"
        )
    if len(inputs) < num_inputs and whole.order is not None:
        raise ConfigError(
            f"tensor_parallel_size: {place.module} is quantized with desc_act or actorder, whose groups cannot be cut; "
            "use a checkpoint without"
        )
    return slice(inputs.start // size, -(-inputs.stop // size))


def _repack(
    whole: WeightGroups, groups: WeightGroups, inputs: range, num_inputs: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that takes a rank's inputs out of rows of 4-bit codes and packs them in the rank's spans."""
    if whole.span == groups.span and len(inputs) == num_inputs:
        return lambda packed: packed
    return lambda packed: groups.pack(whole.unpack(packed)[:, _slice(inputs)].contiguous())


def _order(model: DecoderModel, place: Destination) -> Pieces | None:
    """The pieces of the order of inputs, which every rank holds whole; None to only check it."""
    module = _get(model, place.module)
    assert isinstance(module, QuantizedLinear | QuantizedExperts), "others have none"
    if module.order is None:
        return None
    if place.expert is None:
        return (Piece((), module.order.detach()),)
    experts = find_cut(model.config, model.partition, place.module).experts
    if experts is not None and place.expert not in experts:
        return ()
    return (Piece((), module.order.detach()[place.expert - (0 if experts is None else experts.start)]),)


def _slice(numbers: range) -> slice:
    return slice(numbers.start, numbers.stop)
