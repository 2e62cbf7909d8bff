"""Shapes of known models, and odd ones, as arguments of `DecoderModel`."""

from typing import Any

_GEMMA: dict[str, Any] = {
    "activation": "gelu_tanh", "norm_offset": 1.0, "window_layers": (0,), "window_size": 256,
}  # fmt: skip
"""Not tied as theirs are: with random embeddings, whatever token came last would be certain to come again."""

_LATENT: dict[str, Any] = {
    "rank": 512, "query_rank": 768, "plain_dim": 128, "rope_dim": 64, "value_dim": 128,
}  # fmt: skip

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
    "gemma-2-9b with lower caps": {
        **_GEMMA, "architecture": "Gemma2ForCausalLM", "hidden_size": 3584, "intermediate_size": 14336,
        "num_heads": 16, "num_kv_heads": 8, "head_dim": 256, "embedding_scale": 3584**0.5, "attention_soft_cap": 1.0,
        "logit_soft_cap": 2.0,
    },
    "gemma-3-4b": {
        **_GEMMA, "architecture": "Gemma3ForCausalLM", "hidden_size": 2560, "intermediate_size": 10240,
        "num_heads": 8, "num_kv_heads": 4, "head_dim": 256, "embedding_scale": 2560**0.5, "qk_norm": True,
        "rope_theta": 1e6, "window_rope_theta": 1e4,
    },
    "gemma-3-27b": {
        **_GEMMA, "architecture": "Gemma3ForCausalLM", "hidden_size": 5376, "intermediate_size": 21504,
        "num_heads": 32, "num_kv_heads": 16, "head_dim": 128, "embedding_scale": 5376**0.5, "qk_norm": True,
        "attention_scale": 168**-0.5, "rope_theta": 1e6, "window_rope_theta": 1e4,
    },
    "gpt-oss-20b": {
        "architecture": "GptOssForCausalLM", "hidden_size": 2880, "intermediate_size": 2880, "num_heads": 64,
        "num_kv_heads": 8, "head_dim": 64,
        "window_size": 128, "window_layers": (0,), "attention_sinks": True, "norm_offset": 0.0,
        "attention_bias": True, "attention_output_bias": True, "num_experts": 32, "num_experts_per_token": 4,
        "expert_size": 2880, "expert_bias": True, "swiglu_limit": 0.1,
    },
    "qwen3.5": {
        "architecture": "Qwen3_5ForCausalLM", "hidden_size": 2560, "intermediate_size": 9216, "num_heads": 16,
        "num_kv_heads": 4, "head_dim": 256, "partial_rotary_factor": 0.25, "norm_offset": 1.0, "qk_norm": True,
        "attention_gate": True, "tie_embeddings": True,
        "delta": {"layers": (0,), "num_key_heads": 16, "num_value_heads": 32, "key_dim": 128, "value_dim": 128},
    },
    "qwen3.5 with odd heads, the rule last": {
        "architecture": "Qwen3_5ForCausalLM", "hidden_size": 1024, "num_heads": 8, "num_kv_heads": 2,
        "norm_offset": 1.0, "qk_norm": True, "attention_gate": True,
        "delta": {
            "layers": (1,), "num_key_heads": 4, "num_value_heads": 12, "key_dim": 96, "value_dim": 80, "kernel_size": 3,
        },
    },
    "qwen3.6-35b-a3b": {
        "architecture": "Qwen3_5MoeForCausalLM", "hidden_size": 2048, "num_heads": 16, "num_kv_heads": 2,
        "head_dim": 256, "partial_rotary_factor": 0.25, "norm_offset": 1.0, "qk_norm": True, "attention_gate": True,
        "num_experts": 256, "num_experts_per_token": 8, "expert_size": 512, "shared_expert_size": 512,
        "shared_expert_gate": True,
        "delta": {"layers": (0,), "num_key_heads": 16, "num_value_heads": 32, "key_dim": 128, "value_dim": 128},
    },
    "deepseek-v2-lite": {
        "architecture": "DeepseekV2ForCausalLM", "hidden_size": 2048, "intermediate_size": 10944, "num_heads": 16,
        "num_kv_heads": 1, "head_dim": 576, "attention_scale": 0.1147, "latent": {**_LATENT, "query_rank": None},
        "num_experts": 64, "num_experts_per_token": 6, "expert_size": 1408, "shared_expert_size": 2816,
        "normalize_expert_weights": False, "dense_layers": (0,),
    },
    "deepseek-v3, narrow": {
        "architecture": "DeepseekV3ForCausalLM", "hidden_size": 1024, "intermediate_size": 2048, "num_heads": 128,
        "num_kv_heads": 1, "head_dim": 576, "attention_scale": 0.1352, "latent": _LATENT, "num_experts": 256,
        "num_experts_per_token": 8, "expert_size": 256, "shared_expert_size": 256, "dense_layers": (0,),
        "routing": {"uses_sigmoid": True, "num_groups": 8, "num_top_groups": 4, "scale": 2.5},
    },
    "glm-4.7-flash": {
        "architecture": "Glm4MoeLiteForCausalLM", "hidden_size": 2048, "intermediate_size": 10240, "num_heads": 20,
        "num_kv_heads": 1, "head_dim": 576, "attention_scale": 0.0625,
        "latent": {**_LATENT, "plain_dim": 192, "value_dim": 256}, "num_experts": 64, "num_experts_per_token": 4,
        "expert_size": 1536, "shared_expert_size": 1536, "dense_layers": (0,),
        "routing": {"uses_sigmoid": True, "scale": 1.8},
    },
    "glm-4.5-air": {
        "architecture": "Glm4MoeForCausalLM", "hidden_size": 4096, "intermediate_size": 10944, "num_heads": 96,
        "num_kv_heads": 8, "head_dim": 128, "partial_rotary_factor": 0.5, "attention_bias": True, "num_experts": 128,
        "num_experts_per_token": 8, "expert_size": 1408, "shared_expert_size": 1408, "dense_layers": (0,),
        "routing": {"uses_sigmoid": True},
    },
    "mqa, heads of 80": {"hidden_size": 640, "num_heads": 8, "num_kv_heads": 1},
    "heads of 256": {"hidden_size": 1024, "num_heads": 4, "num_kv_heads": 4, "head_dim": 256},
    "odd sizes, window in one layer": {
        "hidden_size": 200, "intermediate_size": 330, "num_heads": 5, "num_kv_heads": 5, "window_size": 64,
        "window_layers": (0,),
    },
}  # fmt: skip
