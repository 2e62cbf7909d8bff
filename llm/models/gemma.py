"""Gemma 2 and Gemma 3, text only: norms before and after, GeGLU, scaled embeddings, windows in most layers.

Every norm scales by 1 + w. The outputs of attention and the feed-forward are normalized before they are added to the
residual stream. Gemma 2 (arXiv:2408.00118) puts soft caps on scores and logits. Gemma 3 (arXiv:2503.19786) normalizes
queries and keys instead, and uses different RoPE angles in layers with a window.
"""

from collections.abc import Mapping
from typing import Any

from llm.attention.rope import RotaryEmbedding
from llm.config import Activation, ModelConfig
from llm.models.attention_layer import attention_weights, make_norm, make_rope
from llm.models.config_keys import ReadKeys, key_names
from llm.models.family import Destination, Family, Layer, common_fields, read_text_half
from llm.models.llama import LlamaLayer, mlp_weights
from llm.models.operations import Operations
from llm.models.rope_keys import read_ropes_by_kind
from llm.models.window_keys import read_windows

_IMAGE_KEYS = key_names("""
    vision_config mm_tokens_per_image boi_token_index eoi_token_index image_token_index
    boi_token_id eoi_token_id image_token_id
""")
_DEFAULTS = {
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "query_pre_attn_scalar": 256, "tie_word_embeddings": True, "rms_norm_eps": 1e-6,
}  # fmt: skip
_DEFAULTS_2 = {
    **_DEFAULTS, "max_position_embeddings": 8192, "sliding_window": 4096, "sliding_window_pattern": 2,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "vocab_size": 256000, "rope_theta": 1e4,
}  # fmt: skip
_DEFAULTS_3 = {
    **_DEFAULTS, "max_position_embeddings": 131072, "sliding_window": 4096, "sliding_window_pattern": 6,
    "vocab_size": 262208,
}  # fmt: skip
"""What transformers takes for keys that are missing, as most of them are in Google's own files of Gemma 3."""


class GemmaLayer(LlamaLayer):
    """Attention, then the feed-forward, each between two norms. See `AttentionLayer`."""

    def __init__(self, config: ModelConfig, index: int, rope: RotaryEmbedding) -> None:
        super().__init__(config, index, rope)
        self.activation = config.activation
        norm = make_norm(config)
        self.behind_attention_norm, self.behind_mlp_norm = norm(config.hidden_size), norm(config.hidden_size)

    def forward(self, operations: Operations[Any]) -> None:
        """See `Layer.forward`."""
        self.add_attention(operations, self.behind_attention_norm)
        operations.add_gated_mlp(
            self.mlp_norm, self.gate_up_proj, self.down_proj, self.activation, self.behind_mlp_norm
        )


def _make_layers(config: ModelConfig) -> list[Layer]:
    rope = own = make_rope(config)
    if config.window_rope_theta is not None:
        own = RotaryEmbedding(config.rotary_size, config.max_seq_len, config.window_rope_theta)
    ropes = [rope if config.layer_window(index) is None else own for index in range(config.num_layers)]
    return [GemmaLayer(config, index, rope) for index, rope in enumerate(ropes)]


def _layer_weights(config: ModelConfig) -> Mapping[str, Destination]:
    return {
        **attention_weights(config),
        **mlp_weights(config),
        "post_attention_layernorm": Destination("behind_attention_norm"),
        "pre_feedforward_layernorm": Destination("mlp_norm"),
        "post_feedforward_layernorm": Destination("behind_mlp_norm"),
    }


def _shared_fields(config: ReadKeys) -> dict[str, Any]:
    """The fields that both generations read in the same way."""
    config.get("hidden_act")  # an older name, which transformers reads no more
    window_size, window_layers = read_windows(config, pattern=config["sliding_window_pattern"])
    has_bias = config.get("attention_bias", False)
    return {
        "window_size": window_size, "window_layers": window_layers,
        "attention_scale": config["query_pre_attn_scalar"] ** -0.5, "embedding_scale": config["hidden_size"] ** 0.5,
        "logit_soft_cap": config.get("final_logit_softcapping", 0) or None, "norm_offset": 1.0,
        "attention_bias": has_bias, "attention_output_bias": has_bias,
    }  # fmt: skip


def _read_gemma_2(config: ReadKeys, name: str) -> ModelConfig:
    config.fill(_DEFAULTS_2)
    config.get("sliding_window_size")  # `sliding_window` once more
    soft_cap = config.get("attn_logit_softcapping", 0) or None
    return ModelConfig(
        **common_fields(config, activation=Activation.GELU_TANH), **_shared_fields(config),
        architecture=name, attention_soft_cap=soft_cap,
    )  # fmt: skip


def _read_gemma_3(config: ReadKeys, name: str) -> ModelConfig:
    config.fill(_DEFAULTS_3)
    rope, window_rope_theta = read_ropes_by_kind(config, theta=1e6, window_theta=1e4)
    return ModelConfig(
        **common_fields(config, activation=Activation.GELU_TANH, rope=rope), **_shared_fields(config),
        architecture=name, window_rope_theta=window_rope_theta, qk_norm=True,
    )  # fmt: skip


def _read_text_half_of_gemma_3(config: ReadKeys, name: str) -> ModelConfig:
    return read_text_half(config, name, _read_gemma_3, _IMAGE_KEYS)


GEMMA2 = Family(_read_gemma_2, _make_layers, _layer_weights)
GEMMA3 = Family(_read_gemma_3, _make_layers, _layer_weights)
GEMMA3_TEXT_HALF = Family(_read_text_half_of_gemma_3, _make_layers, _layer_weights, left_out="images")
