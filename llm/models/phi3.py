"""Phi-3: Llama's layer with projections that are fused in the checkpoint. RoPE may rotate only part of each head."""

from collections.abc import Mapping

from llm.config import ModelConfig
from llm.models.config_keys import ReadKeys
from llm.models.family import Destination, Family, common_fields
from llm.models.llama import make_layers
from llm.models.window_keys import read_windows


def _read_config(config: ReadKeys, name: str) -> ModelConfig:
    config.fill({"rms_norm_eps": 1e-5})
    window_size, window_layers = read_windows(config)
    config.get("auto_map")  # transformers and this file have since implemented the code that it points to
    return ModelConfig(
        **common_fields(config, has_partial_rope=True),
        architecture=name,
        window_size=window_size,
        window_layers=window_layers,
    )


def _layer_weights(config: ModelConfig) -> Mapping[str, Destination]:
    del config
    return {
        "input_layernorm": Destination("attention_norm"),
        "self_attn.qkv_proj": Destination("qkv_proj"),
        "self_attn.o_proj": Destination("o_proj"),
        "post_attention_layernorm": Destination("mlp_norm"),
        "mlp.gate_up_proj": Destination("gate_up_proj"),
        "mlp.down_proj": Destination("down_proj"),
    }


PHI3 = Family(_read_config, make_layers, _layer_weights)
