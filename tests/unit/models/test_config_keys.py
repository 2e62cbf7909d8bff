"""Every key of a config.json is read, known as harmless, or refused at load by its name."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from real_configs import LLAMA3_ROPE, OTHER_CONFIGS, REAL_CONFIGS
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llm.attention.rope import rope_frequencies
from llm.checkpoint.model_config import load_model_config
from llm.errors import CheckpointError, ConfigError, LLMError

LLAMA = REAL_CONFIGS["Llama-3.1-8B-Instruct"]
QWEN3 = REAL_CONFIGS["Qwen3-0.6B"]
FULL, SLIDING = "full_attention", "sliding_attention"


def write(directory: Path, config: dict[str, Any], **changes: Any) -> Path:
    (directory / "config.json").write_text(json.dumps({**config, **changes}))
    return directory


@pytest.mark.parametrize("name", REAL_CONFIGS)
def test_real_checkpoints_load_with_all_their_keys(tmp_path, name):
    config = load_model_config(write(tmp_path, REAL_CONFIGS[name]))
    theirs = AutoConfig.from_pretrained(tmp_path).get_text_config()
    rope = theirs.rope_parameters.get(FULL, theirs.rope_parameters)
    assert config.rope_theta == rope["rope_theta"]
    assert (config.rope_scaling is None) == (rope["rope_type"] == "default")
    assert config.window_size == theirs.to_dict().get("sliding_window")
    if SLIDING in theirs.rope_parameters:
        assert config.window_rope_theta == theirs.rope_parameters[SLIDING]["rope_theta"]
    if hasattr(theirs, "query_pre_attn_scalar"):
        layers = [i for i, kind in enumerate(theirs.layer_types) if kind == SLIDING]
        assert config.window_layers == tuple(layers)
        shape = (theirs.num_attention_heads, theirs.num_key_value_heads, theirs.head_dim, theirs.vocab_size)
        assert (config.num_heads, config.kv_heads, config.head_size, config.vocab_size) == shape
        assert config.attention_scale == theirs.query_pre_attn_scalar**-0.5
        assert config.max_seq_len == theirs.max_position_embeddings
        assert config.logit_soft_cap == theirs.final_logit_softcapping
        assert config.attention_soft_cap == theirs.attn_logit_softcapping
        assert config.tie_embeddings


@pytest.mark.parametrize("name", REAL_CONFIGS)
def test_what_transformers_makes_of_them_loads_to_the_same_model(tmp_path, name):
    """transformers 5 writes its own defaults and moves RoPE's parameters; the model stays what it is."""
    ours = load_model_config(write(tmp_path, REAL_CONFIGS[name]))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    again = load_model_config(tmp_path)
    assert (again.head_size, again.kv_heads) == (ours.head_size, ours.kv_heads)
    filled = {"head_dim": ours.head_size, "num_kv_heads": ours.kv_heads}
    assert again.model_copy(update=filled) == ours.model_copy(update=filled)


@pytest.mark.parametrize("name", OTHER_CONFIGS)
def test_published_configurations_load_or_are_refused_by_name(tmp_path, name):
    """One line, with the architecture or the kind that is missing."""
    directory = write(tmp_path, OTHER_CONFIGS[name])
    try:
        assert load_model_config(directory).num_layers == OTHER_CONFIGS[name]["num_hidden_layers"]
    except LLMError as error:
        message = str(error)
        assert message.startswith(f"{directory}/config.json: ")
        assert "is not supported; supported: " in message
        assert OTHER_CONFIGS[name]["architectures"][0] in message or "longrope" in message
        assert "\n" not in message


CLASSES = {
    "DeepseekV2ForCausalLM": "DeepseekV2Config", "DeepseekV3ForCausalLM": "DeepseekV3Config",
    "Glm4MoeLiteForCausalLM": "Glm4MoeLiteConfig", "GptOssForCausalLM": "GptOssConfig",
    "Ministral3ForCausalLM": "Ministral3Config", "Mistral3ForConditionalGeneration": "Mistral3Config",
    "Qwen3NextForCausalLM": "Qwen3NextConfig", "Qwen3_5ForConditionalGeneration": "Qwen3_5Config",
    "Qwen3_5MoeForConditionalGeneration": "Qwen3_5MoeConfig",
}  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
def test_what_transformers_knows_beyond_loads_or_is_refused_by_name(tmp_path, name):
    """The configuration that transformers' own class writes."""
    needed = {"num_experts_per_tok": 6} if name == "DeepseekV2ForCausalLM" else {}  # null, which no model can be
    getattr(transformers, CLASSES[name])(architectures=[name], **needed).save_pretrained(tmp_path)
    try:
        assert load_model_config(tmp_path).architecture == name
    except CheckpointError as error:
        message = str(error)
        assert message.startswith(f"{tmp_path}/config.json: architecture {name} is not supported; supported: ")
        assert "\n" not in message


