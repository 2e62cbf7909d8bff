"""Projections whose weights are stored in 8 or 4 bits."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from llm.config import ModelConfig, WeightFormat
from llm.core.mxfp4 import BLOCK_SIZE
from llm.core.weight_groups import FP8, MIDDLE, WeightGroups, dequantize, span_of
from llm.errors import ConfigError
from llm.models.delta import ExactLinear
from llm.models.experts import ExpertProjections
from llm.models.lora import replace_module

_STD = 0.02
"""Standard deviation of random weights."""
_CODES_STD = {8: 1.0, 4: 4.6}
"""That of random codes."""


class QuantizedLinear(nn.Linear):
    """A projection in codes; in plain PyTorch it multiplies with what they mean, worked out anew each time.

    Args:
        num_inputs, num_outputs: as those of the plain projection.
        weight_format: of the codes.
        has_bias: whether there is one, in `dtype`.
        dtype: of bias and activations.

    Attributes:
        weight: (out, in) E4M3, or (out, in // 2) uint8, two codes a byte.
        scales, zeros, order: see `WeightGroups`.
    """

    def __init__(
        self, num_inputs: int, num_outputs: int, weight_format: WeightFormat, *, has_bias: bool, dtype: torch.dtype
    ) -> None:
        super().__init__(num_inputs, num_outputs, has_bias, device="meta", dtype=dtype)
        num_bits = weight_format.num_bits
        self.weight_format = weight_format
        self.group_size = weight_format.group_size or num_inputs
        self._span = span_of(num_inputs, self.group_size, num_bits)
        num_groups = -(-num_inputs // self.group_size)

        def constant(*shape: int, dtype: torch.dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, dtype=dtype, device="meta"), requires_grad=False)

        self.weight = (
            constant(num_outputs, num_inputs, dtype=FP8)
            if num_bits == 8
            else constant(num_outputs, num_inputs // 2, dtype=torch.uint8)
        )
        self.scales = constant(num_groups, num_outputs, dtype=torch.float32)
        self.zeros = constant(num_groups, num_outputs, dtype=torch.uint8) if weight_format.has_zeros else None
        self.order = constant(num_inputs, dtype=torch.int32) if weight_format.has_order else None

    @property
    def groups(self) -> WeightGroups:
        """What the codes mean."""
        return WeightGroups(self.scales, self.zeros, self.order, self.group_size, self._span)

    @property
    def row_scales(self) -> torch.Tensor | None:
        """The scale of each output, (out,) float32, where that is all that the codes need; None elsewhere."""
        has_one_each = self.weight.dtype == FP8 and len(self.scales) == 1
        fits = self.in_features % 16 == 0 and self.out_features % 16 == 0  # what the vendor's products of 8 bits take
        return self.scales[0] if has_one_each and fits else None

    @torch.no_grad()
    def simplify(self) -> None:
        """Keep no zeros that say nothing, and scales of groups in 16 bits where that loses nothing.

        They are read with every product.
        """
        if self.zeros is not None and bool((self.zeros == MIDDLE).all()):
            self.zeros = None
        if self.row_scales is not None:
            return
        for dtype in (torch.float16, torch.bfloat16):
            short = self.scales.to(dtype)
            if torch.equal(short.to(self.scales.dtype), self.scales):
                self.scales = nn.Parameter(short, requires_grad=False)
                return

    def dequantized(self) -> torch.Tensor:
        """The weight (out, in) that is meant, in float32."""
        return dequantize(self.weight, self.groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, in) → (…, out)."""
        return F.linear(x, self.dequantized().to(x.dtype), self.bias)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random weights, for speed alone; does nothing before there is memory."""
        if self.weight.is_meta or not hasattr(self, "scales"):
            return
        if self.weight.dtype == FP8:
            self.weight.copy_(torch.randn(self.weight.shape, device=self.weight.device))
        else:
            self.weight.random_(0, 256)
        self.scales.fill_(2.0 ** round(math.log2(_STD / _CODES_STD[self.weight_format.num_bits])))
        if self.zeros is not None:
            self.zeros.random_(6, 10)
        if self.order is not None:
            self.order.copy_(torch.arange(len(self.order)))
        if self.bias is not None:
            self.bias.zero_()
        self.simplify()


def quantized_modules(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """The projections in codes, by their names in the model."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, QuantizedLinear))


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
        if first is not None and first.is_unpacked and not module.weight.shape[-1] % BLOCK_SIZE:
            continue
        if first is not None and isinstance(module, ExpertProjections):
            raise ConfigError(
                f"quantization_config: quantized experts ({sources[name][0]}) are not supported; use the checkpoint in "
                "bfloat16, with quantization: fp8 where memory is short"
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


def _check(weight_format: WeightFormat, module: nn.Linear, name: str) -> None:
    if name == "lm_head":
        raise ConfigError("quantization_config: a quantized lm_head is not supported; use a checkpoint that ignores it")
    if weight_format.num_bits == 4 and (module.in_features % (weight_format.group_size or 8) or module.in_features % 8):
        raise ConfigError(
            f"quantization_config: {name} has {module.in_features} inputs, which are no whole groups of "
            f"group_size {weight_format.group_size}; quantize with another group_size"
        )
