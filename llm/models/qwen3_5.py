"""Qwen3.5 and 3.6, text only, dense: three layers with a gated delta rule for each layer with gated attention.

Every norm scales by 1 + w, except the gated norm within a delta-net layer. These models' RoPE has a section for each of
three positions. In text, a token's three positions are equal, so it is plain RoPE.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from llm.attention.rope import RotaryEmbedding
from llm.attention.spec import AttentionSpec
from llm.config import ModelConfig
from llm.core.recurrent_state import DeltaSpec
from llm.errors import ConfigError
from llm.models.attention_layer import make_norm, make_rope
from llm.models.config_keys import ReadKeys, key_names
from llm.models.delta import DeltaMixer, ExactLinear
from llm.models.delta_keys import read_delta
from llm.models.experts import Experts
from llm.models.family import Destination, Family, Layer, common_fields, read_text_half
from llm.models.llama import mlp_weights
from llm.models.operations import Operations
from llm.models.rope_keys import read_rope

IMAGE_KEYS = key_names("""
    vision_config image_token_id video_token_id vision_start_token_id vision_end_token_id language_model_only
""")
"""Keys beside the text half's."""
_UNUSED_KEYS = key_names("mtp_num_hidden_layers mtp_use_dedicated_embeddings mamba_ssm_dtype")
"""Of layers behind the model's own, and the format of states, which here is float32 always."""
_DEFAULTS = {"partial_rotary_factor": 0.25, "num_key_value_heads": 4, "head_dim": 256}
"""What transformers takes for keys that are missing."""
_ROPE_KEYS = key_names("mrope_section mrope_interleaved")


class DeltaNetLayer(Layer):
    """A delta-net or attention, then the feed-forward or experts.

    Args:
        index: of the layer, from 0.
        rope: of the model.
    """

    def __init__(self, config: ModelConfig, index: int, rope: RotaryEmbedding) -> None:
        super().__init__()
        self.index = index
        hidden_size, mlp_size, has_bias = config.hidden_size, config.mlp_size, config.attention_bias
        norm = make_norm(config)
        self.mixing_norm = norm(hidden_size)
        if config.delta is not None and index in config.delta.layers:
            self.delta_spec = delta = DeltaSpec.of(config.delta)
            self.mixed_proj = nn.Linear(hidden_size, delta.conv_size + delta.output_size, bias=False)
            self.decay_proj = ExactLinear(hidden_size, 2 * delta.num_value_heads)
            self.mixer = DeltaMixer(delta, config.rms_norm_eps)
            self.o_proj = nn.Linear(delta.output_size, hidden_size, bias=False)
        else:
            self.spec = spec = AttentionSpec(
                config.num_heads, config.kv_heads, config.head_size, rope, has_gate=config.attention_gate
            )
            self.qkv_proj = nn.Linear(hidden_size, spec.qkv_size, bias=has_bias)
            self.q_norm, self.k_norm = norm(spec.head_dim), norm(spec.head_dim)
            self.o_proj = nn.Linear(spec.output_size, hidden_size, bias=has_bias)
        self.mlp_norm = norm(hidden_size)
        self.experts = Experts.of(config) if config.has_experts(index) else None
        if self.experts is None:
            self.gate_up_proj = nn.Linear(hidden_size, 2 * mlp_size, bias=False)
            self.down_proj = nn.Linear(mlp_size, hidden_size, bias=False)

    def forward(self, operations: Operations[Any]) -> None:
        """See `Layer.forward`."""
        if self.delta_spec is not None:
            mixed = operations.product_of_norm(self.mixing_norm, self.mixed_proj)
            decay = operations.product_of_norm(self.mixing_norm, self.decay_proj)
            output = operations.mix(self.index, self.delta_spec, mixed, decay, self.mixer)
        else:
            qkv = operations.product_of_norm(self.mixing_norm, self.qkv_proj)
            output = operations.attend(self.index, self.spec, qkv, (self.q_norm, self.k_norm))
        operations.add_product(output, self.o_proj)
        if self.experts is not None:
            operations.add_experts(self.mlp_norm, self.experts)
        else:
            operations.add_gated_mlp(self.mlp_norm, self.gate_up_proj, self.down_proj)


