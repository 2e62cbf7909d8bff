"""A checkpoint's scales for 8-bit keys and values (compressed-tensors' `kv_cache_scheme`).

Numbers are divided by the scales before they enter the cache and multiplied by them afterward. The weights around the
cache do both: those of keys and queries for keys, those of values and of attention's output for values. The cache and
the kernels need not know the scales. They are rounded up to powers of two, which change no digit of a weight, and at
most the last digit of a number stored in 8 bits.
"""

import torch
from torch import nn

from llm.models.decoder import DecoderModel
from llm.models.family import Layer
from llm.models.quantized import QuantizedLinear


@torch.no_grad()
def fold_cache_scales(model: DecoderModel) -> None:
    """Fold the model's `cache_scales` into its weights; calling it again changes nothing.

    Keys that are normalized in each head stay unchanged: they fit the cache.
    """
    if model.cache_scales is None:
        return
    for layer, (key, value) in zip(model.layers, model.cache_scales.log2().ceil().exp2().tolist(), strict=True):
        assert isinstance(layer, Layer), "they all are"
        if layer.delta_spec is not None:
            continue  # it has no keys and values
        spec, qkv, output = layer.spec, layer.get_submodule("qkv_proj"), layer.get_submodule("o_proj")
        assert isinstance(qkv, nn.Linear), "a projection"
        assert isinstance(output, nn.Linear), "a projection"
        factors = torch.ones(spec.qkv_size, device=qkv.weight.device)
        size = spec.num_kv_heads * spec.head_dim
        if getattr(layer, "k_norm", None) is None:
            factors[: spec.output_size] = key
            factors[-2 * size : -size] = 1 / key
        factors[-size:] = 1 / value
        _multiply(qkv, factors)
        if qkv.bias is not None:
            qkv.bias.mul_(factors)
        _multiply(output, torch.full((output.out_features,), value, device=factors.device))
    model.cache_scales.fill_(1)


def _multiply(projection: nn.Linear, factors: torch.Tensor) -> None:
    """Multiply the rows of a weight."""
    if isinstance(projection, QuantizedLinear):
        projection.multiply_outputs(factors)
    else:
        projection.weight.mul_(factors[:, None])
