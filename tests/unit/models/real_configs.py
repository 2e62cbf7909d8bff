"""The config.json files of well-known checkpoints, as published: whatever stands in one of them must load."""

from typing import Any

LLAMA3_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "initializer_range": 0.02, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "hidden_size": 4096, "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False, "use_cache": True,
}  # fmt: skip
_LLAMA_3: dict[str, Any] = {
    **_LLAMA, "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001,
    "intermediate_size": 14336, "num_key_value_heads": 8, "pretraining_tp": 1, "rope_theta": 500000.0,
    "torch_dtype": "bfloat16", "vocab_size": 128256,
}  # fmt: skip
_MISTRAL: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "model_type": "mistral",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
}  # fmt: skip
_PHI: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "embd_pdrop": 0.0,
    "hidden_act": "silu", "initializer_range": 0.02, "model_type": "phi3", "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
}  # fmt: skip
_QWEN: dict[str, Any] = {
    "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu",
    "initializer_range": 0.02, "max_position_embeddings": 32768, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
_QWEN_2: dict[str, Any] = {
    **_QWEN, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584,
    "intermediate_size": 18944, "max_window_layers": 28, "num_attention_heads": 28, "num_hidden_layers": 28,
    "num_key_value_heads": 4, "sliding_window": 131072, "tie_word_embeddings": False,
    "transformers_version": "4.43.1",
}  # fmt: skip
_QWEN_3: dict[str, Any] = {
    **_QWEN, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 128,
    "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rope_scaling": None,
    "sliding_window": None, "tie_word_embeddings": True, "transformers_version": "4.51.0",
}  # fmt: skip
_GEMMA: dict[str, Any] = {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2, "cache_implementation": "hybrid",
    "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "initializer_range": 0.02, "pad_token_id": 0,
    "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "torch_dtype": "bfloat16", "use_cache": True,
}  # fmt: skip
_GEMMA_3_TEXT: dict[str, Any] = {
    "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
}  # fmt: skip
_GEMMA_3: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
    "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
    "model_type": "gemma3", "text_config": _GEMMA_3_TEXT, "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "vision_config": {
        "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "model_type": "siglip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
    },
}  # fmt: skip
_QWEN_3_5: dict[str, Any] = {
    "attention_bias": False, "attention_dropout": 0.0, "attn_output_gate": True, "bos_token_id": 248044,
    "dtype": "bfloat16", "eos_token_id": 248044, "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu",
    "hidden_size": 5120, "initializer_range": 0.02, "intermediate_size": 17408,
    "layer_types": [*["linear_attention"] * 3, "full_attention"] * 16, "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 48, "linear_value_head_dim": 128,
    "mamba_ssm_dtype": "float32", "max_position_embeddings": 262144, "model_type": "qwen3_5_text",
    "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False, "num_attention_heads": 24,
    "num_hidden_layers": 64, "num_key_value_heads": 4, "output_gate_type": "swish", "pad_token_id": None,
    "partial_rotary_factor": 0.25, "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "use_cache": True,
    "vocab_size": 248320,
    "rope_parameters": {
        "mrope_interleaved": True, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25,
        "rope_theta": 10000000, "rope_type": "default",
    },
}  # fmt: skip