@pytest.mark.parametrize("transformers_version", [4, 5])
def test_what_gpt_oss_does_not_say_is_what_it_was_trained_with(tmp_path, transformers_version):
    """Its published file says all, so what is missing in another has to become the same."""
    full = REAL_CONFIGS["gpt-oss-20b"]
    lacking = {*LACKING, "layer_types", "rope_scaling", "swiglu_limit", "attention_bias", "num_experts_per_tok"}
    config = {key: value for key, value in full.items() if key not in lacking}
    config |= {"rope_scaling": None} if transformers_version == 4 else {"rope_parameters": None}
    expected = load_model_config(write(tmp_path, full))
    assert expected.window_layers == tuple(range(0, 24, 2))
    assert load_model_config(write(tmp_path, config)) == expected


@pytest.mark.parametrize(("key", "value"), [("experts_per_token", 5), ("initial_context_length", 8192)])
def test_keys_of_openai_that_contradict_the_others_are_refused(tmp_path, key, value):
    with pytest.raises(ConfigError, match=f"'{key}' is {value}, but"):
        load_model_config(write(tmp_path, REAL_CONFIGS["gpt-oss-20b"], **{key: value}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("topk_method", "greedy"), ("scoring_func", "softmax"), ("moe_layer_freq", 2), ("n_group", 3),
        ("topk_group", 2), ("num_experts_per_tok", 129),
    ],
)  # fmt: skip
def test_other_ways_to_choose_experts_are_refused_by_name(tmp_path, key, value):
    with pytest.raises(ConfigError, match=f"'{key}' is {value!r}|experts cannot be|num_experts"):
        load_model_config(write(tmp_path, OTHER_CONFIGS["GLM-4.5-Air"], **{key: value}))


