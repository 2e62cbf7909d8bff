"""Which keys of a config.json count.

A model is refused if its config.json holds a key that nobody here read and that may change what the model computes:
better no answer than a wrong one.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from llm.config import ModelConfig
from llm.errors import ConfigError

_MAX_VALUE_CHARS = 80

_HARMLESS_NAMES = re.compile(r"_.*|unsloth_.*|transformers\.js_config|.*dropout.*|.*_pdrop")
"""transformers' own notes, tools' notes, and what only training does."""


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
    is_decoder tie_encoder_decoder cross_attention_hidden_size max_sequence_length router_aux_loss_coef
    max_length min_length max_new_tokens min_new_tokens do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p min_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    attention_bias mlp_bias bias qkv_bias max_window_layers
""")
"""Keys without effect on what a model computes, where its family does not read them. Sampling is
generation_config.json's. Whether there are biases is seen from the weights, which are refused if one has no place.
`max_window_layers` says nothing without a window that can be switched."""

Neutral = Callable[[Any, ModelConfig], bool]


def _only(*values: object) -> Neutral:
    return lambda value, _: value in values


_NEUTRAL: dict[str, Neutral] = {
    "activation": _only("swiglu"),  # Falcon3's word for a gated MLP with silu
    "add_cross_attention": _only(False),
    "alibi": _only(False),
    "attention_multiplier": lambda value, model: value == model.head_size**-0.5,
    "attn_logit_softcapping": _only(0),
    "auto_map": _only({}),
    "dual_chunk_attention_config": _only({}),
    "embedding_multiplier": _only(1),
    "final_logit_softcapping": _only(0),
    "is_causal": _only(True),
    "is_encoder_decoder": _only(False),
    "logit_scale": _only(1),
    "logits_scaling": _only(1),
    "no_rope_layers": lambda value, _: all(value),  # 1 for a layer that has RoPE
    "num_experts": _only(0),
    "num_local_experts": _only(0),
    "num_nextn_predict_layers": _only(0),
    "original_max_position_embeddings": lambda value, model: (
        model.rope_scaling is None or value == model.rope_scaling.original_max_position_embeddings
    ),
    "pruned_heads": _only({}, []),
    "qk_layernorm": lambda value, model: value == model.qk_norm,
    "query_pre_attn_scalar": lambda value, model: value == model.head_size,
    "residual_multiplier": _only(1),
    "rope_interleaved": _only(False),
    "use_bidirectional_attention": _only(False),
    "use_mrope": _only(False),
    "use_parallel_residual": _only(False),
    "use_qk_norm": lambda value, model: value == model.qk_norm,
}
"""Keys that change what a model computes, with the values at which they do not. A null never does."""


class ReadKeys(Mapping[str, Any]):
    """A configuration that remembers which of its keys were looked at."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._content = content
        self._read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return self._content[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)

    def refuse_unread(self, model: ModelConfig, architecture: str) -> None:
        """Refuse a key that nobody has looked at and that may change what the model computes.

        Args:
            model: what the keys that were read have made.
            architecture: its name, for the message.

        Raises:
            ConfigError: the key, its value, and what to do.
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
            if not _NEUTRAL[key](value, model):
                raise ConfigError(
                    f"{key!r} is {shown(value)}, which changes what the model computes and is not supported for "
                    f"{architecture}; use another checkpoint, or remove the key if the model was trained without it"
                )


def shown(value: object) -> str:
    """A value for a message, cut short."""
    text = repr(value)
    return text if len(text) <= _MAX_VALUE_CHARS else text[:_MAX_VALUE_CHARS] + "…"
