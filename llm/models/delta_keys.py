"""Reads what a config.json says about layers with a gated delta rule."""

from llm.config import DeltaConfig
from llm.errors import ConfigError
from llm.models.config_keys import ReadKeys, shown

_FULL, _LINEAR = "full_attention", "linear_attention"
_EVERY = 4
"""Without `layer_types`, the last of every group of this many layers has attention."""


def read_delta(config: ReadKeys) -> DeltaConfig | None:
    """The layers and their shape, as Qwen3-Next and Qwen3.5 name them, with transformers' defaults; None for none.

    Raises:
        ConfigError: the keys contradict one another, or the gate is not SiLU.
    """
    gate = config.get("output_gate_type", "swish")
    if gate not in ("swish", "silu"):
        raise ConfigError(f"'output_gate_type' is {shown(gate)}; only swish is supported")
    num_layers, every = config["num_hidden_layers"], config.get("full_attention_interval") or _EVERY
    kinds = config.get("layer_types")
    if kinds is None:
        kinds = [_LINEAR if (i + 1) % every else _FULL for i in range(num_layers)]
    if set(kinds) - {_FULL, _LINEAR} or len(kinds) != num_layers:
        raise ConfigError(f"layer_types must hold {num_layers} of {_FULL} and {_LINEAR}; correct it")
    fields = {
        "num_key_heads": config.get("linear_num_key_heads", 16),
        "num_value_heads": config.get("linear_num_value_heads", 32),
        "key_dim": config.get("linear_key_head_dim", 128),
        "value_dim": config.get("linear_value_head_dim", 128),
        "kernel_size": config.get("linear_conv_kernel_dim", 4),
    }
    layers = tuple(i for i, kind in enumerate(kinds) if kind == _LINEAR)
    return DeltaConfig(layers=layers, **fields) if layers else None
