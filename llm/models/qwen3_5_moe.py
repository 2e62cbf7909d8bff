"""Qwen3.5 and 3.6 with experts, text: Qwen3.5's layers, and experts beside a shared one in all of them.

Released files hold the experts of a layer in one tensor for each projection; experts one by one are read too.
"""

from collections.abc import Mapping
from typing import Any

from llm.config import ModelConfig
from llm.errors import ConfigError
from llm.models.config_keys import ReadKeys, shown
from llm.models.family import Destination, Family, read_text_half
from llm.models.qwen3_5 import IMAGE_KEYS, MTP, delta_weights, hybrid_fields, make_layers, mixing_weights
from llm.models.qwen3_moe import experts_weights, shared_expert_weights

_DEFAULTS = {
    "num_key_value_heads": 2, "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}  # fmt: skip
"""What transformers takes for keys that are missing."""


def _read_config(config: ReadKeys, name: str) -> ModelConfig:
    if config.get("mlp_only_layers"):
        raise ConfigError(f"'mlp_only_layers' is {shown(config['mlp_only_layers'])}; only [] is supported")
    return ModelConfig(**shared_expert_fields(config, _DEFAULTS), architecture=name)


def _read_text_half(config: ReadKeys, name: str) -> ModelConfig:
    return read_text_half(config, name, _read_config, IMAGE_KEYS)


def shared_expert_fields(config: ReadKeys, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `ModelConfig` of such layers, experts and the shared one included.

    Args:
        defaults: values of keys that are missing.
    """
    config.fill(defaults)
    # Nobody asks for the width of a feed-forward where all layers have experts, and the key is not there then.
    config.fill({"intermediate_size": config["moe_intermediate_size"]})
    return {
        **hybrid_fields(config),
        "num_experts": config["num_experts"],
        "num_experts_per_token": config["num_experts_per_tok"],
        "expert_size": config["moe_intermediate_size"],
        "shared_expert_size": config["shared_expert_intermediate_size"],
        "shared_expert_gate": True,
    }


def mixture_weights(config: ModelConfig) -> dict[str, Destination]:
    """Destinations of the experts and of the shared one."""
    return {
        **experts_weights(config, "mlp", "gate_proj", "up_proj", "down_proj"),
        **shared_expert_weights(config, "mlp.shared_expert", "mlp.shared_expert_gate"),
    }


def _layer_weights(config: ModelConfig) -> Mapping[str, Destination]:
    return {**mixing_weights(config), **delta_weights(config), **mixture_weights(config)}


QWEN3_5_MOE = Family(_read_config, make_layers, _layer_weights, left_out=MTP)
QWEN3_5_MOE_TEXT_HALF = Family(_read_text_half, make_layers, _layer_weights, left_out=f"images, videos and {MTP}")
