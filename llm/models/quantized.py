"""Projections whose weights are stored in 8 or 4 bits."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from llm.config import ModelConfig, WeightFormat, WeightLayout
from llm.core.weight_groups import FP8, MIDDLE, WeightGroups, dequantize, mxfp4_span_of, span_of
from llm.errors import ConfigError
from llm.models.delta import ExactLinear
from llm.models.experts import ExpertProjections
from llm.models.lora import replace_module

_STD = 0.02
"""Standard deviation of random weights."""
_CODES_STD = {8: 1.0, 4: 4.6}
"""That of random codes."""
_MXFP4_SCALE = 120
"""Code of the power of two that makes random codes of MXFP4 as wide: their standard deviation is 2.7."""
_MULTIPLE = 16
"""Sizes that the vendor's products of 8 bits take are multiples of this."""


class _Codes(nn.Module):
    """What projections in codes have in common.

    Attributes:
        weight: (…, out, in) E4M3, or (…, out, in // 2) uint8, two codes a byte.
        bias: (…, out), or None for none.
        scales, zeros, order: see `WeightGroups`.
        weight_format: of the codes.
        group_size: inputs that share a scale.
    """

    weight: Any
    bias: Any
    zeros: nn.Parameter | None
    order: nn.Parameter | None

    def _make(self, sizes: Sequence[int], weight_format: WeightFormat) -> None:
        """Make the parameters but the bias, on the meta device, of a weight of these sizes."""
        *stack, num_outputs, num_inputs = sizes
        num_bits = weight_format.num_bits
        self.weight_format = weight_format
        self.group_size = weight_format.group_size or num_inputs
        is_mxfp4 = weight_format.layout is WeightLayout.MXFP4
        self._span = mxfp4_span_of(num_inputs) if is_mxfp4 else span_of(num_inputs, self.group_size, num_bits)
        num_groups = -(-num_inputs // self.group_size)

        def constant(*shape: int, dtype: torch.dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(*stack, *shape, dtype=dtype, device="meta"), requires_grad=False)

        self.weight = (
            constant(num_outputs, num_inputs, dtype=FP8)
            if num_bits == 8
            else constant(num_outputs, num_inputs // 2, dtype=torch.uint8)
        )
        self.scales = constant(num_groups, num_outputs, dtype=torch.uint8 if is_mxfp4 else torch.float32)
        self.zeros = constant(num_groups, num_outputs, dtype=torch.uint8) if weight_format.has_zeros else None
        # In a single group, which -1 means, every order is the same.
        has_order = weight_format.has_order and num_groups > 1
        self.order = constant(num_inputs, dtype=torch.int32) if has_order else None

    @property
    def groups(self) -> WeightGroups:
        """What the codes mean."""
        return WeightGroups(self.scales, self.zeros, self.order, self.group_size, self._span)

    @property
    def row_scales(self) -> torch.Tensor | None:
        """The scale of each output, (…, out) float32, where that is all that the codes need; None elsewhere."""
        has_one_each = self.weight.dtype == FP8 and self.scales.shape[-2] == 1
        fits = not any(size % _MULTIPLE for size in self.weight.shape[-2:])
        return self.scales[..., 0, :] if has_one_each and fits else None

    @torch.no_grad()
    def simplify(self) -> None:
        """Keep no zeros that say nothing, and scales of groups in 16 bits where that loses nothing.

        They are read with every product.
        """
        if self.zeros is not None and bool((self.zeros == MIDDLE).all()):
            self.zeros = None
        if self.row_scales is not None or not self.scales.is_floating_point():
            return
        for dtype in (torch.float16, torch.bfloat16):
            short = self.scales.to(dtype)
            if torch.equal(short.to(self.scales.dtype), self.scales):
                self.scales = nn.Parameter(short, requires_grad=False)
                return

    def join(self) -> None:
        """Put scales and zeros of codes of 4 bits into one tensor, as kernels read them, where they fit."""
        if self.weight.dtype == torch.uint8:
            self._keep(self.groups.joined())

    @torch.no_grad()
    def multiply_outputs(self, factors: torch.Tensor) -> None:
        """Multiply each output's weights with a factor of (out,) float32."""
        groups = self.groups.apart()
        self._keep(replace(groups, scales=groups.scales.float() * factors))
        self.simplify()

    def _keep(self, groups: WeightGroups) -> None:
        scales, zeros = groups.scales, groups.zeros
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.zeros = None if zeros is None else nn.Parameter(zeros, requires_grad=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill in random weights, for speed tests only; does nothing before memory is allocated."""
        if not hasattr(self, "scales") or self.weight.is_meta:
            return
        if self.weight.dtype == FP8:
            for part in self.weight.flatten(0, -3) if self.weight.dim() > 2 else self.weight[None]:
                part.copy_(torch.randn(part.shape, device=part.device))
        else:
            self.weight.random_(0, 256)
        if self.groups.is_mxfp4:
            self.scales.fill_(_MXFP4_SCALE)
        else:
            self.scales.fill_(2.0 ** round(math.log2(_STD / _CODES_STD[self.weight_format.num_bits])))
        if self.zeros is not None:
            self.zeros.random_(6, 10)
        if self.order is not None:
            self.order.copy_(torch.arange(self.order.shape[-1]))
        if self.bias is not None:
            self.bias.zero_()
        self.simplify()


class QuantizedLinear(_Codes, nn.Linear):
    """A projection whose weight is stored as codes. In plain PyTorch, every product dequantizes them again.

    Args:
        num_inputs, num_outputs: sizes of the plain projection.
        weight_format: format of the codes.
        has_bias: whether there is a bias, in `dtype`.
        dtype: data type of the bias and the activations.
    """

    def __init__(
        self, num_inputs: int, num_outputs: int, weight_format: WeightFormat, *, has_bias: bool, dtype: torch.dtype
    ) -> None:
        nn.Linear.__init__(self, num_inputs, num_outputs, has_bias, device="meta", dtype=dtype)
        self._make((num_outputs, num_inputs), weight_format)

    def dequantized(self) -> torch.Tensor:
        """The dequantized weight, (out, in) float32."""
        return dequantize(self.weight, self.groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, in) → (…, out)."""
        return F.linear(x, self.dequantized().to(x.dtype), self.bias)


class QuantizedExperts(_Codes, ExpertProjections):
    """One projection of each expert, in codes: what is (out, in) of a `QuantizedLinear` is (experts, out, in) here.

    Args:
        num_experts, num_inputs, num_outputs: as those of the plain projections.
        weight_format, has_bias, dtype: see `QuantizedLinear`.
    """

    def __init__(
        self,
        num_experts: int,
        num_inputs: int,
        num_outputs: int,
        weight_format: WeightFormat,
        *,
        has_bias: bool,
        dtype: torch.dtype,
    ) -> None:
        with torch.device("meta"):
            ExpertProjections.__init__(self, num_experts, num_inputs, num_outputs, has_bias=has_bias)
        self.to(dtype)
        self._make((num_experts, num_outputs, num_inputs), weight_format)

    def dequantized(self, expert: int) -> torch.Tensor:
        """The dequantized weight of one expert, (out, in) float32."""
        return dequantize(self.weight[expert], self.groups.of_expert(expert))

    def forward(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """(…, in) → (…, out), by one expert."""
        bias = None if self.bias is None else self.bias[expert]
        return F.linear(x, self.dequantized(expert).to(x.dtype), bias)


Quantized = QuantizedLinear | QuantizedExperts


def quantized_modules(model: nn.Module) -> Iterator[tuple[str, Quantized]]:
    """The projections in codes, by their names in the model."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Quantized))


def use_formats(model: nn.Module, config: ModelConfig, sources: dict[str, list[str]], dtype: torch.dtype) -> None:
    """Give the projections of a model on the meta device the formats that their parts have in the checkpoint.

    Args:
        sources: the checkpoint's names of the parts that each module of the model consists of.
        dtype: of the activations.

    Raises:
        ConfigError: the parts of one product have different formats, or a format does not fit a shape.
    """
    if config.quantization is None:
        return
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear | ExpertProjections) or name not in sources:
            continue
        first, *others = (config.quantization.format_of(part) for part in sources[name])
        if any(other != first for other in others):
            raise ConfigError(
                f"quantization_config: {', '.join(sources[name])} are one product here and must have one format; "
                "quantize or ignore all of them"
            )
        if first is not None and isinstance(module, ExactLinear):
            raise ConfigError(
                f"quantization_config: {sources[name][0]} is quantized, which is not supported for a projection that "
                "decides what a state keeps; use a checkpoint that ignores it"
            )
        if first is not None and isinstance(module, nn.Linear):
            _check(first, module, sources[name][0])
            has_bias = module.bias is not None
            quantized = QuantizedLinear(module.in_features, module.out_features, first, has_bias=has_bias, dtype=dtype)
            replace_module(model, name, quantized)
        if first is not None and isinstance(module, ExpertProjections):
            _check(first, module, sources[name][0])
            num_experts, num_outputs, num_inputs = module.weight.shape
            has_bias = module.bias is not None
            stack = QuantizedExperts(num_experts, num_inputs, num_outputs, first, has_bias=has_bias, dtype=dtype)
            replace_module(model, name, stack)


def _check(weight_format: WeightFormat, module: nn.Linear | ExpertProjections, name: str) -> None:
    if name in ("lm_head", "score"):
        raise ConfigError(f"quantization_config: a quantized {name} is not supported; use a checkpoint that ignores it")
    num_inputs = module.weight.shape[-1]
    if weight_format.num_bits == 4 and (num_inputs % (weight_format.group_size or 8) or num_inputs % 8):
        raise ConfigError(
            f"quantization_config: {name} has {num_inputs} inputs, which are not whole groups of "
            f"group_size {weight_format.group_size}; quantize with another one, or use fewer GPUs a model"
        )
