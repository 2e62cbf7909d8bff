"""Mixtral (Jiang et al. 2024, arXiv:2401.04088): Mistral's attention, and experts in every layer."""

from collections.abc import Mapping

from llm.config import ModelConfig
from llm.models.attention_layer import attention_weights
from llm.models.config_keys import ReadKeys
from llm.models.family import Destination, Family, common_fields
from llm.models.qwen3_moe import experts_weights, make_layers
from llm.models.window_keys import read_windows


def _read_config(config: ReadKeys, name: str) -> ModelConfig:
    config.fill({"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6})
    window_size, window_layers = read_windows(config)
    config.get("router_jitter_noise")  # of training
    fields = common_fields(config)
    return ModelConfig(
        **fields,
        architecture=name,
        window_size=window_size,
        window_layers=window_layers,
        num_experts=config["num_local_experts"],
        num_experts_per_token=config["num_experts_per_tok"],
        expert_size=fields["intermediate_size"],
    )


def _layer_weights(config: ModelConfig) -> Mapping[str, Destination]:
    return attention_weights(config) | experts_weights(config, "block_sparse_moe", "w1", "w3", "w2")


# transformers 5 calls the experts and their router as all its models do.
MIXTRAL = Family(_read_config, make_layers, _layer_weights, renamed={"mlp": "block_sparse_moe"})
