"""A `DecoderModel`'s weights in 8 bits, rounded at start."""

from typing import cast

import torch
from torch import nn

from llm.config import WeightFormat, WeightLayout
from llm.kernels.quantization import FP8, quantize_weight
from llm.models.decoder import DecoderModel
from llm.models.delta import ExactLinear
from llm.models.experts import ExpertProjections
from llm.models.latent import LatentHeads
from llm.models.lora import replace_module
from llm.models.quantized import QuantizedLinear, quantized_modules

_MULTIPLE = 16
"""Sizes that 8-bit products of many rows take are multiples of this (`torch._scaled_mm`)."""
_BY_ROW = WeightFormat(layout=WeightLayout.FP8)


@torch.no_grad()
def quantize_weights(model: DecoderModel) -> None:
    """Round the weights of all layers' projections to 8 bits; those that are already stay as they are.

    Embeddings, norms, routers of experts, what decides decays, what makes keys and values of latents, biases and the
    output head keep their format, and so do projections with a size that is not a multiple of 16. One weight at a time,
    so that memory never holds more than one of them in both formats. After this only `KernelOperations` can run a model
    with experts.
    """
    unpacked = {heads.kv_proj for heads in model.modules() if isinstance(heads, LatentHeads)}
    for name, projection in list(model.layers.named_modules()):
        if not isinstance(projection, nn.Linear | ExpertProjections) or _is_rounded(projection):
            continue
        if projection in unpacked:
            continue
        is_exact = isinstance(projection, ExactLinear)
        if is_exact or any(size % _MULTIPLE for size in projection.weight.shape[-2:]):
            continue
        weight, scales = quantize_weight(projection.weight)
        if isinstance(projection, ExpertProjections):
            projection.weight = nn.Parameter(weight, requires_grad=False)
            projection.register_buffer("weight_scales", scales, persistent=False)
        else:
            replace_module(model.layers, name, _quantized(projection, weight, scales))


def is_rounded(model: DecoderModel) -> bool:
    """Whether `quantize_weights` has changed the model, whose checkpoint holds plain numbers."""
    rounded = any(isinstance(module, ExpertProjections) and _is_rounded(module) for module in model.layers.modules())
    return rounded or (model.config.quantization is None and any(quantized_modules(model)))


def expert_scales(projection: ExpertProjections) -> torch.Tensor | None:
    """Scale of each output of each expert's 8-bit weight, (experts, out) float32; None for other weights."""
    return cast(torch.Tensor, projection.weight_scales) if _is_rounded(projection) else None


def _is_rounded(projection: nn.Linear | ExpertProjections) -> bool:
    return isinstance(projection, QuantizedLinear) or projection.weight.dtype == FP8


def _quantized(projection: nn.Linear, weight: torch.Tensor, scales: torch.Tensor) -> QuantizedLinear:
    (num_outputs, num_inputs), bias = projection.weight.shape, projection.bias
    dtype = projection.weight.dtype
    quantized = QuantizedLinear(num_inputs, num_outputs, _BY_ROW, has_bias=bias is not None, dtype=dtype)
    quantized.weight = nn.Parameter(weight, requires_grad=False)
    quantized.scales = nn.Parameter(scales[None], requires_grad=False)
    quantized.bias = bias
    return quantized
