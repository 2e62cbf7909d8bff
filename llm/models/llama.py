"""Llama, and the families that differ from it only in details: Mistral, Qwen2, Qwen3.

Each layer is grouped-query attention and a SwiGLU, each after its own RMSNorm. The projections of queries, keys and
values are one product, and so are those of gate and up.
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from llm.attention.rope import RotaryEmbedding
from llm.config import ModelConfig
from llm.models.attention_layer import AttentionLayer, attention_weights, make_rope
from llm.models.config_keys import ReadKeys
from llm.models.family import Destination, Family, Layer, common_fields
from llm.models.operations import Operations
from llm.models.window_keys import read_windows, refuse_windows


class LlamaLayer(AttentionLayer):
    """Attention, then the feed-forward. See `AttentionLayer`."""

    def __init__(self, config: ModelConfig, index: int, rope: RotaryEmbedding) -> None:
        super().__init__(config, index, rope)
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.mlp_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.mlp_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, operations: Operations[Any]) -> None:
        """See `Layer.forward`."""
        self.add_attention(operations)
        operations.add_gated_mlp(self.mlp_norm, self.gate_up_proj, self.down_proj)


def make_layers(config: ModelConfig) -> list[Layer]:
    """The layers of a model of this shape."""
    rope = make_rope(config)
    return [LlamaLayer(config, index, rope) for index in range(config.num_layers)]


def mlp_weights(config: ModelConfig, layers: Container[int] | None = None) -> dict[str, Destination]:
    """Destinations of a feed-forward's modules, in the given layers; None for all layers."""
    mlp = config.mlp_size
    return {
        "mlp.gate_proj": Destination("gate_up_proj", slice(0, mlp), layers=layers),
        "mlp.up_proj": Destination("gate_up_proj", slice(mlp, 2 * mlp), layers=layers),
        "mlp.down_proj": Destination("down_proj", layers=layers),
    }


def _layer_weights(config: ModelConfig) -> Mapping[str, Destination]:
    return attention_weights(config) | mlp_weights(config)


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads the config.json of an architecture that differs from plain Llama in these ways.

    Attributes:
        qk_norm: heads are normalized before RoPE.
        has_qkv_bias: query, key and value always have a bias.
        reads_biases: `attention_bias` (all four projections) and `mlp_bias` count.
        has_windows: `sliding_window` counts.
        has_window_switch: see `read_windows`.
        defaults: values of keys that are not there, where they are the architecture's own.
    """

    qk_norm: bool = False
    has_qkv_bias: bool = False
    reads_biases: bool = False
    has_windows: bool = True
    has_window_switch: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, config: ReadKeys, name: str) -> ModelConfig:
        config.fill(self.defaults)
        window_size, window_layers = None, None
        if self.has_windows:
            window_size, window_layers = read_windows(config, has_switch=self.has_window_switch)
        else:
            refuse_windows(config, name)
        has_bias = (self.reads_biases and config.get("attention_bias")) or False
        return ModelConfig(
            **common_fields(config),
            architecture=name,
            window_size=window_size,
            window_layers=window_layers,
            qk_norm=self.qk_norm,
            attention_bias=self.has_qkv_bias or has_bias,
            attention_output_bias=has_bias,
            mlp_bias=(self.reads_biases and config.get("mlp_bias")) or False,
        )


_MISTRAL_DEFAULTS = {"num_key_value_heads": 8, "sliding_window": 4096}
_MINISTRAL3_DEFAULTS = {"num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5}
_QWEN2_DEFAULTS = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
_QWEN3_DEFAULTS = {**_QWEN2_DEFAULTS, "head_dim": 128}

LLAMA = Family(_Reader(reads_biases=True, has_windows=False), make_layers, _layer_weights)
MISTRAL = Family(_Reader(defaults=_MISTRAL_DEFAULTS), make_layers, _layer_weights)
MINISTRAL3 = Family(_Reader(defaults=_MINISTRAL3_DEFAULTS), make_layers, _layer_weights)
QWEN2 = Family(
    _Reader(has_qkv_bias=True, has_window_switch=True, defaults=_QWEN2_DEFAULTS), make_layers, _layer_weights
)
QWEN3 = Family(
    _Reader(qk_norm=True, reads_biases=True, has_window_switch=True, defaults=_QWEN3_DEFAULTS),
    make_layers,
    _layer_weights,
)
