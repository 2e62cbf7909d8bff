"""GLM-4.5 to 4.7 (arXiv:2508.06471): attention that rotates half of each head, and experts chosen as in DeepSeek-V3.

Keys of config.json and names of weights follow transformers' `Glm4MoeForCausalLM`.
"""

from collections.abc import Mapping
from typing import Any

from llm.config import ModelConfig
from llm.models.attention_layer import attention_weights
from llm.models.config_keys import ReadKeys
from llm.models.family import Destination, Family, common_fields
from llm.models.llama import mlp_weights
from llm.models.qwen3_moe import experts_weights, make_layers, shared_expert_weights
from llm.models.routed_keys import MTP, read_leading_dense_layers, read_routed_experts

_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "partial_rotary_factor": 0.5,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
}


def _read_config(config: ReadKeys, name: str) -> ModelConfig:
    config.fill({**_DEFAULTS, "head_dim": config["hidden_size"] // config["num_attention_heads"]})
    config.get("num_nextn_predict_layers")
    return ModelConfig(
        **common_fields(config, has_partial_rope=True),
        **read_routed_experts(config, uses_sigmoid=True),
        architecture=name,
        qk_norm=config.get("use_qk_norm") or False,
        attention_bias=config.get("attention_bias") or False,
        dense_layers=read_leading_dense_layers(config),
    )


def feed_forward_weights(config: ModelConfig) -> dict[str, Destination]:
    """Destinations of the feed-forward of layers without experts, and of the experts of the others."""
    return {
        **mlp_weights(config, config.dense_layers),
        **experts_weights(config, "mlp", "gate_proj", "up_proj", "down_proj"),
        **(shared_expert_weights(config, "mlp.shared_experts", "") if config.shared_expert_size else {}),
    }


def _layer_weights(config: ModelConfig) -> Mapping[str, Destination]:
    return {**attention_weights(config), **feed_forward_weights(config)}


GLM4_MOE = Family(_read_config, make_layers, _layer_weights, left_out=MTP, has_layers_behind=True)
