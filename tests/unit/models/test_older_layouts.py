"""Directories as transformers 4.40 to 4.57 wrote them: what they compute is what today's directory computes.

Each configuration stands here as those versions' `save_pretrained` laid it out: `torch_dtype` for `dtype`, `rope_theta`
and `rope_scaling` (with `type` before 4.43 and `rope_type` since) for `rope_parameters`, no `layer_types` before 4.53.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from llm.checkpoint.generation_defaults import load_generation_defaults
from llm.checkpoint.loading import load_decoder

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
SHAPE: dict[str, Any] = {
    "_attn_implementation_autoset": True, "_name_or_path": "/home/somebody/checkpoint-500", "attention_dropout": 0.0,
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 64, "initializer_range": 0.2,
    "intermediate_size": 96, "max_position_embeddings": 512, "num_attention_heads": 8, "num_hidden_layers": 3,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "torch_dtype": "float32", "use_cache": True, "vocab_size": 199,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    **SHAPE, "architectures": ["LlamaForCausalLM"], "attention_bias": False, "head_dim": 8, "mlp_bias": False,
    "model_type": "llama", "pretraining_tp": 1, "rope_scaling": None, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "transformers_version": "4.46.1",
}  # fmt: skip
QWEN: dict[str, Any] = {
    **SHAPE, "max_window_layers": 28, "rope_scaling": None, "rope_theta": 10000.0, "sliding_window": None,
    "tie_word_embeddings": False, "transformers_version": "4.51.3", "use_sliding_window": False,
}  # fmt: skip
QWEN2: dict[str, Any] = {**QWEN, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}

LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama, 4.40": (
        "llama",
        {**{key: value for key, value in LLAMA.items() if key not in ("head_dim", "mlp_bias")},
         "transformers_version": "4.40.0", "pad_token_id": 2},
    ),
    "llama, a list of ends": ("llama", {**LLAMA, "eos_token_id": [2, 5], "pad_token_id": -1}),
    "llama3 rope": ("llama_llama3", {**LLAMA, "rope_scaling": {**LLAMA3, "rope_type": "llama3"}, "rope_theta": 500.0}),
    "linear rope, 4.42": (
        "llama_linear", {**LLAMA, "rope_scaling": {"factor": 4.0, "type": "linear"}, "rope_theta": 500.0},
    ),
    "linear rope under both words, 4.45": (
        "llama_linear",
        {**LLAMA, "rope_scaling": {"factor": 4.0, "rope_type": "linear", "type": "linear"}, "rope_theta": 500.0},
    ),
    "mistral": (
        "mistral_window",
        {**SHAPE, "architectures": ["MistralForCausalLM"], "head_dim": None, "model_type": "mistral",
         "rope_theta": 10000.0, "sliding_window": 17, "tie_word_embeddings": False, "transformers_version": "4.47.1"},
    ),
    "phi3": (
        "phi3_window",
        {**SHAPE, "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "auto_map": {
            "AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
         "embd_pdrop": 0.0, "model_type": "phi3", "original_max_position_embeddings": 4096, "pad_token_id": 5,
         "partial_rotary_factor": 1.0, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling": None,
         "rope_theta": 10000.0, "sliding_window": 17, "tie_word_embeddings": False, "transformers_version": "4.48.3"},
    ),
    "qwen2": ("qwen2", QWEN2),
    "qwen2, a window that is off": ("qwen2", {**QWEN2, "sliding_window": 13, "max_window_layers": 1}),
    "qwen2, a window": (
        "qwen2_window", {**QWEN2, "sliding_window": 13, "max_window_layers": 1, "use_sliding_window": True},
    ),
    "qwen2, layer types of 4.53": (
        "qwen2_window",
        {**QWEN2, "sliding_window": 13, "max_window_layers": 1, "use_sliding_window": True,
         "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
         "transformers_version": "4.53.2"},
    ),
    "qwen2 yarn": ("qwen2_yarn", {**QWEN2, "rope_scaling": {**YARN, "type": "yarn"}, "rope_theta": 500.0}),
    "qwen3": (
        "qwen3",
        {**QWEN, "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 24, "model_type": "qwen3"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
@torch.inference_mode()
def test_it_computes_what_todays_directory_computes(checkpoints, tmp_path, name):
    kind, config = LAYOUTS[name]
    source, theirs = checkpoints(kind)
    if "rms_norm_eps" in config and config["rms_norm_eps"] != theirs.config.rms_norm_eps:
        config = {**config, "rms_norm_eps": theirs.config.rms_norm_eps}
    directory = Path(shutil.copytree(source, tmp_path / "older"))
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    generation = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "transformers_version": "4.46.1"}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    ids = torch.arange(3, 150).unsqueeze(0)
    torch.testing.assert_close(load_decoder(directory, progress=False)(ids), theirs(ids).logits, atol=1e-4, rtol=0)
    defaults = load_generation_defaults(directory)
    assert (defaults.eos_token_ids, defaults.warnings) == ({2}, ())
