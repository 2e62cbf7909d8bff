"""The first half of most families' layers: a norm, then grouped-query attention."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from llm.attention.rope import RotaryEmbedding
from llm.attention.spec import AttentionSpec
from llm.config import ModelConfig
from llm.models.family import Destination, Layer
from llm.models.layers import RMSNorm
from llm.models.operations import Operations


class AttentionLayer(Layer):
    """Attention, and the norm before the feed-forward. Each family's layers add the feed-forward itself.

    Args:
        index: index of the layer, from 0.
        rope: the model's rotary embedding.
    """

    def __init__(self, config: ModelConfig, index: int, rope: RotaryEmbedding) -> None:
        super().__init__()
        self.index = index
        self.spec = spec = AttentionSpec(
            config.num_heads, config.kv_heads, config.head_size, rope, config.layer_window(index),
            config.attention_scale, config.attention_soft_cap, config.attention_sinks,
        )  # fmt: skip
        hidden_size, norm = config.hidden_size, make_norm(config)
        self.attention_norm = norm(hidden_size)
        self.qkv_proj = nn.Linear(hidden_size, spec.qkv_size, bias=config.attention_bias)
        self.q_norm = norm(spec.head_dim) if config.qk_norm else None
        self.k_norm = norm(spec.head_dim) if config.qk_norm else None
        self.sinks = nn.Parameter(torch.empty(config.num_heads)) if config.attention_sinks else None
        self.o_proj = nn.Linear(spec.output_size, hidden_size, bias=config.attention_output_bias)
        self.mlp_norm = norm(hidden_size)

    def add_attention(self, operations: Operations[Any], norm_behind: RMSNorm | None = None) -> None:
        """Add the output of attention, normalized by `norm_behind` if there is one, to the residual stream."""
        qk_norms = None if self.q_norm is None or self.k_norm is None else (self.q_norm, self.k_norm)
        qkv = operations.product_of_norm(self.attention_norm, self.qkv_proj)
        attended = operations.attend(self.index, self.spec, qkv, qk_norms, self.sinks)
        operations.add_product(attended, self.o_proj, norm_behind)


def make_norm(config: ModelConfig) -> Callable[[int], RMSNorm]:
    """A function that makes one of the model's norms, given its size."""
    return partial(RMSNorm, eps=config.rms_norm_eps, offset=config.norm_offset)


def make_rope(config: ModelConfig) -> RotaryEmbedding:
    """The rotary embedding that all layers of a model share."""
    return RotaryEmbedding(config.rotary_size, config.max_seq_len, config.rope_theta, config.rope_scaling)


def attention_weights(config: ModelConfig) -> dict[str, Destination]:
    """Destinations of a checkpoint's modules within an `AttentionLayer`."""
    query, key_value = config.num_heads * config.head_size, config.kv_heads * config.head_size
    same = [*(["q_norm", "k_norm"] if config.qk_norm else []), *(["sinks"] if config.attention_sinks else [])]
    return {
        "input_layernorm": Destination("attention_norm"),
        "self_attn.q_proj": Destination("qkv_proj", slice(0, query)),
        "self_attn.k_proj": Destination("qkv_proj", slice(query, query + key_value)),
        "self_attn.v_proj": Destination("qkv_proj", slice(query + key_value, query + 2 * key_value)),
        **{f"self_attn.{name}": Destination(name) for name in same},
        "self_attn.o_proj": Destination("o_proj"),
        "post_attention_layernorm": Destination("mlp_norm"),
    }
