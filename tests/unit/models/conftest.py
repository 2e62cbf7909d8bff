"""Small random checkpoints of each architecture, saved by transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    Glm4MoeConfig,
    Glm4MoeLiteConfig,
    GptOssConfig,
    LlamaConfig,
    Ministral3Config,
    MinistralConfig,
    Mistral3Config,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

SHAPE: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # wide enough that the likeliest token depends on all of the context
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "attn_implementation": "eager",
}


def llama(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**{**SHAPE, **changes})


def qwen3_moe(**changes: Any) -> Qwen3MoeConfig:
    shape = {"head_dim": 24, "num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
    return Qwen3MoeConfig(**{**SHAPE, **shape, **changes})


HYBRID: dict[str, Any] = {
    **SHAPE, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 24, "num_hidden_layers": 5, "head_dim": 32, "initializer_range": 0.03,
}  # fmt: skip
MIXTURE: dict[str, Any] = {
    "num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 56,
}  # fmt: skip


def qwen3_5(**changes: Any) -> Qwen3_5TextConfig:
    return Qwen3_5TextConfig(**{**HYBRID, **changes})


def qwen3_5_moe(**changes: Any) -> Qwen3_5MoeTextConfig:
    return Qwen3_5MoeTextConfig(**{**HYBRID, **MIXTURE, **changes})


def qwen3_next(**changes: Any) -> Qwen3NextConfig:
    return Qwen3NextConfig(**{**HYBRID, **MIXTURE, **changes})


def gpt_oss(**changes: Any) -> GptOssConfig:
    """Experts whose gates and what they gate both reach their bounds."""
    layers = ["sliding_attention", "sliding_attention", "full_attention"]
    shape = {"head_dim": 16, "num_local_experts": 6, "sliding_window": 17, "layer_types": layers, "swiglu_limit": 1.5}
    yarn = {**YARN, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
    return GptOssConfig(**{**SHAPE, **shape, **rope("yarn", **yarn), **changes})


ROUTED: dict[str, Any] = {
    "n_routed_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "n_shared_experts": 2,
    "first_k_dense_replace": 1, "routed_scaling_factor": 1.7,
}  # fmt: skip
"""Experts as DeepSeek's families have them."""
LATENT: dict[str, Any] = {
    **ROUTED, "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 24, "q_lora_rank": 40,
    "qk_nope_head_dim": 20, "qk_rope_head_dim": 8, "v_head_dim": 12,
}  # fmt: skip
"""Latent attention, every size another."""


def rope(kind: str, **changes: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **changes}}


GEMMA: dict[str, Any] = {**SHAPE, "head_dim": 16, "sliding_window": 17, "initializer_range": 0.05}
"""Embeddings that are scaled, and are the head too, have to be small, or the likeliest token is the one just seen."""


def gemma_3(**changes: Any) -> dict[str, Any]:
    """Two windowed layers to one that sees everything, with RoPE of its own."""
    ropes = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    }
    own = {"query_pre_attn_scalar": 40, "sliding_window_pattern": 3, "num_hidden_layers": 4}
    return {**GEMMA, **own, "rope_parameters": ropes, **changes}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 64}
MROPE = {"mrope_section": [3, 3, 2], "mrope_interleaved": True}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [1.0, 1.7, 4.0, 9.0],
}  # fmt: skip

