"""Where each tensor of a checkpoint goes, and what becomes of it on the way: the layouts of quantized weights.

The layouts are those that AutoAWQ (gemm), AutoGPTQ and GPTQModel, compressed-tensors and transformers' fp8 write; they
pack eight codes of 4 bits into an int32, the first in the lowest bits, AWQ in an order of its own. Stacks of experts
are those of transformers' `GptOssForCausalLM` in 16 bits, and of OpenAI's files in MXFP4.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from llm.config import WeightFormat, WeightLayout
from llm.core.mxfp4 import BLOCK_SIZE, block_codes
from llm.core.weight_groups import FP8, WeightGroups, pack
from llm.errors import CheckpointError, ConfigError
from llm.models.decoder import DecoderModel
from llm.models.experts import ExpertProjections
from llm.models.family import Destination, ExpertStack
from llm.models.quantized import QuantizedExperts, QuantizedLinear
from llm.models.registry import destinations

Shape = tuple[int, ...]
Convert = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_INTEGERS = frozenset({"I32", "I64"})
_BYTES = frozenset({"U8"})
_CACHE_SCALE = re.compile(r"self_attn\.([kv])_proj\.(?:output|\1)_scale$")
_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]
"""Where in an int32 AutoAWQ packs eight neighbouring outputs."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a tensor of a checkpoint, and where it goes.

    Attributes:
        source: where in the tensor it is, once that is converted.
        target: the part of a parameter that it fills.
        repack: makes what the target takes of it; None for as it is.
    """

    source: tuple[slice, ...]
    target: torch.Tensor
    repack: Callable[[torch.Tensor], torch.Tensor] | None = None

    def fill(self, tensor: torch.Tensor) -> None:
        """Copy the part of this tensor."""
        part = tensor[self.source]
        self.target.copy_(part if self.repack is None else self.repack(part))


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one tensor of a checkpoint goes.

    Attributes:
        target: the part of a parameter that it fills; None for nowhere.
        shapes: those that it may have.
        kinds: the types that it may have, as safetensors names them.
        convert: makes what the target takes of it, on the target's device; None to copy it as it is.
        companion: name of the tensor that `convert` gets beside it, where there is one.
        is_optional: whether a checkpoint may lack it.
        pieces: what is taken of the tensor where the model is a part of one; `target` is then that of a whole one. None
            for all of it.
        stack: name of the tensor that holds it, and that of the other experts, where a checkpoint has that instead.
    """

    target: torch.Tensor | None
    shapes: tuple[Shape, ...]
    kinds: frozenset[str] = FLOATS
    convert: Convert | None = None
    companion: str | None = None
    is_optional: bool = False
    pieces: tuple[Piece, ...] | None = None
    stack: str | None = None

    @property
    def filled(self) -> tuple[Piece, ...]:
        """What is taken, and where it goes."""
        if self.pieces is not None:
            return self.pieces
        return () if self.target is None else (Piece((), self.target),)


_NOT_NEEDED = Slot(None, (), is_optional=True)
"""Of what says nothing that is not known, and of scales of activations: those are kept in 16 bits, or rounded by the
scales that they turn out to need."""


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
            part = _part_of(module, destination, theirs, orders)
            slots.update((f"{theirs}.{leaf}", slot) for leaf, slot in part.slots())
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
            slots[f"{attention}.q_scale"] = slots[f"{attention}.prob_scale"] = _NOT_NEEDED
    return slots


def canonical_scale_name(name: str) -> str:
    """The name that slots have for a tensor.

    Scales that multiply are called inverse by some; those of keys and values have stood beside their projections.
    """
    name = _CACHE_SCALE.sub(r"self_attn.\1_scale", name)
    return name.removesuffix("_inv") if name.endswith(".weight_scale_inv") else name


