"""Qwen3-Next: Qwen3.5's layers and experts under older names of weights.

What a delta-net's first projections give comes key head by key head: the head's query, key, values and output gates,
and its shares and decays. Names and order are those of transformers' `Qwen3NextForCausalLM`.
"""

from collections.abc import Mapping, Sequence

import torch

from llm.config import ModelConfig
from llm.errors import ConfigError
from llm.models.config_keys import ReadKeys
from llm.models.family import Destination, Family
from llm.models.llama import mlp_weights
from llm.models.qwen3_5 import MTP, make_layers, mixer_weights, mixing_weights
from llm.models.qwen3_5_moe import mixture_weights, shared_expert_fields
from llm.models.qwen3_moe import read_dense_layers

_DEFAULTS = {
    "num_key_value_heads": 2, "num_experts": 512, "num_experts_per_tok": 10, "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512, "norm_topk_prob": True,
}  # fmt: skip
"""What transformers takes for keys that are missing."""


def _read_config(config: ReadKeys, name: str) -> ModelConfig:
    if config.get("use_sliding_window"):
        raise ConfigError("'use_sliding_window' is True; this architecture has no windows, only False is supported")
    return ModelConfig(
        **shared_expert_fields(config, _DEFAULTS),
        architecture=name,
        normalize_expert_weights=config["norm_topk_prob"],
        dense_layers=read_dense_layers(config),
    )


def _layer_weights(config: ModelConfig) -> Mapping[str, Destination]:
    return {
        **mixing_weights(config),
        **_delta_weights(config),
        **mlp_weights(config, config.dense_layers),
        **mixture_weights(config),
    }


def _delta_weights(config: ModelConfig) -> dict[str, Destination]:
    """Destinations in layers with a gated delta rule."""
    delta = config.delta
    if delta is None:
        return {}
    num_groups, layers = delta.num_key_heads, delta.layers
    heads = delta.num_value_heads // num_groups
    values = heads * delta.value_dim
    return {
        **mixer_weights(config),
        "linear_attn.in_proj_qkvz": Destination(
            "mixed_proj",
            layers=layers,
            arrange=lambda rows: _by_part(rows, num_groups, [delta.key_dim, delta.key_dim, values, values]),
        ),
        "linear_attn.in_proj_ba": Destination(
            "decay_proj",
            slice(0, 2 * delta.num_value_heads),
            layers=layers,
            arrange=lambda rows: _by_part(rows, num_groups, [heads, heads]),
        ),
    }


def _by_part(rows: torch.Tensor, num_groups: int, sizes: Sequence[int]) -> torch.Tensor:
    """Rows that come group by group, in each group so many of every part, ordered part by part."""
    groups = rows.reshape(num_groups, -1, *rows.shape[1:])
    return torch.cat([part.flatten(0, 1) for part in groups.split_with_sizes(list(sizes), dim=1)])


QWEN3_NEXT = Family(_read_config, make_layers, _layer_weights, left_out=MTP)