DEEPSEEK_YARN = {**YARN, "factor": 16.0, "mscale": 0.7, "mscale_all_dim": 0.5, "beta_fast": 32.0, "beta_slow": 1.0}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "deepseek_v2": lambda: DeepseekV2Config(**{**SHAPE, **LATENT, "q_lora_rank": None}),
    "deepseek_v2_groups": lambda: DeepseekV2Config(
        **{**SHAPE, **LATENT, **rope("yarn", **DEEPSEEK_YARN)},
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
    ),
    "deepseek_v3": lambda: DeepseekV3Config(
        **{**SHAPE, **LATENT, **rope("yarn", **DEEPSEEK_YARN)}, n_group=4, topk_group=2
    ),
    "deepseek_v3_halves": lambda: DeepseekV3Config(
        **{**SHAPE, **LATENT, "q_lora_rank": None, "num_attention_heads": 3, "num_key_value_heads": 3},
        n_group=1,
        topk_group=1,
        rope_interleave=False,
        norm_topk_prob=False,
    ),
    "gemma2": lambda: Gemma2Config(
        **{
            **GEMMA,
            "query_pre_attn_scalar": 10,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 12.0,
            "tie_word_embeddings": False,
            "initializer_range": 0.2,
        }
    ),
    "gemma3": lambda: Gemma3TextConfig(**gemma_3()),
    "gemma3_untied": lambda: Gemma3TextConfig(
        **gemma_3(tie_word_embeddings=False, attention_bias=True, final_logit_softcapping=12.0, num_key_value_heads=4)
    ),
    "gemma3_text_half": lambda: Gemma3Config(
        text_config=gemma_3(vocab_size=207),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "vision_use_head": False,
        },
        mm_tokens_per_image=4,
        boi_token_index=200,
        eoi_token_index=201,
        image_token_index=202,
    ),
    "glm4_moe": lambda: Glm4MoeConfig(**{**SHAPE, **ROUTED, "use_qk_norm": True, "attention_bias": True}),
    "glm4_moe_groups": lambda: Glm4MoeConfig(
        **{
            **SHAPE,
            **ROUTED,
            "head_dim": 24,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": False,
            "n_shared_experts": 1,
        }
    ),
    "glm4_moe_lite": lambda: Glm4MoeLiteConfig(**{**SHAPE, **LATENT, "mlp_layer_types": ["sparse", "dense", "sparse"]}),
    "gpt_oss": gpt_oss,
    "gpt_oss_plain": lambda: gpt_oss(
        attention_bias=False, layer_types=None, rope_parameters={"rope_type": "default", "rope_theta": 500.0}
    ),
    "llama": llama,
    "llama_mha": lambda: llama(num_key_value_heads=8, tie_word_embeddings=True),
    "llama_mqa_biases": lambda: llama(num_key_value_heads=1, attention_bias=True, mlp_bias=True),
    "llama_llama3": lambda: llama(**rope("llama3", **LLAMA3)),
    "llama_linear": lambda: llama(**rope("linear", factor=4.0)),
    "llama_yarn": lambda: llama(**rope("yarn", **YARN)),
    "llama_yarn_mscale": lambda: llama(
        **rope("yarn", **YARN, mscale=0.7, mscale_all_dim=0.4, beta_fast=16.0, beta_slow=2.0, truncate=False)
    ),
    "mistral": lambda: MistralConfig(**{**SHAPE, "sliding_window": None, "head_dim": 16}),
    "ministral": lambda: MinistralConfig(
        **{
            **SHAPE,
            "head_dim": 16,
            "sliding_window": 17,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        }
    ),
    "ministral3": lambda: Ministral3Config(
        **{**SHAPE, "head_dim": 16},
        rope_parameters={
            "type": "yarn",
            "rope_theta": 500.0,
            "factor": 16.0,
            "original_max_position_embeddings": 32,
            "max_position_embeddings": 512,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale_all_dim": 1.0,
            "mscale": 1.0,
            "llama_4_scaling_beta": 0.4,
        },
    ),
    "mistral3_text_half": lambda: Mistral3Config(
        text_config={**SHAPE, "model_type": "mistral", "sliding_window": None, "head_dim": 16},
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "head_dim": 16,
            "image_size": 28,
            "patch_size": 14,
        },
        tie_word_embeddings=False,
    ),
    "mistral_window": lambda: MistralConfig(**{**SHAPE, "sliding_window": 17}),
    "mixtral": lambda: MixtralConfig(**{**SHAPE, "num_local_experts": 3, "sliding_window": 17}),
    "phi3": lambda: Phi3Config(**{**SHAPE, "sliding_window": None}),
    "phi3_partial": lambda: Phi3Config(
        **{**SHAPE, "hidden_size": 96, "partial_rotary_factor": 0.5, "tie_word_embeddings": True}
    ),
    "phi3_longrope": lambda: Phi3Config(
        **{**SHAPE, "rope_parameters": {**LONGROPE, "factor": 4.0}, "original_max_position_embeddings": 512}
    ),
    "phi3_longrope_long": lambda: Phi3Config(
        **{**SHAPE, "rope_parameters": LONGROPE, "original_max_position_embeddings": 32}
    ),
    "phi3_window": lambda: Phi3Config(**{**SHAPE, "sliding_window": 17}),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen2_tied": lambda: Qwen2Config(**{**SHAPE, "tie_word_embeddings": True}),
    "qwen2_window": lambda: Qwen2Config(
        **{**SHAPE, "use_sliding_window": True, "sliding_window": 13, "max_window_layers": 1}
    ),
    "qwen2_yarn": lambda: Qwen2Config(**{**SHAPE, **rope("yarn", **YARN)}),
    "qwen3": lambda: Qwen3Config(**{**SHAPE, "head_dim": 24}),
    "qwen3_5": qwen3_5,
    "qwen3_5_images": lambda: Qwen3_5Config(
        text_config=qwen3_5(**rope("default", partial_rotary_factor=0.5, **MROPE)).to_dict(),
        vision_config=VISION,
    ),
    "qwen3_5_moe": qwen3_5_moe,
    "qwen3_5_moe_images": lambda: Qwen3_5MoeConfig(
        text_config=qwen3_5_moe(**rope("default", partial_rotary_factor=0.5, **MROPE)).to_dict(), vision_config=VISION
    ),
    "qwen3_next": qwen3_next,
    "qwen3_next_dense": lambda: qwen3_next(
        decoder_sparse_step=2,
        mlp_only_layers=[3],
        norm_topk_prob=False,
        linear_num_value_heads=2,
        initializer_range=0.05,
    ),
    "qwen3_5_tied": lambda: qwen3_5(
        tie_word_embeddings=True,
        linear_num_value_heads=2,
        linear_conv_kernel_dim=3,
        layer_types=["full_attention", "linear_attention", "full_attention", "linear_attention", "linear_attention"],
    ),
    "qwen3_tied": lambda: Qwen3Config(**{**SHAPE, "head_dim": 16, "tie_word_embeddings": True, "attention_bias": True}),
    "qwen3_moe": lambda: qwen3_moe(norm_topk_prob=True, moe_intermediate_size=56),
    "qwen3_moe_dense": lambda: qwen3_moe(decoder_sparse_step=2, mlp_only_layers=[2], attention_bias=True),
}


