"""Where each module of a Hugging Face checkpoint goes in `DecoderModel`, whose products are fused."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from llm.config import ModelConfig

_OUTSIDE_LAYERS = {
    "model.embed_tokens": "embed_tokens",
    "model.norm": "norm",
    "lm_head": "lm_head",
}

_INSIDE_A_LAYER = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.qkv_proj",
    "self_attn.k_proj": "attention.qkv_proj",
    "self_attn.v_proj": "attention.qkv_proj",
    "self_attn.o_proj": "attention.o_proj",
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    "post_attention_layernorm": "mlp_norm",
    "mlp.gate_proj": "mlp.gate_up_proj",
    "mlp.up_proj": "mlp.gate_up_proj",
    "mlp.down_proj": "mlp.down_proj",
}


@dataclass(frozen=True, slots=True)
class Destination:
    """Rows of one of our modules' weight, and of its bias."""

    module: str
    """Dotted name in `DecoderModel`."""
    rows: slice = field(default_factory=lambda: slice(None))


def destinations(config: ModelConfig) -> dict[str, Destination]:
    """Destination of each module that a checkpoint of this shape has, by its name in the checkpoint."""
    return dict(_destinations(config))


def _destinations(config: ModelConfig) -> Iterator[tuple[str, Destination]]:
    for theirs, ours in _OUTSIDE_LAYERS.items():
        if theirs != "lm_head" or not config.tie_embeddings:
            yield theirs, Destination(ours)
    fused_rows = _fused_rows(config)
    for layer in range(config.num_layers):
        for theirs, ours in _INSIDE_A_LAYER.items():
            if theirs not in ("self_attn.q_norm", "self_attn.k_norm") or config.qk_norm:
                rows = fused_rows.get(theirs, slice(None))
                yield f"model.layers.{layer}.{theirs}", Destination(f"layers.{layer}.{ours}", rows)


def _fused_rows(config: ModelConfig) -> dict[str, slice]:
    """Rows of each part of the fused products: query, key, value; gate, up."""
    query, key_value, mlp = config.num_heads * config.head_size, config.kv_heads * config.head_size, config.mlp_size
    return {
        "self_attn.q_proj": slice(0, query),
        "self_attn.k_proj": slice(query, query + key_value),
        "self_attn.v_proj": slice(query + key_value, query + 2 * key_value),
        "mlp.gate_proj": slice(0, mlp),
        "mlp.up_proj": slice(mlp, 2 * mlp),
    }