LACKING = ["num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "sliding_window", "hidden_act"]


@pytest.mark.parametrize("key", LACKING)
@pytest.mark.parametrize("name", {config["architectures"][0]: name for name, config in REAL_CONFIGS.items()}.values())
def test_a_key_that_is_not_there_means_what_it_means_in_transformers(tmp_path, name, key):
    """Each family has defaults of its own, which no weight's shape shows: a window, an epsilon."""
    config = {name: value for name, value in REAL_CONFIGS[name].items() if name != key}
    if "text_config" in config:
        config["text_config"] = {name: value for name, value in config["text_config"].items() if name != key}
    theirs = AutoConfig.from_pretrained(write(tmp_path, config)).get_text_config()
    if theirs.num_attention_heads % theirs.num_key_value_heads:
        with pytest.raises(ConfigError, match="num_kv_heads"):
            load_model_config(tmp_path)
        return
    ours = load_model_config(tmp_path)
    rope = theirs.rope_parameters.get(FULL, theirs.rope_parameters)
    heads = (theirs.num_key_value_heads, getattr(theirs, "head_dim", None) or ours.hidden_size // ours.num_heads)
    assert (ours.kv_heads, ours.head_size) == heads
    assert (ours.rms_norm_eps, ours.rope_theta) == (theirs.rms_norm_eps, rope["rope_theta"])
    assert ours.window_size == theirs.to_dict().get("sliding_window")


NEUTRAL = {
    "activation": "swiglu", "attention_multiplier": 128**-0.5, "attn_logit_softcapping": None, "auto_map": {},
    "embedding_multiplier": 1.0, "final_logit_softcapping": None, "is_causal": True, "logits_scaling": 1,
    "no_rope_layers": [1] * 32, "num_experts": 0, "partial_rotary_factor": 1.0, "qk_layernorm": False,
    "query_pre_attn_scalar": 128, "residual_multiplier": 1.0, "rope_interleaved": False, "use_mrope": False,
    "layer_types": [FULL] * 32, "sliding_window": None, "never_heard_of": None, "hidden_act": "swish",
    "attention_probs_dropout_prob": 0.1, "_anything": 1, "use_sliding_window": False,
    "mlp_only_layers": [], "decoder_sparse_step": 1, "norm_topk_prob": True,
}  # fmt: skip


@pytest.mark.parametrize("key", NEUTRAL)
def test_values_that_change_nothing_are_fine(tmp_path, key):
    assert load_model_config(write(tmp_path, LLAMA, **{key: NEUTRAL[key]})) == load_model_config(write(tmp_path, LLAMA))


REFUSED = {
    "activation": "gelu", "alibi": True, "attention_multiplier": 0.015, "attn_logit_softcapping": 50.0,
    "auto_map": {"AutoModelForCausalLM": "modeling_mine.Model"}, "dual_chunk_attention_config": {"chunk_size": 1},
    "embedding_multiplier": 12.0, "final_logit_softcapping": 30.0, "hidden_act": "gelu", "is_causal": False,
    "layer_types": [FULL] * 31 + ["linear_attention"], "logits_scaling": 8.0, "no_rope_layers": [1, 1, 1, 0] * 8,
    "num_local_experts": 8, "shared_expert_intermediate_size": 64, "transformers_weights": "x.safetensors",
    "partial_rotary_factor": 0.5, "qk_layernorm": True, "query_pre_attn_scalar": 256,
    "residual_multiplier": 0.22, "rope_interleaved": True, "sliding_window": 4096, "use_bidirectional_attention": True,
    "rope_parameters": {FULL: {"rope_theta": 1e6}, SLIDING: {"rope_theta": 1e4}}, "rope_scaling": {"factor": 2.0},
    "never_heard_of": False, "log_scale": False, "rope_thetta": 5e5,
    "mlp_only_layers": [3], "decoder_sparse_step": 2,
}  # fmt: skip


def test_yarns_factor_of_deepseek_counts(tmp_path):
    """YaRN's own code multiplies by it; here it takes back what the longer context adds, as its authors meant."""
    name = "DeepSeek-R1-0528-Qwen3-8B"
    scaling = load_model_config(write(tmp_path, REAL_CONFIGS[name])).rope_scaling
    _, factor = rope_frequencies(128, 1e6, scaling, 131072, 131072)
    assert factor == pytest.approx(1.0, abs=1e-6)
    llama3 = {**LLAMA3_ROPE, "attn_factor": 0.9}
    with pytest.raises(ConfigError, match=r"'attn_factor' .0\.9. means nothing to RoPE of type 'llama3'"):
        load_model_config(write(tmp_path, LLAMA, rope_scaling=llama3))


NEUTRAL_OF_EXPERTS = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "num_local_experts": 256}


@pytest.mark.parametrize("key", NEUTRAL_OF_EXPERTS)
def test_what_all_models_of_a_family_do_anyway_may_be_said(tmp_path, key):
    """Qwen3.5's experts: in every layer, with weights that add up to 1."""
    name = "Qwen3.6-35B-A3B"
    usual = load_model_config(write(tmp_path, REAL_CONFIGS[name]))
    text = {**REAL_CONFIGS[name]["text_config"], key: NEUTRAL_OF_EXPERTS[key]}
    assert load_model_config(write(tmp_path, REAL_CONFIGS[name], text_config=text)) == usual
    text[key] = {"norm_topk_prob": False, "decoder_sparse_step": 2, "mlp_only_layers": [1], "num_local_experts": 8}[key]
    with pytest.raises(ConfigError, match=f"'{key}' is "):
        load_model_config(write(tmp_path, REAL_CONFIGS[name], text_config=text))


DIVISORS = {
    "Qwen3-30B-A3B": ("decoder_sparse_step", "num_attention_heads", "hidden_size"),
    "Qwen3-Next-80B-A3B-Instruct": ("full_attention_interval",),
    "Qwen3.6-27B": ("full_attention_interval",),
    "gemma-3-1b-it": ("sliding_window_pattern", "query_pre_attn_scalar"),
    "Phi-3-mini-128k-instruct": ("original_max_position_embeddings",),
    "GLM-4.5-Air": ("num_attention_heads",),
}


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in DIVISORS.items() for key in keys])
def test_what_others_are_divided_by_is_above_0(tmp_path, name, key, value):
    config = copy.deepcopy((REAL_CONFIGS | OTHER_CONFIGS)[name])
    config.get("text_config", config)[key] = value
    with pytest.raises(ConfigError, match=rf"'{key}' is {value}, but must be a (whole )?number above 0"):
        load_model_config(write(tmp_path, config))


@pytest.mark.parametrize("key", ["factor", "mscale_all_dim"])
@pytest.mark.parametrize("value", [1e308, 1e400])
def test_numbers_that_cannot_be_counted_with_are_one_line(tmp_path, key, value):
    scaling = {**OTHER_CONFIGS["DeepSeek-V3"]["rope_scaling"], key: value}
    with pytest.raises(ConfigError, match=r"config\.json: ('\w+' is inf, but must be|a number is too)"):
        load_model_config(write(tmp_path, OTHER_CONFIGS["DeepSeek-V3"], rope_scaling=scaling))