def make_layers(config: ModelConfig) -> list[Layer]:
    """The layers of a model of this shape."""
    rope = make_rope(config)
    return [DeltaNetLayer(config, index, rope) for index in range(config.num_layers)]


def _layer_weights(config: ModelConfig) -> Mapping[str, Destination]:
    return {**mixing_weights(config), **delta_weights(config), **mlp_weights(config)}


def mixing_weights(config: ModelConfig) -> dict[str, Destination]:
    """Destinations of a layer's norms and, in layers with attention, of its projections."""
    place = partial(Destination, layers=config.attention_layers)
    query = (1 + config.attention_gate) * config.num_heads * config.head_size
    key_value = config.kv_heads * config.head_size
    return {
        "input_layernorm": Destination("mixing_norm"),
        "post_attention_layernorm": Destination("mlp_norm"),
        "self_attn.q_proj": place("qkv_proj", slice(0, query)),
        "self_attn.k_proj": place("qkv_proj", slice(query, query + key_value)),
        "self_attn.v_proj": place("qkv_proj", slice(query + key_value, query + 2 * key_value)),
        "self_attn.q_norm": place("q_norm"),
        "self_attn.k_norm": place("k_norm"),
        "self_attn.o_proj": place("o_proj"),
    }


def delta_weights(config: ModelConfig) -> dict[str, Destination]:
    """Destinations in layers with a gated delta rule."""
    delta = config.delta
    if delta is None:
        return {}
    spec, heads, place = DeltaSpec.of(delta), delta.num_value_heads, partial(Destination, layers=delta.layers)
    return {
        **mixer_weights(config),
        "linear_attn.in_proj_qkv": place("mixed_proj", slice(0, spec.conv_size)),
        "linear_attn.in_proj_z": place("mixed_proj", slice(spec.conv_size, spec.conv_size + spec.output_size)),
        "linear_attn.in_proj_b": place("decay_proj", slice(0, heads)),
        "linear_attn.in_proj_a": place("decay_proj", slice(heads, 2 * heads)),
    }


def mixer_weights(config: ModelConfig) -> dict[str, Destination]:
    """Destinations in layers with a gated delta rule, but for its first projections."""
    assert config.delta is not None, "asked where there are such layers"
    place = partial(Destination, layers=config.delta.layers)
    return {
        "linear_attn": place("mixer"),
        "linear_attn.conv1d": place("mixer.conv1d"),
        "linear_attn.norm": place("mixer.norm"),
        "linear_attn.out_proj": place("o_proj"),
    }


def _read_config(config: ReadKeys, name: str) -> ModelConfig:
    return ModelConfig(**hybrid_fields(config), architecture=name)


def hybrid_fields(config: ReadKeys) -> dict[str, Any]:
    """The fields of `ModelConfig` that the families with such layers have in common.

    Raises:
        ConfigError: attention without a gate, or what `read_delta` says.
    """
    config.fill(_DEFAULTS)
    for key in _UNUSED_KEYS:
        config.get(key)
    if not config.get("attn_output_gate", True):
        raise ConfigError("'attn_output_gate' is False; only True is supported")
    has_bias = config.get("attention_bias") or False
    return {
        **common_fields(config, rope=read_rope(config, can_be_partial=True, harmless=_ROPE_KEYS)),
        "norm_offset": 1.0,
        "qk_norm": True,
        "attention_gate": True,
        "attention_bias": has_bias,
        "attention_output_bias": has_bias,
        "delta": read_delta(config),
    }


def _read_text_half(config: ReadKeys, name: str) -> ModelConfig:
    return read_text_half(config, name, _read_config, IMAGE_KEYS)


MTP = "multi-token prediction (MTP)"
QWEN3_5 = Family(_read_config, make_layers, _layer_weights, left_out=MTP)
QWEN3_5_TEXT_HALF = Family(_read_text_half, make_layers, _layer_weights, left_out=f"images, videos and {MTP}")
