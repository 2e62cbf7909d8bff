"""gpt-oss (OpenAI 2025, arXiv:2508.10925): sinks, a window in every other layer, experts with biases in all.

Keys of config.json and names of weights are those of transformers' `GptOssForCausalLM`.
"""

from collections.abc import Mapping
from typing import Any

from llm.config import ModelConfig
from llm.errors import ConfigError
from llm.models.attention_layer import attention_weights
from llm.models.config_keys import ReadKeys, shown
from llm.models.family import Destination, ExpertStack, Family, common_fields
from llm.models.qwen3_moe import make_layers
from llm.models.window_keys import read_windows

_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 8,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
    "sliding_window": 128,
    "num_experts_per_tok": 4,
}
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _read_config(config: ReadKeys, name: str) -> ModelConfig:
    config.fill(_DEFAULTS)
    if not any(key in config for key in ("rope_parameters", "rope_scaling")):
        config.fill({"rope_parameters": _YARN, "rope_scaling": _YARN})  # one of them may be null
    window_size, window_layers = read_windows(config, pattern=2)
    has_bias = config.get("attention_bias", True)
    fields = common_fields(config)
    scaling = fields["rope_scaling"]
    per_token = config["num_experts_per_tok"]
    _require_same(config, "experts_per_token", per_token)
    if scaling is not None:
        _require_same(config, "initial_context_length", scaling.original_max_position_embeddings)
    return ModelConfig(
        **fields,
        architecture=name,
        norm_offset=0.0,
        window_size=window_size,
        window_layers=window_layers,
        attention_sinks=True,
        attention_bias=has_bias,
        attention_output_bias=has_bias,
        num_experts=config["num_local_experts"],
        num_experts_per_token=per_token,
        expert_size=fields["intermediate_size"],
        expert_bias=True,
        swiglu_limit=config.get("swiglu_limit", 7.0),
        swiglu_alpha=config.get("swiglu_alpha", 1.702),
    )


def _require_same(config: ReadKeys, key: str, expected: object) -> None:
    """See that a key of OpenAI's own, if it is there, says what transformers' says."""
    found = config.get(key, expected)
    if found != expected:
        raise ConfigError(f"{key!r} is {shown(found)}, but the model's other keys say {shown(expected)}; correct it")


def _layer_weights(config: ModelConfig) -> Mapping[str, Destination]:
    return {
        **attention_weights(config),
        "mlp.router": Destination("experts.router"),
        "mlp.experts.gate_up_proj": Destination("experts.gate_up_proj", stack=ExpertStack.ALTERNATING),
        "mlp.experts.down_proj": Destination("experts.down_proj", stack=ExpertStack.IN_ORDER),
    }


GPT_OSS = Family(_read_config, make_layers, _layer_weights)