@pytest.mark.parametrize("key", ["mscale", "mscale_all_dim"])
def test_a_scale_of_0_is_none_as_in_transformers(tmp_path, key):
    """Files of Mistral's have `mscale_all_dim: 0.0`."""
    yarn = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096, "mscale": 1.0}
    config = {**LLAMA, "rope_scaling": {**yarn, "mscale_all_dim": 1.0, key: 0.0}}
    scaling = load_model_config(write(tmp_path, config)).rope_scaling
    theirs = AutoConfig.from_pretrained(tmp_path)
    theirs.rope_parameters["rope_theta"] = 500000.0
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    ours, our_factor = rope_frequencies(128, 500000.0, scaling, 131072, 131072)
    assert our_factor == pytest.approx(factor)
    torch.testing.assert_close(ours, frequencies)


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "num_key_value_heads", "max_position_embeddings"])
def test_sizes_that_no_model_has_are_refused_before_anything_is_made(tmp_path, key):
    value = 2**30
    with pytest.raises(ConfigError, match=f"{key}: Input should be less than"):
        load_model_config(write(tmp_path, {**LLAMA, "num_attention_heads": 32}, **{key: value}))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architectures": None}, "'architectures' is missing; add the class"),
        ({"architectures": ["MistralModel"]}, r"set 'architectures' to \['MistralForCausalLM'\] and 'tie_word_embedd"),
        ({"architectures": ["BertModel"]}, "architecture BertModel is not supported; supported: "),
    ],
)
def test_architectures_that_cannot_generate(tmp_path, changes, reason):
    with pytest.raises(CheckpointError, match=reason):
        load_model_config(write(tmp_path, LLAMA, **changes))


@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
def test_checkpoints_of_mlx_are_refused_by_name(tmp_path, key):
    with pytest.raises(ConfigError, match=rf"{key} \(.*\) is the format of MLX, which is not supported"):
        load_model_config(write(tmp_path, LLAMA, **{key: {"group_size": 64, "bits": 4}}))


@pytest.mark.parametrize("key", REFUSED)
def test_whatever_may_change_the_mathematics_is_refused_by_name(tmp_path, key):
    """One line that names the file, the key, and its value."""
    base = {name: value for name, value in LLAMA.items() if name != "rope_scaling"}
    with pytest.raises(ConfigError) as caught:
        load_model_config(write(tmp_path, base, **{key: REFUSED[key]}))
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "config.json"))
    assert "\n" not in message
    assert key in message or (key == "rope_scaling" and "'factor'" in message)
    assert any(word in message for word in ("remove", "only", "correct", "use a"))


def test_a_misspelt_key_gets_the_right_one(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'rope_theta'"):
        load_model_config(write(tmp_path, LLAMA, rope_thetta=1e6))


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        (LLAMA, "use_sliding_window", True),
        (QWEN3, "qk_layernorm", False),
        ({**QWEN3, "use_sliding_window": True}, "layer_types", [SLIDING] * 28),
        (QWEN3, "layer_types", [SLIDING] * 28),
    ],
)
def test_keys_are_judged_by_family_and_together(tmp_path, config, key, value):
    """A window for each layer without a size, a switch without a window to switch, a norm that Qwen3 has."""
    if key == "use_sliding_window":
        assert load_model_config(write(tmp_path, config, **{key: value})).window_size is None
        return
    with pytest.raises(ConfigError, match=key):
        load_model_config(write(tmp_path, config, **{key: value}))


ROPE = {"rope_theta": 7.0, "rope_type": "default"}


def test_rope_parameters_for_each_layer_type(tmp_path):
    """The same set for every layer is that set; sets that differ, or none for some layers, are refused."""
    base = {name: value for name, value in LLAMA.items() if name not in ("rope_scaling", "rope_theta")}
    for nested in ({FULL: ROPE}, {FULL: ROPE, SLIDING: dict(ROPE)}):
        assert load_model_config(write(tmp_path, base, rope_parameters=nested)).rope_theta == 7
    for nested in ({FULL: ROPE, SLIDING: {**ROPE, "rope_theta": 8.0}}, {FULL: ROPE, SLIDING: None}):
        with pytest.raises(ConfigError, match="'rope_parameters' differs by layer"):
            load_model_config(write(tmp_path, base, rope_parameters=nested))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rope_scaling": LLAMA3_ROPE, "rope_parameters": ROPE}, "rope_parameters and rope_scaling differ"),
        ({"rope_scaling": 4.0}, "'rope_scaling' is 4.0, but must be an object"),
        ({"rope_scaling": {"factor": 4.0}}, "'factor' .4.0. means nothing to RoPE of type 'default'"),
        ({"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}}, "'mrope_section'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "alpha": 1000.0}}, "'alpha'"),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, "longrope needs short_factor and long_factor"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}}, "1 factors for 64 pairs"),
    ],
)
def test_rope_that_is_not_understood(tmp_path, changes, reason):
    with pytest.raises(ConfigError, match=reason):
        load_model_config(write(tmp_path, LLAMA, **changes))