def make_model(config: PreTrainedConfig, *, is_classifier: bool = False) -> PreTrainedModel:
    """A random model whose biases and norms are random too, so that a wrong one shows."""
    torch.manual_seed(0)
    auto = AutoModelForImageTextToText if hasattr(config, "text_config") else AutoModelForCausalLM
    auto = AutoModelForSequenceClassification if is_classifier else auto
    model = auto.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "sinks")):
                parameter.normal_(std=0.3)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.3)
    return model


class Checkpoints:
    """Saves each model once, on first use."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._models: dict[str, PreTrainedModel] = {}

    def __call__(self, kind: str, **changes: Any) -> tuple[Path, PreTrainedModel]:
        name = "-".join([kind, *(f"{key}={value}" for key, value in changes.items())])
        directory = self._root / name
        if name not in self._models:
            config = CONFIGS[kind]()
            for key, value in changes.items():
                setattr(config, key, value)
            self._models[name] = make_model(config, is_classifier="num_labels" in changes)
            self._models[name].save_pretrained(directory)
        return directory, self._models[name]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """`checkpoints(kind, **changes)` gives a directory and transformers' model; with `num_labels`, a classifier."""
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None takes a key out."""
    content = json.loads(path.read_text())
    content |= changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.fixture
def edit() -> Callable[..., None]:
    """`edit(path, key=value)`: see `edit_json`."""
    return edit_json
