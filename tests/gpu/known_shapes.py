"""Shapes of known models, and odd ones, as arguments of `DecoderModel`."""

from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_heads": 32, "num_kv_heads": 8},
    "qwen3-0.6b": {
        "hidden_size": 1024, "intermediate_size": 3072, "num_heads": 16, "num_kv_heads": 8, "head_dim": 128,
        "qk_norm": True, "tie_embeddings": True,
    },
    "qwen2.5-14b": {
        "hidden_size": 5120, "intermediate_size": 13824, "num_heads": 40, "num_kv_heads": 8, "attention_bias": True,
    },
    "mistral with a window": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_heads": 32, "num_kv_heads": 8, "window_size": 256,
    },
    "phi-4-mini": {
        "hidden_size": 3072, "intermediate_size": 8192, "num_heads": 24, "num_kv_heads": 8, "tie_embeddings": True,
        "partial_rotary_factor": 0.75,
    },
    "qwen3-30b-a3b": {
        "architecture": "Qwen3MoeForCausalLM", "hidden_size": 2048, "num_heads": 32, "num_kv_heads": 4, "head_dim": 128,
        "qk_norm": True, "num_experts": 128, "num_experts_per_token": 8, "expert_size": 768,
    },
    "mixtral, narrow, an mlp in one layer": {
        "architecture": "Qwen3MoeForCausalLM", "hidden_size": 1024, "num_heads": 8, "num_kv_heads": 8,
        "num_experts": 8, "expert_size": 3584, "dense_layers": (1,), "intermediate_size": 1000,
    },
    "mqa, heads of 80": {"hidden_size": 640, "num_heads": 8, "num_kv_heads": 1},
    "heads of 256": {"hidden_size": 1024, "num_heads": 4, "num_kv_heads": 4, "head_dim": 256},
    "odd sizes, window in one layer": {
        "hidden_size": 200, "intermediate_size": 330, "num_heads": 5, "num_kv_heads": 5, "window_size": 64,
        "window_layers": (0,),
    },
}  # fmt: skip
