"""Where each tensor of a checkpoint of a whole model goes.

Stacks of experts are those of transformers' `GptOssForCausalLM` in 16 bits, and of OpenAI's files in MXFP4.
"""

import re
from collections.abc import Callable, Iterator

import torch
from torch import nn

from llm.checkpoint.quantized_slots import QuantizedRows, unsupported
from llm.checkpoint.slots import BYTES, NOT_NEEDED, Convert, Slot
from llm.config import WeightLayout
from llm.core.mxfp4 import BLOCK_SIZE, block_codes
from llm.models.decoder import DecoderModel
from llm.models.experts import ExpertProjections
from llm.models.family import ExpertStack
from llm.models.quantized import QuantizedExperts, QuantizedLinear
from llm.models.registry import destinations

_CACHE_SCALE = re.compile(r"self_attn\.([kv])_proj\.(?:output|\1)_scale$")


def find_slots(model: DecoderModel) -> dict[str, Slot]:
    """The place of each tensor that a checkpoint of this model has or may have, by its name."""
    slots: dict[str, Slot] = {}
    orders: dict[str, torch.Tensor] = {}
    places = destinations(model.config)
    stacks = {place.module: theirs for theirs, place in places.items() if place.stack is not None}
    for theirs, destination in places.items():
        owner, _, leaf = destination.module.rpartition(".")
        module = getattr(model.get_submodule(owner), leaf)
        if isinstance(module, nn.Parameter):
            target = destination.part_of(module.detach())
            slots[theirs] = Slot(target, (tuple(target.shape),))
            continue
        if destination.stack is not None:
            assert isinstance(module, ExpertProjections), "a stack is of experts"
            slots.update(_stack_slots(theirs, module, destination.stack))
            continue
        leaves = [name for name, _ in module.named_parameters(recurse=False)]
        if isinstance(module, QuantizedLinear | QuantizedExperts):
            leaves = ["bias"]
            rows = QuantizedRows.of(module, destination, theirs, orders)
            slots.update((f"{theirs}.{leaf}", slot) for leaf, slot in rows.slots())
        for leaf in leaves:
            parameter = getattr(module, leaf, None)
            if parameter is not None:
                target = destination.part_of(parameter.detach())
                stack = None if destination.expert is None else stacks.get(destination.module)
                convert = None if destination.arrange is None else _arranging(destination.arrange)
                slots[f"{theirs}.{leaf}"] = Slot(target, (tuple(target.shape),), convert=convert, stack=stack)
    if model.cache_scales is not None:
        for layer, scales in enumerate(model.cache_scales):
            attention = f"model.layers.{layer}.self_attn"
            for leaf, target in zip(("k_scale", "v_scale"), scales, strict=True):
                slots[f"{attention}.{leaf}"] = Slot(target, ((), (1,)), convert=_number, is_optional=True)
            slots[f"{attention}.q_scale"] = slots[f"{attention}.prob_scale"] = NOT_NEEDED
    return slots


def canonical_scale_name(name: str) -> str:
    """The name that `find_slots` has for a tensor, given its canonical name.

    Some tools call a scale that multiplies inverse, and some keep the scales of keys and values with their projections.
    """
    name = _CACHE_SCALE.sub(r"self_attn.\1_scale", name)
    return name.removesuffix("_inv") if name.endswith(".weight_scale_inv") else name


def _stack_slots(name: str, module: ExpertProjections, stack: ExpertStack) -> Iterator[tuple[str, Slot]]:
    """The slots of one projection of all of a layer's experts, and of its bias, with their names."""
    if stack is ExpertStack.AS_HERE:
        if not isinstance(module, QuantizedExperts):  # those that are have tensors of their own
            yield name, Slot(module.weight.detach(), (tuple(module.weight.shape),))
        return

    def target(parameter: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """A view of a parameter in the checkpoint's order of outputs, which are at `dim`; ours has gates first."""
        if stack is ExpertStack.IN_ORDER:
            return parameter.detach()
        return torch.unflatten(parameter.detach(), dim, (2, -1)).transpose(dim, dim + 1)

    def arranged(tensor: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """A checkpoint's tensor, whose outputs are at `dim`, in the shape of `target`'s view."""
        return torch.unflatten(tensor, dim, (-1, 2)) if stack is ExpertStack.ALTERNATING else tensor

    num_experts, num_outputs, width = module.weight.shape
    if isinstance(module, QuantizedExperts):
        if module.weight_format.layout is not WeightLayout.MXFP4:
            raise unsupported(module, name)
        groups, shape = module.groups, (num_experts, num_outputs, 2 * width // BLOCK_SIZE)

        def repack(blocks: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
            packed = torch.empty(module.weight.shape, dtype=torch.uint8, device=blocks.device)
            for expert, codes in enumerate(blocks):  # one by one, for codes alone take twice as much memory
                packed[expert] = groups.pack(block_codes(codes))
            return arranged(packed)

        yield f"{name}_blocks", Slot(target(module.weight), ((*shape, BLOCK_SIZE // 2),), BYTES, repack)
        yield (
            f"{name}_scales",
            Slot(target(module.scales, 2), (shape,), BYTES, lambda scales, _: arranged(scales.transpose(1, 2), 2)),
        )
    else:
        shape = num_experts, width, num_outputs
        yield name, Slot(target(module.weight), (shape,), convert=lambda stored, _: arranged(stored.transpose(1, 2)))
    if module.bias is not None:
        yield (
            f"{name}_bias",
            Slot(target(module.bias), ((num_experts, num_outputs),), convert=lambda bias, _: arranged(bias)),
        )


def _arranging(arrange: Callable[[torch.Tensor], torch.Tensor]) -> Convert:
    return lambda stored, _: arrange(stored)


def _number(tensor: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
    return tensor.reshape(())
