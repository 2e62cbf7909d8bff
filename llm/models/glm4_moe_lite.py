"""GLM-4.7-Flash: DeepSeek-V3's layers, in sizes of its own.

Keys of config.json are those of transformers' `Glm4MoeLiteForCausalLM`.
"""

from typing import Any

from llm.config import ModelConfig
from llm.errors import ConfigError
from llm.models.config_keys import ReadKeys, shown
from llm.models.deepseek import layer_weights, make_layers, read_latent_attention
from llm.models.family import Family
from llm.models.routed_keys import MTP, read_leading_dense_layers, read_routed_experts

_DEFAULTS: dict[str, Any] = {
    "rms_norm_eps": 1e-5, "kv_lora_rank": 512, "q_lora_rank": 768, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64,
    "v_head_dim": 256, "n_shared_experts": 1, "n_routed_experts": 64, "num_experts_per_tok": 4, "norm_topk_prob": True,
    "routed_scaling_factor": 1.8, "first_k_dense_replace": 1,
}  # fmt: skip
_KINDS = {"dense", "sparse"}


def _read_config(config: ReadKeys, name: str) -> ModelConfig:
    config.fill(_DEFAULTS)
    config.get("num_nextn_predict_layers")
    return ModelConfig(
        **read_latent_attention(config),
        **read_routed_experts(config, uses_sigmoid=True),
        architecture=name,
        dense_layers=_read_dense_layers(config),
    )


def _read_dense_layers(config: ReadKeys) -> tuple[int, ...]:
    """The layers without experts: `mlp_layer_types` says which, else they are the first ones."""
    leading = read_leading_dense_layers(config)
    kinds = config.get("mlp_layer_types")
    if kinds is None:
        return leading
    if len(kinds) != config["num_hidden_layers"] or not _KINDS.issuperset(kinds):
        raise ConfigError(f"mlp_layer_types ({shown(kinds)}) must hold dense or sparse for each layer; correct it")
    return tuple(i for i, kind in enumerate(kinds) if kind == "dense")


GLM4_MOE_LITE = Family(_read_config, make_layers, layer_weights, left_out=MTP, has_layers_behind=True)
