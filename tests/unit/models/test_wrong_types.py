"""Values of the wrong type in any JSON file of a checkpoint: one line that names file and key, never a traceback."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from real_configs import REAL_CONFIGS

from llm.checkpoint.adapter import check_lora
from llm.checkpoint.generation_defaults import load_generation_defaults
from llm.checkpoint.model_config import load_model_config
from llm.config import ModelConfig
from llm.errors import LLMError
from llm.tokenization.hf_tokenizer import HFTokenizer

DEMO = Path(__file__).parents[3] / "configs" / "demo"

NUMBERS = st.integers(-5, 5) | st.sampled_from([10**30, -0.5, 1e400])
SCALARS = st.none() | st.booleans() | NUMBERS | st.sampled_from(["", "x", "5"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["content", "type", "5", "name"]), inner, max_size=3)
    ),
    max_leaves=6,
)
FIXTURES = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)

CONFIGS = ["Llama-3.1-8B-Instruct", "Qwen2.5-7B-Instruct with YaRN as its card says", "Phi-3-mini-4k-instruct"]
CONFIG_KEYS = sorted({
    *(key for name in CONFIGS for key in REAL_CONFIGS[name]), "rope_parameters", "layer_types", "partial_rotary_factor",
    "quantization_config", "no_rope_layers", "attention_multiplier", "query_pre_attn_scalar", "num_experts",
    "max_window_layers", "head_dim",
})  # fmt: skip
ROPE_KEYS = [
    "rope_type",
    "type",
    "factor",
    "low_freq_factor",
    "original_max_position_embeddings",
    "rope_theta",
    "truncate",
]
GENERATION: dict[str, Any] = {
    "do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1,
    "max_new_tokens": 9, "min_new_tokens": 1, "stop_strings": ["x"], "suppress_tokens": [5], "eos_token_id": [2],
    "bos_token_id": 1, "bad_words_ids": None, "num_beams": 1, "sequence_bias": None,
}  # fmt: skip
TOKENIZER_KEYS = [
    "bos_token", "eos_token", "pad_token", "chat_template", "added_tokens_decoder", "additional_special_tokens",
    "extra_special_tokens", "add_bos_token", "add_eos_token", "model_max_length", "tokenizer_class",
]  # fmt: skip
ADAPTER: dict[str, Any] = {
    "peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False,
    "bias": "none", "init_lora_weights": True, "use_dora": False,
}  # fmt: skip


def refusal(load: Any) -> str:
    """What is said in one line; "" where nothing is."""
    message = ""
    try:
        load()
    except LLMError as error:
        message = str(error)
    assert "\n" not in message
    return message


@settings(FIXTURES, max_examples=400)
@given(name=st.sampled_from(CONFIGS), key=st.sampled_from(CONFIG_KEYS), value=VALUES)
def test_config(tmp_path, name, key, value):
    """What is refused names the key; that one, or another that it no longer goes with."""
    (tmp_path / "config.json").write_text(json.dumps({**REAL_CONFIGS[name], key: value}))
    for load in (load_model_config, load_generation_defaults):
        message = refusal(lambda load=load: load(tmp_path))
        assert not message or message.startswith(f"{tmp_path}/config.json: ")


TYPED = {
    "vocab_size": "x", "hidden_size": "4096", "num_hidden_layers": 2.5, "num_attention_heads": True, "head_dim": [128],
    "num_key_value_heads": "8", "max_position_embeddings": {}, "rms_norm_eps": "1e-5", "rope_theta": "5e5",
    "tie_word_embeddings": "false", "hidden_act": ["silu"], "layer_types": 5, "sliding_window": "64",
    "use_sliding_window": "yes", "attention_bias": 1, "mlp_bias": "no", "rope_scaling": ["yarn"], "architectures": 5,
    "partial_rotary_factor": "0.5", "intermediate_size": 1e400, "rope_parameters": "default", "no_rope_layers": 5,
}  # fmt: skip


@pytest.mark.parametrize("key", TYPED)
def test_config_names_the_key(tmp_path, key):
    (tmp_path / "config.json").write_text(json.dumps({**REAL_CONFIGS["Llama-3.1-8B-Instruct"], key: TYPED[key]}))
    message = refusal(lambda: load_model_config(tmp_path))
    assert message.startswith(f"{tmp_path}/config.json: '{key}' is {TYPED[key]!r}")


@FIXTURES
@given(key=st.sampled_from(ROPE_KEYS), value=VALUES)
def test_rope(tmp_path, key, value):
    config = REAL_CONFIGS["Llama-3.1-8B-Instruct"]
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "rope_scaling": {**config["rope_scaling"], key: value}})
    )
    message = refusal(lambda: load_model_config(tmp_path))
    assert not message or message.startswith(f"{tmp_path}/config.json: ")


@settings(FIXTURES, max_examples=300)
@given(key=st.sampled_from(sorted(GENERATION)), value=VALUES)
def test_generation_config(tmp_path, key, value):
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({**GENERATION, key: value}))
    message = refusal(lambda: load_generation_defaults(tmp_path))
    assert not message or (message.startswith(f"{path}: ") and key.removesuffix("_id") in message)


@settings(FIXTURES, max_examples=60)
@given(key=st.sampled_from(TOKENIZER_KEYS), value=VALUES)
def test_tokenizer_config(tmp_path, key, value):
    (tmp_path / "tokenizer.json").write_text(SMALL_TOKENIZER)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({key: value}))
    message = refusal(lambda: HFTokenizer.from_pretrained(tmp_path))
    assert not message or message.startswith(f"{path}: ")


SMALL_TOKENIZER = json.dumps({
    "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": None,
    "post_processor": None, "decoder": None, "added_tokens": [],
    "model": {"type": "WordLevel", "vocab": {"a": 0, "x": 1}, "unk_token": "x"},
})  # fmt: skip


@settings(FIXTURES, max_examples=150)
@given(key=st.sampled_from(sorted(ADAPTER)), value=VALUES | st.dictionaries(st.sampled_from(["q", "("]), SCALARS))
def test_adapter_config(tmp_path, key, value):
    """The weights are missing, which is said where the configuration is fine."""
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**ADAPTER, key: value}))
    message = refusal(lambda: check_lora(SHAPE, tmp_path))
    assert message.startswith((f"{path}: ", f"{tmp_path}/adapter_model.safetensors is missing"))


SHAPE = ModelConfig(vocab_size=8, hidden_size=8, num_heads=2, num_layers=1, intermediate_size=8)
