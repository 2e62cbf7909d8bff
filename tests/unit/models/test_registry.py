"""config.json to `ModelConfig`, as either generation of transformers writes it; what cannot be used is refused."""

import json
from pathlib import Path

import pytest

from llm.checkpoint.generation_defaults import GenerationDefaults, load_generation_defaults
from llm.checkpoint.hub import resolve_model_path
from llm.checkpoint.model_config import load_model_config
from llm.config import RopeScalingType
from llm.errors import CheckpointError, ConfigError

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def write(directory: Path, **changes: object) -> Path:
    """A directory with a Llama config.json, changed; `...` takes a key out."""
    config = {key: value for key, value in {**LLAMA, **changes}.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_llama_as_transformers_4_wrote_it(tmp_path):
    config = load_model_config(write(tmp_path, rope_scaling=LLAMA3_ROPE))
    assert (config.num_layers, config.kv_heads, config.head_size, config.mlp_size) == (32, 8, 128, 14336)
    assert (config.rope_theta, config.max_seq_len) == (500000.0, 131072)
    assert config.rope_scaling is not None
    assert config.rope_scaling.rope_type is RopeScalingType.LLAMA3
    assert config.rope_scaling.original_max_position_embeddings == 8192


def test_rope_parameters_of_transformers_5_mean_the_same(tmp_path):
    old = load_model_config(write(tmp_path, rope_scaling=LLAMA3_ROPE))
    new = load_model_config(write(tmp_path, rope_theta=..., rope_parameters={**LLAMA3_ROPE, "rope_theta": 500000.0}))
    assert new == old
    assert (
        load_model_config(write(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 7.0})).rope_theta == 7
    )


@pytest.mark.parametrize(
    ("scaling", "trained_len", "context_len"),
    [
        ({"type": "linear", "factor": 4.0}, 4096, 16384),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 32768, 131072),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072, 131072),
        ({"rope_type": "default"}, 4096, 4096),
        ({"type": "dynamic", "factor": 2.0}, 4096, 4096),
        (None, 4096, 4096),
    ],
)
def test_scaling_stretches_the_context(tmp_path, scaling, trained_len, context_len):
    config = load_model_config(write(tmp_path, rope_scaling=scaling, max_position_embeddings=trained_len))
    assert config.max_seq_len == context_len


QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 4, "sliding_window": 64}
FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("changes", "window_size", "window_layers"),
    [
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 64}, 64, None),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, None, None),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 64, "use_sliding_window": False}, None, None),
        ({"architectures": ["LlamaForCausalLM"], "sliding_window": 131072}, None, None),
        ({"architectures": ["LlamaForCausalLM"], "sliding_window": 64, "use_sliding_window": False}, None, None),
        ({**QWEN2, "use_sliding_window": False}, None, None),
        (QWEN2, None, None),
        ({**QWEN2, "use_sliding_window": True, "max_window_layers": 3}, 64, (3,)),
        ({**QWEN2, "use_sliding_window": True, "max_window_layers": 0}, 64, None),
        ({**QWEN2, "use_sliding_window": True, "max_window_layers": 9}, None, None),
        ({**QWEN2, "use_sliding_window": True, "layer_types": [FULL, SLIDING, FULL, SLIDING]}, 64, (1, 3)),
        ({**QWEN2, "use_sliding_window": True, "layer_types": [SLIDING] * 4}, 64, None),
    ],
)
def test_sliding_windows(tmp_path, changes, window_size, window_layers):
    config = load_model_config(write(tmp_path, **changes))
    assert (config.window_size, config.window_layers) == (window_size, window_layers)


@pytest.mark.parametrize(
    ("changes", "biases", "qk_norm"),
    [
        ({}, (False, False, False), False),
        ({"attention_bias": True, "mlp_bias": True}, (True, True, True), False),
        ({"architectures": ["MistralForCausalLM"], "attention_bias": True}, (False, False, False), False),
        ({"architectures": ["Qwen2ForCausalLM"]}, (True, False, False), False),
        ({"architectures": ["Qwen3ForCausalLM"], "head_dim": None}, (False, False, False), True),
    ],
)
def test_biases_and_qk_norm(tmp_path, changes, biases, qk_norm):
    config = load_model_config(write(tmp_path, **changes))
    assert (config.attention_bias, config.attention_output_bias, config.mlp_bias) == biases
    assert config.qk_norm is qk_norm
    assert config.head_size == 128