REAL_CONFIGS: dict[str, dict[str, Any]] = {
    "gemma-2-9b-it": {
        **_GEMMA, "architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": 50.0, "eos_token_id": 1,
        "final_logit_softcapping": 30.0, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 3584,
        "intermediate_size": 14336, "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 16,
        "num_hidden_layers": 42, "num_key_value_heads": 8, "rope_theta": 10000.0, "sliding_window": 4096,
        "sliding_window_size": 4096, "transformers_version": "4.42.0.dev0", "vocab_size": 256000,
    },
    "gemma-3-1b-it": {
        **_GEMMA, "architectures": ["Gemma3ForCausalLM"], "attn_logit_softcapping": None, "eos_token_id": [1, 106],
        "final_logit_softcapping": None, "hidden_size": 1152, "intermediate_size": 6912,
        "max_position_embeddings": 32768, "model_type": "gemma3_text", "num_attention_heads": 4,
        "num_hidden_layers": 26, "num_key_value_heads": 1, "rope_local_base_freq": 10000, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
        "transformers_version": "4.50.0.dev0", "vocab_size": 262144,
    },
    "gemma-3-4b-it": _GEMMA_3,
    "gemma-3-27b-it": {
        **_GEMMA_3,
        "text_config": {
            **_GEMMA_3_TEXT, "head_dim": 128, "hidden_size": 5376, "intermediate_size": 21504,
            "num_attention_heads": 32, "num_hidden_layers": 62, "num_key_value_heads": 16,
            "query_pre_attn_scalar": 168,
        },
    },
    "llama-7b": {
        **_LLAMA, "bos_token_id": 1, "eos_token_id": 2, "intermediate_size": 11008, "max_position_embeddings": 2048,
        "max_sequence_length": 2048, "pad_token_id": 0, "rms_norm_eps": 1e-06, "torch_dtype": "float16",
        "transformers_version": "4.28.0.dev0", "vocab_size": 32000,
    },
    "Llama-2-7b-chat-hf": {
        **_LLAMA, "_name_or_path": "meta-llama/Llama-2-7b-chat-hf", "bos_token_id": 1, "eos_token_id": 2,
        "intermediate_size": 11008, "max_position_embeddings": 4096, "num_key_value_heads": 32, "pretraining_tp": 1,
        "rope_scaling": None, "torch_dtype": "float16", "transformers_version": "4.32.0.dev0", "vocab_size": 32000,
    },
    "CodeLlama-7b-hf": {
        **_LLAMA, "_name_or_path": "codellama/CodeLlama-7b-hf", "bos_token_id": 1, "eos_token_id": 2,
        "intermediate_size": 11008, "max_position_embeddings": 16384, "num_key_value_heads": 32, "pretraining_tp": 1,
        "rope_scaling": None, "rope_theta": 1000000, "torch_dtype": "bfloat16", "vocab_size": 32016,
    },
    "Meta-Llama-3-8B-Instruct": {
        **_LLAMA_3, "eos_token_id": 128009, "max_position_embeddings": 8192, "rope_scaling": None,
        "transformers_version": "4.40.0.dev0",
    },
    "Llama-3.1-8B-Instruct": {
        **_LLAMA_3, "eos_token_id": [128001, 128008, 128009], "max_position_embeddings": 131072, "mlp_bias": False,
        "rope_scaling": LLAMA3_ROPE, "transformers_version": "4.42.3",
    },
    "Llama-3.2-1B-Instruct": {
        **_LLAMA_3, "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_size": 2048,
        "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False, "num_hidden_layers": 16,
        "rope_scaling": {**LLAMA3_ROPE, "factor": 32.0}, "tie_word_embeddings": True,
        "transformers_version": "4.45.0.dev0",
    },
    "SmolLM2-135M-Instruct": {
        **_LLAMA, "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_size": 576, "initializer_range": 0.041666666666666664, "intermediate_size": 1536,
        "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False, "num_attention_heads": 9,
        "num_hidden_layers": 30, "num_key_value_heads": 3, "pad_token_id": 2, "pretraining_tp": 1,
        "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        "transformers_version": "4.42.3", "vocab_size": 49152,
    },
    "Falcon3-1B-Instruct": {
        **_LLAMA, "activation": "swiglu", "attention_bias": False, "attention_dropout": 0.0, "eos_token_id": 11,
        "head_dim": 256, "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 8192,
        "mlp_bias": False, "num_attention_heads": 8, "num_hidden_layers": 18, "num_key_value_heads": 4,
        "pretraining_tp": 1, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000042,
        "torch_dtype": "bfloat16", "transformers_version": "4.46.1", "vocab_size": 131072,
    },
    "deepseek-coder-6.7b-instruct": {
        **_LLAMA, "bos_token_id": 32013, "eos_token_id": 32021, "intermediate_size": 11008,
        "max_position_embeddings": 16384, "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-06,
        "rope_scaling": {"factor": 4.0, "type": "linear"}, "rope_theta": 100000, "torch_dtype": "bfloat16",
        "transformers_version": "4.33.1", "vocab_size": 32256,
    },
    "Llama-3.2-3B-Instruct by Unsloth": {
        **_LLAMA_3, "eos_token_id": 128009, "head_dim": 128, "hidden_size": 3072, "intermediate_size": 8192,
        "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 24, "num_hidden_layers": 28,
        "pad_token_id": 128004, "rope_scaling": {**LLAMA3_ROPE, "factor": 32.0}, "tie_word_embeddings": True,
        "transformers_version": "4.47.1", "unsloth_fixed": True,
    },
    "Mistral-7B-Instruct-v0.1": {
        **_MISTRAL, "max_position_embeddings": 32768, "rope_theta": 10000.0, "sliding_window": 4096,
        "transformers_version": "4.34.0.dev0", "vocab_size": 32000,
    },
    "Mistral-7B-Instruct-v0.3": {
        **_MISTRAL, "attention_dropout": 0.0, "max_position_embeddings": 32768, "rope_theta": 1000000.0,
        "sliding_window": None, "transformers_version": "4.42.0.dev0", "vocab_size": 32768,
    },
    "Mistral-Nemo-Instruct-2407": {
        **_MISTRAL, "attention_dropout": 0.0, "head_dim": 128, "hidden_size": 5120, "max_position_embeddings": 131072,
        "num_hidden_layers": 40, "rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 131072,
    },
    "Mistral-Small-24B-Instruct-2501": {
        **_MISTRAL, "attention_dropout": 0.0, "head_dim": 128, "hidden_size": 5120, "intermediate_size": 32768,
        "max_position_embeddings": 32768, "num_hidden_layers": 40, "rope_theta": 100000000.0, "sliding_window": None,
        "transformers_version": "4.49.0.dev0", "vocab_size": 131072,
    },
    "Mistral-Small-3.1-24B-Instruct-2503": {
        "architectures": ["Mistral3ForConditionalGeneration"], "image_token_index": 10, "model_type": "mistral3",
        "multimodal_projector_bias": False, "projector_hidden_act": "gelu", "spatial_merge_size": 2,
        "text_config": {
            "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120,
            "initializer_range": 0.02, "intermediate_size": 32768, "max_position_embeddings": 131072,
            "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05, "rope_theta": 1000000000.0, "sliding_window": None, "use_cache": True,
            "vocab_size": 131072,
        },
        "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0", "vision_feature_layer": -1,
        "vision_config": {
            "attention_dropout": 0.0, "head_dim": 64, "hidden_act": "gelu", "hidden_size": 1024, "image_size": 1540,
            "initializer_range": 0.02, "intermediate_size": 4096, "model_type": "pixtral", "num_attention_heads": 16,
            "num_channels": 3, "num_hidden_layers": 24, "patch_size": 14, "rope_theta": 10000.0,
        },
    },
    "Ministral-3-8B-Instruct-2512": {
        "architectures": ["Mistral3ForConditionalGeneration"], "dtype": "bfloat16", "image_token_index": 10,
        "model_type": "mistral3", "multimodal_projector_bias": False, "projector_hidden_act": "gelu",
        "spatial_merge_size": 2, "tie_word_embeddings": False, "transformers_version": "5.0.0.dev0",
        "text_config": {
            "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
            "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 262144,
            "model_type": "ministral3", "num_attention_heads": 32, "num_hidden_layers": 34, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05, "sliding_window": None, "use_cache": True, "vocab_size": 131072,
            "rope_parameters": {
                "beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0, "llama_4_scaling_beta": 0.1, "mscale": 1.0,
                "mscale_all_dim": 1.0, "original_max_position_embeddings": 16384, "rope_theta": 1000000.0,
                "rope_type": "yarn", "type": "yarn",
            },
        },
        "vision_config": {
            "attention_dropout": 0.0, "head_dim": 64, "hidden_act": "silu", "hidden_size": 1024, "image_size": 1540,
            "intermediate_size": 4096, "model_type": "pixtral", "num_attention_heads": 16, "num_hidden_layers": 24,
            "patch_size": 14, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "vision_feature_layer": -1,
    },
    "Ministral-8B-Instruct-2410": {
        **_MISTRAL, "attention_dropout": 0.0, "head_dim": 128, "intermediate_size": 12288,
        "max_position_embeddings": 32768, "num_hidden_layers": 36, "rope_theta": 100000000.0, "sliding_window": 32768,
        "vocab_size": 131072,
    },
    "Phi-3-mini-4k-instruct": {
        **_PHI, "_name_or_path": "Phi-3-mini-4k-instruct", "bos_token_id": 1, "eos_token_id": 32000,
        "auto_map": {
            "AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
        },
        "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "original_max_position_embeddings": 4096,
        "pad_token_id": 32000, "rope_theta": 10000.0, "sliding_window": 2047, "transformers_version": "4.40.2",
        "vocab_size": 32064,
    },
    "Phi-4-mini-instruct": {
        **_PHI, "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "bos_token_id": 199999,
        "eos_token_id": 199999, "full_attn_mod": 1, "hidden_size": 3072, "intermediate_size": 8192,
        "interpolate_factor": 1, "lm_head_bias": False, "max_position_embeddings": 131072, "mlp_bias": False,
        "num_attention_heads": 24, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "original_max_position_embeddings": 4096, "pad_token_id": 199999, "partial_rotary_factor": 0.75,
        "rope_scaling": {"long_factor": [2.0] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
        "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": True, "transformers_version": "4.45.0",
        "vocab_size": 200064,
    },
    "Phi-3-mini-128k-instruct": {
        **_PHI, "bos_token_id": 1, "eos_token_id": 32000, "hidden_size": 3072, "intermediate_size": 8192,
        "max_position_embeddings": 131072, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "original_max_position_embeddings": 4096, "pad_token_id": 32000,
        "rope_scaling": {"long_factor": [2.0] * 48, "short_factor": [1.05] * 48, "type": "longrope"},
        "rope_theta": 10000.0, "sliding_window": 262144, "transformers_version": "4.40.2", "vocab_size": 32064,
    },
    "phi-4": {
        **_PHI, "bos_token_id": 100257, "eos_token_id": 100265, "hidden_size": 5120, "intermediate_size": 17920,
        "max_position_embeddings": 16384, "num_attention_heads": 40, "num_hidden_layers": 40,
        "num_key_value_heads": 10, "original_max_position_embeddings": 16384, "pad_token_id": 100349,
        "rope_theta": 250000, "sliding_window": None, "transformers_version": "4.47.0", "vocab_size": 100352,
    },
    "Qwen2-7B-Instruct": {**_QWEN_2, "vocab_size": 152064},
    "Qwen2.5-0.5B-Instruct": {
        **_QWEN_2, "hidden_size": 896, "intermediate_size": 4864, "max_window_layers": 21, "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "sliding_window": 32768, "tie_word_embeddings": True,
    },
    "Qwen2.5-7B-Instruct with YaRN as its card says": {
        **_QWEN_2, "vocab_size": 152064,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    },
    "DeepSeek-R1-Distill-Qwen-1.5B": {
        **_QWEN_2, "eos_token_id": 151643, "hidden_size": 1536, "intermediate_size": 8960, "max_window_layers": 21,
        "max_position_embeddings": 131072, "num_attention_heads": 12, "num_key_value_heads": 2, "rope_theta": 10000,
        "sliding_window": 4096, "use_mrope": False,
    },
    "Qwen2.5-7B-Instruct-GPTQ-Int4": {
        **_QWEN_2, "vocab_size": 152064, "quantization_config": {
            "batch_size": 1, "bits": 4, "block_name_to_quantize": None, "cache_block_outputs": True,
            "damp_percent": 0.01, "dataset": None, "desc_act": False, "exllama_config": {"version": 1},
            "group_size": 128, "max_input_length": None, "model_seqlen": None,
            "module_name_preceding_first_block": None, "modules_in_block_to_quantize": None, "pad_token_id": None,
            "quant_method": "gptq", "sym": True, "tokenizer": None, "true_sequential": True, "use_cuda_fp16": False,
            "use_exllama": True,
        },
    },
    "Meta-Llama-3.1-8B-Instruct-AWQ-INT4": {
        **_LLAMA_3, "eos_token_id": [128001, 128008, 128009], "max_position_embeddings": 131072, "mlp_bias": False,
        "rope_scaling": LLAMA3_ROPE, "torch_dtype": "float16", "transformers_version": "4.43.0.dev0",
        "quantization_config": {
            "bits": 4, "group_size": 128, "modules_to_not_convert": None, "quant_method": "awq", "version": "gemm",
            "zero_point": True,
        },
    },
    "Qwen3-8B-FP8": {
        **_QWEN_3, "hidden_size": 4096, "intermediate_size": 12288, "max_window_layers": 36,
        "num_attention_heads": 32, "num_hidden_layers": 36, "tie_word_embeddings": False, "quantization_config": {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
        },
    },
    "Qwen3-0.6B": _QWEN_3,
    "Qwen3-32B": {
        **_QWEN_3, "hidden_size": 5120, "intermediate_size": 25600, "max_window_layers": 64,
        "num_attention_heads": 64, "num_hidden_layers": 64, "tie_word_embeddings": False,
    },
    "Qwen3.6-27B": {
        "architectures": ["Qwen3_5ForConditionalGeneration"], "image_token_id": 248056, "language_model_only": False,
        "model_type": "qwen3_5", "text_config": _QWEN_3_5, "tie_word_embeddings": False,
        "transformers_version": "5.3.0", "video_token_id": 248057, "vision_end_token_id": 248054,
        "vision_start_token_id": 248053,
        "vision_config": {
            "deepstack_visual_indexes": [], "depth": 27, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 1152,
            "in_channels": 3, "initializer_range": 0.02, "intermediate_size": 4304, "model_type": "qwen3_5",
            "num_heads": 16, "num_position_embeddings": 2304, "out_hidden_size": 5120, "patch_size": 16,
            "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
    },
    "Qwen3.5-4B": {
        "architectures": ["Qwen3_5ForConditionalGeneration"], "image_token_id": 248056, "model_type": "qwen3_5",
        "text_config": {
            **_QWEN_3_5, "hidden_size": 2560, "intermediate_size": 9216,
            "layer_types": [*["linear_attention"] * 3, "full_attention"] * 8, "linear_num_value_heads": 32,
            "mlp_only_layers": [], "num_attention_heads": 16, "num_hidden_layers": 32, "tie_word_embeddings": True,
        },
        "tie_word_embeddings": True, "transformers_version": "4.57.0.dev0", "video_token_id": 248057,
        "vision_config": {
            "deepstack_visual_indexes": [], "depth": 24, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 1024,
            "in_channels": 3, "initializer_range": 0.02, "intermediate_size": 4096, "model_type": "qwen3_5",
            "num_heads": 16, "num_position_embeddings": 2304, "out_hidden_size": 2560, "patch_size": 16,
            "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
        "vision_end_token_id": 248054, "vision_start_token_id": 248053,
    },
    "Qwen3.6-35B-A3B": {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"], "image_token_id": 248056, "model_type": "qwen3_5_moe",
        "text_config": {
            **{key: value for key, value in _QWEN_3_5.items() if key != "intermediate_size"},
            "hidden_size": 2048, "layer_types": [*["linear_attention"] * 3, "full_attention"] * 10,
            "linear_num_value_heads": 32, "mlp_only_layers": [], "model_type": "qwen3_5_moe_text",
            "moe_intermediate_size": 512, "num_attention_heads": 16, "num_experts": 256, "num_experts_per_tok": 8,
            "num_hidden_layers": 40, "num_key_value_heads": 2, "router_aux_loss_coef": 0.001,
            "shared_expert_intermediate_size": 512,
        },
        "tie_word_embeddings": False, "transformers_version": "5.3.0", "video_token_id": 248057,
        "vision_config": {"depth": 27, "hidden_size": 1152, "model_type": "qwen3_5_moe", "out_hidden_size": 2048},
        "vision_end_token_id": 248054, "vision_start_token_id": 248053,
    },
    "Qwen3-Next-80B-A3B-Instruct": {
        "architectures": ["Qwen3NextForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "full_attention_interval": 4,
        "head_dim": 256, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 5120, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_value_head_dim": 128,
        "max_position_embeddings": 262144, "mlp_only_layers": [], "model_type": "qwen3_next",
        "moe_intermediate_size": 512, "norm_topk_prob": True, "num_attention_heads": 16, "num_experts": 512,
        "num_experts_per_tok": 10, "num_hidden_layers": 48, "num_key_value_heads": 2, "output_router_logits": False,
        "partial_rotary_factor": 0.25, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000000,
        "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 512, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.57.0.dev0", "use_cache": True,
        "use_sliding_window": False, "vocab_size": 151936,
    },
    "Qwen3-Embedding-0.6B": {**_QWEN_3, "eos_token_id": 151643, "max_position_embeddings": 32768, "vocab_size": 151669},
    "Qwen3-30B-A3B": {
        **_QWEN_3, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "decoder_sparse_step": 1,
        "hidden_size": 2048, "intermediate_size": 6144, "max_window_layers": 48, "mlp_only_layers": [],
        "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False,
        "router_aux_loss_coef": 0.001, "tie_word_embeddings": False,
    },
    "Qwen3-Coder-30B-A3B-Instruct": {
        **_QWEN_3, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "decoder_sparse_step": 1,
        "hidden_size": 2048, "intermediate_size": 5472, "max_position_embeddings": 262144, "mlp_only_layers": [],
        "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False,
        "qkv_bias": False, "rope_theta": 10000000, "router_aux_loss_coef": 0.0, "shared_expert_intermediate_size": 0,
        "tie_word_embeddings": False, "transformers_version": "4.52.3", "use_qk_norm": True,
    },
    "DeepSeek-R1-0528-Qwen3-8B": {
        **_QWEN_3, "hidden_size": 4096, "intermediate_size": 12288, "max_position_embeddings": 131072,
        "max_window_layers": 36, "num_attention_heads": 32, "num_hidden_layers": 36, "tie_word_embeddings": False,
        "rope_scaling": {
            "attn_factor": 0.8782488562869419, "factor": 4.0, "original_max_position_embeddings": 32768,
            "rope_type": "yarn",
        },
    },
    "Mixtral-8x7B-Instruct-v0.1": {
        **_MISTRAL, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "attention_dropout": 0.0,
        "max_position_embeddings": 32768, "num_experts_per_tok": 2, "num_local_experts": 8,
        "output_router_logits": False, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
        "transformers_version": "4.36.0.dev0", "vocab_size": 32000,
    },
    "gpt-oss-20b": {
        "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
        "eos_token_id": 200002, "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880,
        "initial_context_length": 4096, "initializer_range": 0.02, "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072,
        "model_type": "gpt_oss", "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24,
        "num_key_value_heads": 8,
        "num_local_experts": 32, "output_router_logits": False, "pad_token_id": 199999, "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
            ],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": 1e-05, "rope_scaling": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
            "rope_type": "yarn", "truncate": False,
        },
        "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
        "tie_word_embeddings": False, "transformers_version": "4.55.0.dev0", "use_cache": True, "vocab_size": 201088,
    },
    "Qwen3-8B as transformers 5 writes it": {
        **{key: value for key, value in _QWEN_3.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")},
        "dtype": "bfloat16", "layer_types": ["full_attention"] * 28, "pad_token_id": None,
        "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}, "transformers_version": "5.24.0",
    },
}  # fmt: skip

SLIDING_AND_FULL = ["sliding_attention", "full_attention"]
OTHER_CONFIGS: dict[str, dict[str, Any]] = {
    "Phi-4-mini-instruct": {
        **_PHI, "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "bos_token_id": 199999,
        "eos_token_id": 199999, "full_attn_mod": 1, "hidden_size": 3072, "intermediate_size": 8192,
        "interpolate_factor": 1, "lm_head_bias": False, "max_position_embeddings": 131072, "mlp_bias": False,
        "num_attention_heads": 24, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "original_max_position_embeddings": 4096, "pad_token_id": 199999, "partial_rotary_factor": 0.75,
        "rope_scaling": {"long_factor": [1.5] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
        "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": True,
        "transformers_version": "4.45.0", "vocab_size": 200064,
    },
    "GLM-4.5-Air": {
        "architectures": ["Glm4MoeForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
        "pad_token_id": 151329, "eos_token_id": [151329, 151336, 151338], "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 4096, "partial_rotary_factor": 0.5, "initializer_range": 0.02, "intermediate_size": 10944,
        "max_position_embeddings": 131072, "model_type": "glm4_moe", "moe_intermediate_size": 1408,
        "norm_topk_prob": True, "num_attention_heads": 96, "n_group": 1, "topk_group": 1, "n_routed_experts": 128,
        "n_shared_experts": 1, "routed_scaling_factor": 1.0, "num_experts_per_tok": 8, "first_k_dense_replace": 1,
        "num_hidden_layers": 46, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "rope_theta": 1000000, "num_nextn_predict_layers": 1, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.54.0", "use_cache": True, "use_qk_norm": False, "vocab_size": 151552,
    },
    "DeepSeek-V3": {
        "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "auto_map": {
            "AutoConfig": "configuration_deepseek.DeepseekV3Config",
            "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
        },
        "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu",
        "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512,
        "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 2048,
        "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
        "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "quantization_config": {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
        },
        "rms_norm_eps": 1e-06, "rope_scaling": {
            "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096, "type": "yarn",
        },
        "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False,
        "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.33.1",
        "use_cache": True, "v_head_dim": 128, "vocab_size": 129280,
    },
}  # fmt: skip
"""Of families and forms that may be missing here: they load, or are refused by name."""
