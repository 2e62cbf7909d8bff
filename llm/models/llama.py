"""Llama, and the families that differ from it in details alone: Mistral, Qwen2, Qwen3.

Each layer is grouped-query attention and a SwiGLU, each behind its own RMSNorm. The projections of queries, keys and
values are one product, and so are those of gate and up.
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from llm.attention.rope import RotaryEmbedding
from llm.attention.spec import AttentionSpec
from llm.config import ModelConfig
from llm.models.config_keys import ReadKeys
from llm.models.family import Destination, Family, Layer, common_fields
from llm.models.layers import RMSNorm
from llm.models.operations import Operations
from llm.models.window_keys import read_windows, refuse_windows


class AttentionLayer(Layer):
    """What the layers of all these families begin with: attention, then the norm in front of the feed-forward.

    Args:
        index: of the layer, from 0.
        rope: of the model.
    """

    def __init__(self, config: ModelConfig, index: int, rope: RotaryEmbedding) -> None:
        super().__init__()
        self.index = index
        self.spec = spec = AttentionSpec(
            config.num_heads, config.kv_heads, config.head_size, rope, config.layer_window(index)
        )
        hidden_size, eps = config.hidden_size, config.rms_norm_eps
        self.attention_norm = RMSNorm(hidden_size, eps)
        self.qkv_proj = nn.Linear(hidden_size, spec.qkv_size, bias=config.attention_bias)
        self.q_norm = RMSNorm(spec.head_dim, eps) if config.qk_norm else None
        self.k_norm = RMSNorm(spec.head_dim, eps) if config.qk_norm else None
        self.o_proj = nn.Linear(spec.output_size, hidden_size, bias=config.attention_output_bias)
        self.mlp_norm = RMSNorm(hidden_size, eps)

    def add_attention(self, operations: Operations[Any]) -> None:
        """Add what attention finds to the residual stream."""
        qk_norms = None if self.q_norm is None or self.k_norm is None else (self.q_norm, self.k_norm)
        qkv = operations.product_of_norm(self.attention_norm, self.qkv_proj)
        attended = operations.attend(self.index, self.spec, qkv, qk_norms)
        operations.add_product(attended, self.o_proj)


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


def make_rope(config: ModelConfig) -> RotaryEmbedding:
    """The rotary embedding that all layers of a model share."""
    return RotaryEmbedding(config.rotary_size, config.max_seq_len, config.rope_theta, config.rope_scaling)


def make_layers(config: ModelConfig) -> list[Layer]:
    """The layers of a model of this shape."""
    rope = make_rope(config)
    return [LlamaLayer(config, index, rope) for index in range(config.num_layers)]


def attention_weights(config: ModelConfig) -> dict[str, Destination]:
    """Destinations within an `AttentionLayer`."""
    query, key_value = config.num_heads * config.head_size, config.kv_heads * config.head_size
    norms = {"q_norm": "q_norm", "k_norm": "k_norm"} if config.qk_norm else {}
    return {
        "input_layernorm": Destination("attention_norm"),
        "self_attn.q_proj": Destination("qkv_proj", slice(0, query)),
        "self_attn.k_proj": Destination("qkv_proj", slice(query, query + key_value)),
        "self_attn.v_proj": Destination("qkv_proj", slice(query + key_value, query + 2 * key_value)),
        **{f"self_attn.{theirs}": Destination(ours) for theirs, ours in norms.items()},
        "self_attn.o_proj": Destination("o_proj"),
        "post_attention_layernorm": Destination("mlp_norm"),
    }


def mlp_weights(config: ModelConfig, layers: Container[int] | None = None) -> dict[str, Destination]:
    """Destinations of a feed-forward, in these layers; None for all."""
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
    """Reads the config.json of an architecture that differs from plain Llama so.

    Attributes:
        qk_norm: heads are normalised before they turn.
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
_QWEN2_DEFAULTS = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
_QWEN3_DEFAULTS = {**_QWEN2_DEFAULTS, "head_dim": 128}

LLAMA = Family(_Reader(reads_biases=True, has_windows=False), make_layers, _layer_weights)
MISTRAL = Family(_Reader(defaults=_MISTRAL_DEFAULTS), make_layers, _layer_weights)
QWEN2 = Family(
    _Reader(has_qkv_bias=True, has_window_switch=True, defaults=_QWEN2_DEFAULTS), make_layers, _layer_weights
)
QWEN3 = Family(
    _Reader(qk_norm=True, reads_biases=True, has_window_switch=True, defaults=_QWEN3_DEFAULTS),
    make_layers,
    _layer_weights,
)
