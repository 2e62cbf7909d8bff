"""A `DecoderModel`'s weights in 8 bits, for `KernelOperations`."""

from typing import cast

import torch
from torch import nn

from llm.kernels.quantization import FP8, quantize_weight
from llm.models.decoder import DecoderModel
from llm.models.experts import ExpertProjections

_MULTIPLE = 16
"""Sizes that 8-bit products of many rows take are multiples of this (`torch._scaled_mm`)."""


@torch.no_grad()
def quantize_weights(model: DecoderModel) -> None:
    """Round the weights of all layers' projections to 8 bits in place; those that are already stay as they are.

    Embeddings, norms, routers of experts, biases and the output head keep their format, and so do projections with a
    size that is not a multiple of 16. One weight at a time, so that memory never holds more than one of them in both
    formats. After this only `KernelOperations` can run the model.
    """
    for projection in _projections(model):
        if projection.weight.dtype == FP8 or any(size % _MULTIPLE for size in projection.weight.shape[-2:]):
            continue
        weight, scales = quantize_weight(projection.weight)
        projection.weight = nn.Parameter(weight, requires_grad=False)
        projection.register_buffer("weight_scales", scales, persistent=False)


def is_quantized(model: DecoderModel) -> bool:
    """Whether `quantize_weights` has changed the model."""
    return any(projection.weight.dtype == FP8 for projection in _projections(model))


def weight_scales(projection: nn.Linear | ExpertProjections) -> torch.Tensor | None:
    """Scale of each output of an 8-bit weight, (…, out) float32; None for other weights."""
    return cast(torch.Tensor, projection.weight_scales) if projection.weight.dtype == FP8 else None


def _projections(model: DecoderModel) -> list[nn.Linear | ExpertProjections]:
    return [module for module in model.layers.modules() if isinstance(module, nn.Linear | ExpertProjections)]
