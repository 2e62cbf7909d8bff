"""The slots of quantized weights, which differ by layout.

The layouts are those that AutoAWQ (gemm), AutoGPTQ and GPTQModel, compressed-tensors and transformers' fp8 write; they
pack eight codes of 4 bits into an int32, the first in the lowest bits, AWQ in an order of its own.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch

from llm.checkpoint.slots import INTEGERS, NOT_NEEDED, Shape, Slot
from llm.config import WeightFormat, WeightLayout
from llm.core.weight_groups import FP8, WeightGroups, pack
from llm.errors import CheckpointError, ConfigError
from llm.models.family import Destination
from llm.models.quantized import QuantizedExperts, QuantizedLinear

_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]
"""Where in an int32 AutoAWQ packs eight neighbouring outputs."""


def unsupported(module: QuantizedLinear | QuantizedExperts, name: str) -> ConfigError:
    """The error for a layout that a module of this name cannot have."""
    layout = module.weight_format.layout
    return ConfigError(f"quantization_config: {name} in {layout} is not supported; use a checkpoint that ignores it")


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """The rows of a quantized projection that one module of a checkpoint fills.

    Attributes:
        codes: codes of these rows, (out, in), or (out, in / 2) if two share a byte.
        groups: scales, zeros and order of the codes.
        product: name of the projection in the model that these rows are a part of.
        name: name of the module in the checkpoint.
        orders: for each product, the order of its inputs that the first of its modules gave.
        arrange: reorders the checkpoint's rows into the model's order; None if they are in this order already.
    """

    codes: torch.Tensor
    groups: WeightGroups
    weight_format: WeightFormat
    product: str
    name: str
    orders: dict[str, torch.Tensor]
    arrange: Callable[[torch.Tensor], torch.Tensor] | None = None

    @classmethod
    def of(
        cls,
        module: QuantizedLinear | QuantizedExperts,
        destination: Destination,
        name: str,
        orders: dict[str, torch.Tensor],
    ) -> Self:
        """The rows of a projection, or of that of an expert, that a module of the checkpoint holds.

        Raises:
            ConfigError: experts in MXFP4 are in stacks, and nothing else is.
        """
        codes, groups, product = module.weight.detach(), module.groups, destination.module
        if destination.expert is not None:
            codes, groups = codes[destination.expert], groups.of_expert(destination.expert)
            product += f".{destination.expert}"
        if module.weight_format.layout is WeightLayout.MXFP4:
            raise unsupported(module, name)
        rows, zeros = destination.rows, groups.zeros
        groups = replace(groups, scales=groups.scales[:, rows], zeros=None if zeros is None else zeros[:, rows])
        return cls(codes[rows], groups, module.weight_format, product, name, orders, destination.arrange)

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
        """A tensor with a row for each output, brought to the model's order of outputs."""
        return tensor if self.arrange is None else self.arrange(tensor)

    def _columns(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor with a column for each output, brought to the model's order of outputs."""
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
            yield leaf, NOT_NEEDED

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
                self.groups.zeros, ((-(-num_outputs // 8), num_groups),), INTEGERS,
                lambda packed, _: self._columns(_nibbles(packed.t())[:, :num_outputs]),
            )  # fmt: skip
        yield "weight_g_idx", self._order_slot()
        for leaf in ("weight_shape", "input_scale"):
            yield leaf, NOT_NEEDED

    def _by_input(self, *, is_awq: bool) -> Iterator[tuple[str, Slot]]:
        """The slots of AWQ and GPTQ, whose matrices are (in, out)."""
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
            self.groups.zeros, ((num_groups, num_outputs // 8),), INTEGERS,
            lambda packed, _: self._columns(unpack(packed) + offset),
        )  # fmt: skip

    def _codes_slot(
        self, shape: Shape, unpack: Callable[[torch.Tensor], torch.Tensor], order_leaf: str | None = None
    ) -> Slot:
        """The slot of the codes, which `unpack` brings to (out, in)."""
        has_order, span = self.groups.order is not None, self.groups.span

        def repack(packed: torch.Tensor, groups_of: torch.Tensor | None) -> torch.Tensor:
            codes = self._rows(unpack(packed))
            if has_order and groups_of is not None:
                codes = codes[:, self._order_of(groups_of).to(codes.device)]
            return pack(codes.contiguous(), span)

        companion = None if order_leaf is None else f"{self.name}.{order_leaf}"
        return Slot(self.codes, (shape,), INTEGERS, repack, companion)

    def _order_slot(self) -> Slot:
        """The slot of the tensor that says which group each input belongs to, (in,) int32."""
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
        return Slot(target, ((num_inputs,),), INTEGERS, check, is_optional=order is None)

    def _order_of(self, groups_of: torch.Tensor) -> torch.Tensor:
        """The inputs in the order of their groups, (in,) int64.

        Raises:
            CheckpointError: a group is smaller or larger than the configuration says.
        """
        size, num_groups = self.groups.size, len(self.groups.scales)
        counts = torch.bincount(groups_of.flatten().long().clamp(0, num_groups), minlength=num_groups)
        if len(counts) != num_groups or not bool((counts == size).all()):
            raise CheckpointError(f"{self.name} has groups of other sizes than group_size {size} in g_idx")
        return groups_of.argsort(stable=True)


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Unpack int32s (…, n), of eight codes each, to (…, 8 n) uint8."""
    bytes_ = packed.int().contiguous().view(torch.uint8)
    return torch.stack((bytes_ & 15, bytes_ >> 4), -1).flatten(-2)


def _awq_nibbles(packed: torch.Tensor) -> torch.Tensor:
    return _nibbles(packed).view(len(packed), -1, 8)[..., _AWQ_ORDER].flatten(-2)