def test_rope_that_stretches_longer_sequences_alone_changes_nothing(tmp_path):
    """NTK's dynamic kind: a sequence as long as the engine serves has the angles that the model was trained with."""
    rope = {"rope_type": "dynamic", "factor": 4.0}
    inv_freq, _ = ROPE_INIT_FUNCTIONS["dynamic"](
        AutoConfig.for_model("llama", rope_parameters={**rope, "rope_theta": 7e4})
    )
    base = {name: value for name, value in LLAMA.items() if name != "rope_scaling"}
    config = load_model_config(write(tmp_path, base, rope_scaling=rope, rope_theta=7e4))
    assert config == load_model_config(write(tmp_path, base, rope_theta=7e4))
    ours, _ = rope_frequencies(128, config.rope_theta, config.rope_scaling, config.max_seq_len, config.max_seq_len)
    torch.testing.assert_close(ours, inv_freq)


def test_both_generations_of_rope_may_stand_side_by_side_where_they_agree(tmp_path):
    """`type` is the older word for `rope_type`, and `rope_theta` moved into the newer one."""
    base = {name: value for name, value in LLAMA.items() if name not in ("rope_scaling", "rope_theta")}
    older = {**{key: value for key, value in LLAMA3_ROPE.items() if key != "rope_type"}, "type": "llama3"}
    newer = {**LLAMA3_ROPE, "rope_theta": 5e5}
    config = load_model_config(write(tmp_path, base, rope_scaling=older, rope_parameters=newer))
    assert config == load_model_config(write(tmp_path, LLAMA))
    with pytest.raises(ConfigError, match="rope_parameters and rope_scaling differ"):
        load_model_config(write(tmp_path, base, rope_scaling={**older, "factor": 4.0}, rope_parameters=newer))


GEMMA_3 = REAL_CONFIGS["gemma-3-1b-it"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_bidirectional_attention": True}, "'use_bidirectional_attention' is True"),
        ({"attn_logit_softcapping": 50.0}, "'attn_logit_softcapping' is 50.0"),
        ({"hidden_activation": "silu"}, "hidden_activation 'silu' is not supported; only gelu_pytorch_tanh is"),
        ({"rope_parameters": {"rope_theta": 1e6}}, "must hold a set for full_attention and one for sliding_attention"),
        ({"rope_parameters": {SLIDING: {"rope_type": "linear", "factor": 2.0}}}, "sliding_attention .* stretch"),
        ({"rope_parameters": {FULL: {"factor": 2.0}}, "rope_scaling": {"factor": 8.0}}, "rope_scaling differ"),
        ({"never_heard_of": 1}, "'never_heard_of'"),
    ],
)
def test_what_gemma_3_does_not_understand(tmp_path, changes, reason):
    """In a file of its own, and as the text half of one that takes images."""
    with pytest.raises(ConfigError, match=reason):
        load_model_config(write(tmp_path, GEMMA_3, **changes))
    whole = REAL_CONFIGS["gemma-3-4b-it"]
    with pytest.raises(ConfigError, match=reason):
        load_model_config(write(tmp_path, whole, text_config={**whole["text_config"], **changes}))


def test_a_key_beside_the_text_half_counts_too(tmp_path):
    whole = REAL_CONFIGS["gemma-3-4b-it"]
    assert not load_model_config(write(tmp_path, whole, tie_word_embeddings=False)).tie_embeddings
    with pytest.raises(ConfigError, match="'never_heard_of'"):
        load_model_config(write(tmp_path, whole, never_heard_of=1))
    with pytest.raises(ConfigError, match=r"'text_config' is .., but must be an object"):
        load_model_config(write(tmp_path, whole, text_config=[]))


def test_a_trained_length_beside_rope_scaling_must_agree_with_it(tmp_path):
    """Only some of transformers' families read it there, and these do not."""
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    directory = write(tmp_path, QWEN3, rope_scaling=scaling, original_max_position_embeddings=4096)
    assert load_model_config(directory).rope_scaling is not None
    with pytest.raises(ConfigError, match="'original_max_position_embeddings' is 8192"):
        load_model_config(write(tmp_path, QWEN3, rope_scaling=scaling, original_max_position_embeddings=8192))