def _stack_slots(name: str, module: ExpertProjections, stack: ExpertStack) -> Iterator[tuple[str, Slot]]:
    """The slots of a projection of all experts of a layer and of its bias, by their names."""
    if stack is ExpertStack.AS_HERE:
        if not isinstance(module, QuantizedExperts):  # those that are have tensors of their own
            yield name, Slot(module.weight.detach(), (tuple(module.weight.shape),))
        return

    def target(parameter: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """A view of a parameter, whose outputs are a dimension with gates in front, in the order of the checkpoint."""
        if stack is ExpertStack.IN_ORDER:
            return parameter.detach()
        return torch.unflatten(parameter.detach(), dim, (2, -1)).transpose(dim, dim + 1)

    def arranged(tensor: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """What a checkpoint holds, its outputs a dimension, as `target` has it."""
        return torch.unflatten(tensor, dim, (-1, 2)) if stack is ExpertStack.ALTERNATING else tensor

    num_experts, num_outputs, width = module.weight.shape
    if isinstance(module, QuantizedExperts):
        if module.weight_format.layout is not WeightLayout.MXFP4:
            raise _unsupported(module, name)
        groups, shape = module.groups, (num_experts, num_outputs, 2 * width // BLOCK_SIZE)

        def repack(blocks: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
            packed = torch.empty(module.weight.shape, dtype=torch.uint8, device=blocks.device)
            for expert, codes in enumerate(blocks):  # one by one, for codes alone take twice as much memory
                packed[expert] = groups.pack(block_codes(codes))
            return arranged(packed)

        yield f"{name}_blocks", Slot(target(module.weight), ((*shape, BLOCK_SIZE // 2),), _BYTES, repack)
        yield (
            f"{name}_scales",
            Slot(target(module.scales, 2), (shape,), _BYTES, lambda scales, _: arranged(scales.transpose(1, 2), 2)),
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


def _unsupported(module: QuantizedLinear | QuantizedExperts, name: str) -> ConfigError:
    layout = module.weight_format.layout
    return ConfigError(f"quantization_config: {name} in {layout} is not supported; use a checkpoint that ignores it")


def _part_of(
    module: QuantizedLinear | QuantizedExperts, destination: Destination, name: str, orders: dict[str, torch.Tensor]
) -> "_Part":
    """The rows of a projection, or of that of an expert, that a module of the checkpoint holds."""
    codes, groups, product = module.weight.detach(), module.groups, destination.module
    if destination.expert is not None:
        codes, groups = codes[destination.expert], groups.of_expert(destination.expert)
        product += f".{destination.expert}"
    if module.weight_format.layout is WeightLayout.MXFP4:
        raise _unsupported(module, name)
    rows, zeros = destination.rows, groups.zeros
    groups = replace(groups, scales=groups.scales[:, rows], zeros=None if zeros is None else zeros[:, rows])
    return _Part(codes[rows], groups, module.weight_format, product, name, orders, destination.arrange)


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of a quantized projection.

    Attributes:
        codes: of these rows.
        groups: what they mean.
        product: name of what is multiplied at once, of which they are a part.
        name: of the part in the checkpoint.
        orders: of the inputs of each product, as the first part to be read gave it.
        arrange: reorders the checkpoint's rows into the model's order; None if they are in this order already.
    """

    codes: torch.Tensor
    groups: WeightGroups
    weight_format: WeightFormat
    product: str
    name: str
    orders: dict[str, torch.Tensor]
    arrange: Callable[[torch.Tensor], torch.Tensor] | None = None

    def slots(self) -> Iterator[tuple[str, Slot]]:
        """The slots of all tensors but the bias, by the last part of their names."""
        match self.weight_format.layout:
            case WeightLayout.FP8:
                yield from self._fp8()
            case WeightLayout.PACKED:
                yield from self._packed()
            case WeightLayout.AWQ | WeightLayout.GPTQ as layout:
                yield from self._by_input(is_awq=layout is WeightLayout.AWQ)

    @property
    def _num_outputs(self) -> int:
        return len(self.codes)

    @property
    def _num_inputs(self) -> int:
        return self.codes.shape[1] * (1 if self.codes.dtype == FP8 else 2)

    def _rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """What has a row for each output, in the model's order."""
        return tensor if self.arrange is None else self.arrange(tensor)

    def _columns(self, tensor: torch.Tensor) -> torch.Tensor:
        """What has a column for each output, in the model's order."""
        return tensor if self.arrange is None else self.arrange(tensor.t()).t()

    def _fp8(self) -> Iterator[tuple[str, Slot]]:
        num_outputs, block_rows = self._num_outputs, self.weight_format.block_rows

        def arranged(codes: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
            return self._rows(codes.view(torch.uint8)).view(FP8)

        convert = None if self.arrange is None else arranged
        yield "weight", Slot(self.codes, (tuple(self.codes.shape),), frozenset({"F8_E4M3"}), convert)

        def spread(scales: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
            if block_rows is None:
                return self._columns(scales.float().reshape(1, -1).expand(1, num_outputs))
            blocks = scales.float().reshape(-1, len(self.groups.scales))
            return self._rows(blocks.repeat_interleave(block_rows, 0)[:num_outputs]).t()

        shapes: tuple[Shape, ...] = ((), (1,), (1, 1), (num_outputs,), (num_outputs, 1))
        if block_rows is not None:
            num_blocks, num_groups = -(-num_outputs // block_rows), len(self.groups.scales)
            shapes = (num_blocks, num_groups), (num_blocks, 1, num_groups, 1)  # as ModelOpt keeps the axes
        yield "weight_scale", Slot(self.groups.scales, shapes, convert=spread)
        for leaf in ("input_scale", "activation_scale"):
            yield leaf, _NOT_NEEDED

    def _packed(self) -> Iterator[tuple[str, Slot]]:
        num_outputs, num_inputs, num_groups = self._num_outputs, self._num_inputs, len(self.groups.scales)
        yield (
            "weight_packed",
            self._codes_slot(
                (num_outputs, -(-num_inputs // 8)), lambda packed: _nibbles(packed)[:, :num_inputs], "weight_g_idx"
            ),
        )
        yield (
            "weight_scale",
            Slot(self.groups.scales, ((num_outputs, num_groups),), convert=lambda scales, _: self._rows(scales).t()),
        )
        if self.groups.zeros is not None:
            yield "weight_zero_point", Slot(
                self.groups.zeros, ((-(-num_outputs // 8), num_groups),), _INTEGERS,
                lambda packed, _: self._columns(_nibbles(packed.t())[:, :num_outputs]),
            )  # fmt: skip
        yield "weight_g_idx", self._order_slot()
        for leaf in ("weight_shape", "input_scale"):
            yield leaf, _NOT_NEEDED

    def _by_input(self, *, is_awq: bool) -> Iterator[tuple[str, Slot]]:
        """AWQ and GPTQ: matrices stand the other way around, (in, out)."""
        num_outputs, num_inputs, num_groups = self._num_outputs, self._num_inputs, len(self.groups.scales)
        if is_awq:
            shape = num_inputs, num_outputs // 8
            yield "qweight", self._codes_slot(shape, lambda packed: _awq_nibbles(packed).t())
        else:
            shape = num_inputs // 8, num_outputs
            yield "qweight", self._codes_slot(shape, lambda packed: _nibbles(packed.t()), "g_idx")
            yield "g_idx", self._order_slot()
        yield (
            "scales",
            Slot(self.groups.scales, ((num_groups, num_outputs),), convert=lambda scales, _: self._columns(scales)),
        )
        assert self.groups.zeros is not None, "files of both always have them"
        unpack, offset = _awq_nibbles if is_awq else _nibbles, self.weight_format.zero_offset
        yield "qzeros", Slot(
            self.groups.zeros, ((num_groups, num_outputs // 8),), _INTEGERS,
            lambda packed, _: self._columns(unpack(packed) + offset),
        )  # fmt: skip

    def _codes_slot(
        self, shape: Shape, unpack: Callable[[torch.Tensor], torch.Tensor], order_leaf: str | None = None
    ) -> Slot:
        """Of the codes, which `unpack` brings to (out, in)."""
        has_order, span = self.groups.order is not None, self.groups.span

        def repack(packed: torch.Tensor, groups_of: torch.Tensor | None) -> torch.Tensor:
            codes = self._rows(unpack(packed))
            if has_order and groups_of is not None:
                codes = codes[:, self._order_of(groups_of).to(codes.device)]
            return pack(codes.contiguous(), span)

        companion = None if order_leaf is None else f"{self.name}.{order_leaf}"
        return Slot(self.codes, (shape,), _INTEGERS, repack, companion)

    def _order_slot(self) -> Slot:
        """Of what says which group an input belongs to."""
        num_inputs = self._num_inputs
        order = self.groups.order

        def check(groups_of: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
            found = self._order_of(groups_of)
            if order is None and not torch.equal(found, torch.arange(num_inputs, device=found.device)):
                raise CheckpointError(f"{self.name} has groups out of order, which desc_act or actorder does not say")
            # One step for all threads: parts are read by several.
            if not torch.equal(self.orders.setdefault(self.product, found), found):
                raise CheckpointError(
                    f"{self.name} has its inputs in another order than what it is multiplied together with, which is "
                    "not supported; quantize without desc_act"
                )
            return found.int()

        target = torch.empty(num_inputs, dtype=torch.int32) if order is None else order
        return Slot(target, ((num_inputs,),), _INTEGERS, check, is_optional=order is None)

    def _order_of(self, groups_of: torch.Tensor) -> torch.Tensor:
        """Columns of codes in the order of their groups."""
        size, num_groups = self.groups.size, len(self.groups.scales)
        counts = torch.bincount(groups_of.flatten().long().clamp(0, num_groups), minlength=num_groups)
        if len(counts) != num_groups or not bool((counts == size).all()):
            raise CheckpointError(f"{self.name} has groups of other sizes than group_size {size} in g_idx")
        return groups_of.argsort(stable=True)


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """The eight codes of each int32, along the last dimension, uint8."""
    bytes_ = packed.int().contiguous().view(torch.uint8)
    return torch.stack((bytes_ & 15, bytes_ >> 4), -1).flatten(-2)


def _awq_nibbles(packed: torch.Tensor) -> torch.Tensor:
    return _nibbles(packed).view(len(packed), -1, 8)[..., _AWQ_ORDER].flatten(-2)