@pytest.mark.parametrize(
    ("changes", "error", "reason"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, CheckpointError, "GPT2LMHeadModel is not supported; .*Llama"),
        ({"architectures": ...}, CheckpointError, "'architectures' is missing; add"),
        ({"quantization_config": {"bits": 4}}, ConfigError, "quantization_config: quant_method None is not supported"),
        ({"hidden_act": "gelu"}, ConfigError, "hidden_act 'gelu' is not supported"),
        ({"vocab_size": ...}, ConfigError, "'vocab_size' is missing"),
        ({"vocab_size": "many"}, ConfigError, "vocab_size"),
        ({"hidden_size": -1}, ConfigError, "hidden_size"),
        ({"num_hidden_layers": 0}, ConfigError, "'num_hidden_layers' is 0, but must be"),
        ({"num_key_value_heads": 5}, ConfigError, "num_heads 32 is not a multiple of num_kv_heads 5"),
        ({"max_position_embeddings": "x", "rope_scaling": None}, ConfigError, "max_position_embeddings"),
        ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, ConfigError, "rope type 'ntk' is not supported"),
        ({"rope_scaling": {"type": "yarn"}}, ConfigError, "factor"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, ConfigError, "partial_rotary_factor"),
        ({**QWEN2, "use_sliding_window": True, "layer_types": ["odd"] * 4}, ConfigError, "layer_types must hold 4"),
        ({**QWEN2, "layer_types": [SLIDING] * 4}, ConfigError, "there is no sliding_window"),
        ({"sliding_window": 64}, ConfigError, "'sliding_window' is 64, which LlamaForCausalLM does not have"),
        (
            {"tie_word_embeddings": "perhaps"},
            ConfigError,
            "'tie_word_embeddings' is 'perhaps', but must be",
        ),
        ({"compression_config": {"bits": 8}}, ConfigError, "compression_config: quant_method None is not supported"),
    ],
)
def test_what_cannot_be_used_is_one_line_that_names_the_file(tmp_path, changes, error, reason):
    with pytest.raises(error, match=reason) as info:
        load_model_config(write(tmp_path, **changes))
    assert str(info.value).startswith(str(tmp_path / "config.json"))
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(("content", "reason"), [(None, "is missing"), ("{", "as JSON"), ("[]", "JSON object")])
def test_a_config_that_is_no_json_object(tmp_path, content, reason):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=rf"config\.json .*{reason}"):
        load_model_config(tmp_path)


def test_generation_defaults(tmp_path):
    """Token ids fall back to config.json; `do_sample: false` means greedy; a top_k of 0 means all."""
    write(tmp_path, eos_token_id=2, bos_token_id=1)
    defaults = load_generation_defaults(tmp_path)
    assert (defaults.eos_token_ids, defaults.bos_token_id, defaults.temperature) == ({2}, 1, None)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [5, 6], "temperature": 0.6, "top_p": 0.9, "top_k": 0}))
    defaults = load_generation_defaults(tmp_path)
    assert (defaults.eos_token_ids, defaults.bos_token_id) == ({5, 6}, 1)
    assert (defaults.temperature, defaults.top_p, defaults.top_k) == (0.6, 0.9, None)
    path.write_text(json.dumps({"do_sample": False, "temperature": 0.6}))
    assert load_generation_defaults(tmp_path).temperature == 0


def generation(directory: Path, **found: object) -> GenerationDefaults:
    (write(directory) / "generation_config.json").write_text(json.dumps(found))
    return load_generation_defaults(directory)


def test_everything_the_engine_can_do_is_taken(tmp_path):
    defaults = generation(
        tmp_path, min_p=0.05, suppress_tokens=[7, 3], repetition_penalty=1.05, max_new_tokens=2048, min_new_tokens=1,
        stop_strings="###",
    )  # fmt: skip
    assert (defaults.min_p, defaults.suppress_tokens, defaults.repetition_penalty) == (0.05, (7, 3), 1.05)
    assert (defaults.max_new_tokens, defaults.min_new_tokens, defaults.stop_strings) == (2048, 1, ("###",))
    assert defaults.warnings == ()


NOT_DONE = {
    "begin_suppress_tokens": [220], "no_repeat_ngram_size": 3, "bad_words_ids": [[5]], "forced_eos_token_id": 2,
    "forced_bos_token_id": 1, "typical_p": 0.9, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1, "num_beams": 4,
    "guidance_scale": 1.5, "watermarking_config": {"bias": 2}, "exponential_decay_length_penalty": [10, 1.1],
    "sequence_bias": [[[5], 2.0]], "top_h": 0.4, "chat_format": "chatml", "max_time": 3,
}  # fmt: skip


