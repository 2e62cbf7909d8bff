"""A `DecoderModel`'s weights in 8 bits, rounded at start."""

import torch
from torch import nn

from llm.config import WeightFormat, WeightLayout
from llm.kernels.quantization import quantize_weight
from llm.models.decoder import DecoderModel
from llm.models.delta import ExactLinear
from llm.models.experts import ExpertProjections
from llm.models.latent import LatentHeads
from llm.models.lora import replace_module
from llm.models.quantized import Quantized, QuantizedExperts, QuantizedLinear, quantized_modules

_MULTIPLE = 16
"""Sizes that 8-bit products of many rows take are multiples of this (`torch._scaled_mm`)."""
_BY_ROW = WeightFormat(layout=WeightLayout.FP8)


@torch.no_grad()
def quantize_weights(model: DecoderModel) -> None:
    """Round the weights of all layers' projections to 8 bits. Projections that are already quantized do not change.

    These keep their format: embeddings, norms, routers of experts, projections that decide decays, projections from
    latents to keys and values, biases, the output head, and projections with a size that is not a multiple of 16.
    Weights are rounded one at a time, so that memory never holds more than one of them in both formats.
    """
    unpacked = {heads.kv_proj for heads in model.modules() if isinstance(heads, LatentHeads)}
    for name, projection in list(model.layers.named_modules()):
        if not isinstance(projection, nn.Linear | ExpertProjections) or isinstance(projection, Quantized):
            continue
        if projection in unpacked:
            continue
        is_exact = isinstance(projection, ExactLinear)
        if is_exact or any(size % _MULTIPLE for size in projection.weight.shape[-2:]):
            continue
        replace_module(model.layers, name, _quantized(projection))


def is_rounded(model: DecoderModel) -> bool:
    """Whether `quantize_weights` has changed the model, whose checkpoint holds plain numbers."""
    return model.config.quantization is None and any(quantized_modules(model))


def _quantized(projection: nn.Linear | ExpertProjections) -> Quantized:
    weight, scales = quantize_weight(projection.weight)
    *stack, num_outputs, num_inputs = weight.shape
    bias, dtype = projection.bias, projection.weight.dtype
    has_bias = bias is not None
    quantized: Quantized
    if isinstance(projection, nn.Linear):
        quantized = QuantizedLinear(num_inputs, num_outputs, _BY_ROW, has_bias=has_bias, dtype=dtype)
    else:
        quantized = QuantizedExperts(stack[0], num_inputs, num_outputs, _BY_ROW, has_bias=has_bias, dtype=dtype)
    quantized.weight = nn.Parameter(weight, requires_grad=False)
    quantized.scales = nn.Parameter(scales.unsqueeze(-2), requires_grad=False)
    quantized.bias = bias
    return quantized
