"""Which keys of a config.json matter.

A model is refused if its config.json holds a key that was not read and may change what the model computes: no answer is
better than a wrong one.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from llm.config import ModelConfig
from llm.errors import ConfigError

_MAX_VALUE_CHARS = 80

_HARMLESS_NAMES = re.compile(r"_.*|unsloth_.*|transformers\.js_config|.*dropout.*|.*_pdrop")
"""Names of keys for notes of transformers and other tools, and for settings that only affect training."""


def key_names(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


_HARMLESS = key_names("""
    architectures model_type name_or_path torch_dtype dtype transformers_version tokenizer_class model_max_length
    finetuning_task task_specific_params problem_type id2label label2id num_labels prefix is_llama_config
    use_cache cache_implementation attn_implementation use_flash_attn gradient_checkpointing initializer_range
    neftune_noise_alpha
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id
    output_attentions output_hidden_states output_scores output_logits output_router_logits return_dict
    return_dict_in_generate torchscript tf_legacy_loss use_bfloat16 chunk_size_feed_forward pretraining_tp
    bos_token eos_token pad_token unk_token padding_side tokenizer_model_max_length seq_length max_model_len loss_type
    use_flash_attention use_flash_attention_2 use_liger
    is_decoder tie_encoder_decoder cross_attention_hidden_size max_sequence_length router_aux_loss_coef
    aux_loss_alpha seq_aux ep_size
    max_length min_length max_new_tokens min_new_tokens do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p min_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    is_matryoshka matryoshka_dimensions classifier_from_token is_original_qwen3_reranker sentence_transformers
    attention_bias mlp_bias bias qkv_bias max_window_layers