@pytest.mark.parametrize("key", NOT_DONE)
def test_what_the_engine_cannot_do_is_named(tmp_path, key):
    (warning,) = generation(tmp_path, temperature=0.6, **{key: NOT_DONE[key]}).warnings
    assert warning.startswith(str(tmp_path / "generation_config.json"))
    assert f"{key}={NOT_DONE[key]!r}" in warning


@pytest.mark.parametrize(
    "found",
    [
        {"_from_model_config": True, "bos_token_id": 1, "do_sample": True, "eos_token_id": [128001, 128009],
         "pad_token_id": 0, "temperature": 0.6, "max_length": 4096, "top_p": 0.9, "transformers_version": "4.32.0"},
        {"bos_token_id": 5, "pad_token_id": 5, "do_sample": True, "eos_token_id": [6, 5], "repetition_penalty": 1.05,
         "temperature": 0.7, "top_p": 0.8, "top_k": 20, "transformers_version": "4.37.0"},
        {"num_beams": 1, "typical_p": 1.0, "no_repeat_ngram_size": 0, "bad_words_ids": None, "use_cache": True,
         "epsilon_cutoff": 0.0, "encoder_repetition_penalty": 1.0, "cache_implementation": "static"},
    ],
)  # fmt: skip
def test_real_files_and_neutral_values_warn_of_nothing(tmp_path, found):
    assert generation(tmp_path, **found).warnings == ()


def test_ids_that_the_model_does_not_have_are_left_out_with_a_warning(tmp_path):
    """Those between the tokenizer's last and the padded vocabulary's end are the model's own."""
    defaults = generation(tmp_path, eos_token_id=[2, 128255, 128256, -1, 2**40], suppress_tokens=[5, 10**9])
    assert defaults.eos_token_ids == {2, 128255}
    assert defaults.suppress_tokens == (5,)
    assert [warning.split(": ")[1] for warning in defaults.warnings] == [
        "eos_token_id [128256, -1, 1099511627776] is left out", "suppress_tokens [1000000000] is left out",
    ]  # fmt: skip
    (tmp_path / "generation_config.json").unlink()
    write(tmp_path, eos_token_id=128256)
    assert load_generation_defaults(tmp_path).eos_token_ids == frozenset()


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": "hot"}, {"top_p": 2}, {"eos_token_id": [[1]]}, {"eos_token_id": "x"}, {"eos_token_id": True},
        {"eos_token_id": [1.0]}, {"suppress_tokens": [False]}, {"min_p": True}, {"top_k": "5"}, {"stop_strings": [""]},
        {"max_new_tokens": 0}, {"suppress_tokens": list(range(600))},
    ],
)  # fmt: skip
def test_bad_generation_defaults_name_the_file(tmp_path, bad):
    (tmp_path / "generation_config.json").write_text(json.dumps(bad))
    with pytest.raises(ConfigError, match=r"generation_config\.json: "):
        load_generation_defaults(tmp_path)


NO_HUB = "http://127.0.0.1:9"
"""Nobody listens there."""


def test_resolving_a_model(tmp_path, monkeypatch):
    """A directory is itself; what is neither a directory nor can be had from the Hub is one line."""
    assert resolve_model_path(str(tmp_path)) == tmp_path
    (tmp_path / "file").touch()
    for name, reason in (
        (str(tmp_path / "missing"), "no such directory"),
        ("./missing", "no such directory"),
        ("just-a-name", "no such directory"),
        (str(tmp_path / "file"), "is a file"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            resolve_model_path(name)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", NO_HUB)
    with pytest.raises(
        CheckpointError, match=r"org/name is not a directory here.* cannot be downloaded .*ConnectError"
    ) as info:
        resolve_model_path("org/name")
    assert "\n" not in str(info.value)


def test_a_hub_download_takes_weights_and_configuration_only(tmp_path, monkeypatch):
    asked = {}

    def snapshot_download(model: str, **options: object) -> str:
        asked.update(options, model=model)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", NO_HUB)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve_model_path("org/name") == tmp_path
    assert asked["allow_patterns"] == ["*.safetensors", "*.json", "*.jinja"]