""")
"""Keys that do not affect what a model computes if its family does not read them. Sampling is the matter of
generation_config.json. The weights themselves show whether there are biases; a weight without a place is refused.
`max_window_layers` means nothing without a window that can be switched on."""

_MAX_INT = 2**31 - 1


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _MAX_INT


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


_KINDS: tuple[tuple[str, Callable[[Any], bool], frozenset[str]], ...] = (
    (
        "a whole number above 0",
        lambda value: _is_whole(value) and value > 0,
        key_names("""
            vocab_size hidden_size num_hidden_layers num_attention_heads head_dim
            max_position_embeddings original_max_position_embeddings decoder_sparse_step sliding_window_pattern
            full_attention_interval
        """),
    ),
    (
        "a whole number",
        _is_whole,
        key_names("""
            intermediate_size num_key_value_heads sliding_window max_window_layers
            num_experts num_local_experts num_experts_per_tok moe_intermediate_size
            shared_expert_intermediate_size
            experts_per_token initial_context_length
            n_routed_experts n_shared_experts n_group topk_group first_k_dense_replace moe_layer_freq
            num_nextn_predict_layers kv_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim qk_head_dim v_head_dim
        """),
    ),
    ("a number above 0", lambda value: _is_number(value) and value > 0, key_names("query_pre_attn_scalar")),
    (
        "a number",
        _is_number,
        key_names("""
            rms_norm_eps rope_theta partial_rotary_factor factor low_freq_factor high_freq_factor attention_factor
            beta_fast beta_slow mscale mscale_all_dim attn_factor rope_local_base_freq
            llama_4_scaling_beta
            attn_logit_softcapping final_logit_softcapping swiglu_alpha swiglu_limit routed_scaling_factor
        """),
    ),
    (
        "true or false",
        lambda value: isinstance(value, bool),
        key_names("""
            tie_word_embeddings attention_bias mlp_bias use_sliding_window truncate norm_topk_prob use_qk_norm
            rope_interleave
        """),
    ),
    (
        "text",
        lambda value: isinstance(value, str),
        key_names("hidden_act hidden_activation rope_type type model_type topk_method scoring_func"),
    ),
    ("an object", lambda value: isinstance(value, dict), key_names("rope_scaling rope_parameters text_config")),
    (
        "a list of words",
        lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
        key_names("layer_types mlp_layer_types"),
    ),
    (
        "a list of whole numbers",
        lambda value: isinstance(value, list) and all(isinstance(item, int) for item in value),
        key_names("mlp_only_layers"),
    ),
    (
        "a list of words",
        lambda value: isinstance(value, str) or (isinstance(value, list) and all(isinstance(i, str) for i in value)),
        key_names("architectures"),
    ),
)
"""The kinds of values that keys must have, including keys inside RoPE's parameters: each with its name, a test for it,
and its keys."""

_KIND_OF = {key: (kind, is_kind) for kind, is_kind, keys in _KINDS for key in keys}


def check_kind(key: str, value: Any) -> None:
    """Refuse a value whose type is wrong for its key. Null counts as no value and is accepted.

    Raises:
        ConfigError: names the key, its value, and what it must be.
    """
    kind, is_kind = _KIND_OF.get(key, ("", None))
    if value is not None and is_kind is not None and not is_kind(value):
        raise ConfigError(f"{key!r} is {shown(value)}, but must be {kind}; correct it")


Neutral = Callable[[Any, ModelConfig], bool]


def _only(*values: object) -> Neutral:
    return lambda value, _: value in values


_NEUTRAL: dict[str, Neutral] = {
    "activation": _only("swiglu"),  # Falcon3's name for a gated MLP with silu
    "add_cross_attention": _only(False),
    "alibi": _only(False),
    "attention_multiplier": lambda value, model: value == model.head_size**-0.5,
    "attn_logit_softcapping": _only(0),
    "auto_map": _only({}),
    "decoder_sparse_step": lambda value, model: value == 1 and not model.dense_layers,
    "dual_chunk_attention_config": _only({}),
    "embedding_multiplier": _only(1),
    "final_logit_softcapping": _only(0),
    "full_attn_mod": _only(1),  # Phi-4's note of an option that it does not use
    "interpolate_factor": _only(1),
    "is_causal": _only(True),
    "is_encoder_decoder": _only(False),
    "lm_head_bias": _only(False),
    "logit_scale": _only(1),
    "logits_scaling": _only(1),
    "mlp_only_layers": lambda value, model: set(value) == set(model.dense_layers),
    "no_rope_layers": lambda value, _: all(value),  # 1 for a layer that has RoPE
    "norm_topk_prob": lambda value, model: not model.num_experts or value == model.normalize_expert_weights,
    "num_experts": _only(0),
    "num_local_experts": lambda value, model: value == model.num_experts,
    "num_nextn_predict_layers": _only(0),
    "original_max_position_embeddings": lambda value, model: (
        model.rope_scaling is None or value == model.rope_scaling.original_max_position_embeddings
    ),
    "pruned_heads": _only({}, []),
    "qk_layernorm": lambda value, model: value == model.qk_norm,
    "query_pre_attn_scalar": lambda value, model: value == model.head_size,
    "residual_multiplier": _only(1),
    "rope_interleaved": _only(False),
    "shared_expert_intermediate_size": lambda value, model: value == model.shared_expert_size,
    "transformers_weights": _only("model.safetensors"),
    "use_bidirectional_attention": _only(False),
    "use_mrope": _only(False),
    "use_parallel_residual": _only(False),
    "use_qk_norm": lambda value, model: value == model.qk_norm,
}
"""Keys that change what a model computes, each with the values at which it changes nothing. Null never changes
anything."""


class ReadKeys(Mapping[str, Any]):
    """A configuration that remembers which of its keys were read, and returns only values of the right type.

    A key whose value is null counts as missing.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._content = content
        self._read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        value = self._content[key]
        if value is None:
            raise KeyError(key)
        check_kind(key, value)
        return value

    def __iter__(self) -> Iterator[str]:
        return (key for key, value in self._content.items() if value is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def fill(self, defaults: Mapping[str, Any]) -> None:
        """Set the default values of missing keys."""
        self._content = {**defaults, **self._content}

    def refuse_unread(self, model: ModelConfig, architecture: str) -> None:
        """Refuse a key that has not been read and that may change what the model computes.

        Args:
            model: the configuration made from the keys that were read.
            architecture: its name, for the message.

        Raises:
            ConfigError: names the key, its value, and what to do.
        """
        for key, value in self._content.items():
            if value is None or key in self._read or key in _HARMLESS or _HARMLESS_NAMES.fullmatch(key):
                continue
            if key not in _NEUTRAL:
                near = get_close_matches(key, sorted(self._read), n=1)
                raise ConfigError(
                    f"{key!r} ({shown(value)}) is not a known key of {architecture} and may change what the model "
                    f"computes; {f'did you mean {near[0]!r}? Else ' if near else ''}"
                    "remove it if the model computes the same without it"
                )
            if not _is_neutral(key, value, model):
                raise ConfigError(
                    f"{key!r} is {shown(value)}, which changes what the model computes and is not supported for "
                    f"{architecture}; use another checkpoint, or remove the key if the model was trained without it"
                )


def _is_neutral(key: str, value: Any, model: ModelConfig) -> bool:
    try:
        return _NEUTRAL[key](value, model)
    except TypeError:  # a value of an unexpected type may change anything
        return False


def shown(value: object) -> str:
    """A value as text for a message, shortened if it is long."""
    text = repr(value)
    return text if len(text) <= _MAX_VALUE_CHARS else text[:_MAX_VALUE_CHARS] + "…"
