"""What a checkpoint recommends for generation.

Sampling that generation_config.json recommends and the engine cannot do is named, not refused, since the model itself
computes the same.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, ValidationError

from llm.checkpoint.json_files import read_json
from llm.config import StrictModel, describe
from llm.errors import ConfigError
from llm.models.config_keys import key_names, shown

_TAKEN_AS_IS = ("top_p", "min_p", "repetition_penalty", "max_new_tokens", "min_new_tokens")
_APPLIED = frozenset({
    *_TAKEN_AS_IS, "do_sample", "temperature", "top_k", "stop_strings", "suppress_tokens", "eos_token_id",
    "bos_token_id",
})  # fmt: skip
"""Keys of generation_config.json that count."""


TokenId = Annotated[int, Field(ge=0)]


class GenerationDefaults(StrictModel):
    """What a checkpoint recommends for generation, for requests that say nothing; None where it does not."""

    model_config = ConfigDict(strict=True)

    temperature: float | None = Field(default=None, ge=0)
    """0 where the checkpoint says `do_sample: false`."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0)
    max_new_tokens: int | None = Field(default=None, ge=1)
    min_new_tokens: int | None = Field(default=None, ge=0)
    stop_strings: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    suppress_tokens: tuple[TokenId, ...] = Field(default=(), max_length=512)
    """Ids that are never generated; few enough to leave room for a request's own biases."""
    eos_token_ids: frozenset[TokenId] = frozenset()
    bos_token_id: int | None = None
    warnings: tuple[str, ...] = ()
    """What the checkpoint recommends and this engine does not do, each in one line that names the file."""


_WITHOUT_EFFECT = re.compile(r"_.*|output_.*|assistant_.*|.*cache.*|.*compile.*|transformers_version|trust_remote_code")
_HARMLESS = key_names("""
    pad_token_id decoder_start_token_id return_dict_in_generate num_return_sequences low_memory max_length
    renormalize_logits remove_invalid_values prompt_lookup_num_tokens max_matching_ngram_size num_assistant_tokens
    num_assistant_tokens_schedule is_assistant target_lookbehind prefill_chunk_size speculation_type use_mtp
    early_stopping length_penalty num_beam_groups diversity_penalty
""")
"""Without effect on a default request: notes, ways to be faster, beams' details without beams, and `max_length`, since
answers end at the context's end where nothing else is asked for."""

_NEUTRAL: dict[str, tuple[object, ...]] = {
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "guidance_scale": (1,),
    "min_length": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "sequence_bias": ([], {}),
    "token_healing": (False,),
    "typical_p": (1,),
}
"""What the engine cannot do, with the values at which there is nothing to do."""


def _not_applied(found: Mapping[str, Any]) -> list[str]:
    """Names and values of what a generation_config.json recommends and the engine does not do, as `key=value`."""
    return [
        f"{key}={shown(value)}"
        for key, value in found.items()
        if not (
            value is None
            or key in _APPLIED
            or key in _HARMLESS
            or _WITHOUT_EFFECT.fullmatch(key)
            or value in _NEUTRAL.get(key, ())
        )
    ]


def load_generation_defaults(directory: str | Path) -> GenerationDefaults:
    """What the checkpoint in `directory` recommends: generation_config.json, and config.json for token ids.

    Ids that the model cannot generate, because they are not in its vocabulary, are left out with a warning.

    Raises:
        ConfigError: one of the files holds something that cannot be used. Missing ones are fine.
    """
    directory = Path(directory)
    path, config_path = directory / "generation_config.json", directory / "config.json"
    found = read_json(path) if path.exists() else {}
    config = read_json(config_path) if config_path.exists() else {}
    ids = {key: config.get(key) if found.get(key) is None else found[key] for key in ("eos_token_id", "bos_token_id")}
    warnings = [f"{path}: {what} is not applied: the engine cannot do it" for what in _not_applied(found)]
    vocab_size = find_vocab_size(directory)
    known: dict[str, list[Any]] = {}
    for key, value in (("eos_token_id", ids["eos_token_id"]), ("suppress_tokens", found.get("suppress_tokens"))):
        known[key], unknown = _split_ids(value, vocab_size)
        if unknown:
            warnings.append(f"{path}: {key} {shown(unknown)} is left out: the model has {vocab_size} ids")
    top_k, stop = found.get("top_k"), found.get("stop_strings")
    try:
        return GenerationDefaults(
            **{key: found.get(key) for key in _TAKEN_AS_IS},
            temperature=0.0 if found.get("do_sample") is False else found.get("temperature"),
            top_k=None if top_k in (0, -1) else top_k,
            stop_strings=() if stop is None else (stop,) if isinstance(stop, str) else tuple(stop),
            suppress_tokens=tuple(known["suppress_tokens"]),
            eos_token_ids=frozenset(known["eos_token_id"]),
            bos_token_id=ids["bos_token_id"],
            warnings=tuple(warnings),
        )
    except (ValidationError, TypeError) as error:
        reason = describe(error) if isinstance(error, ValidationError) else str(error)
        raise ConfigError(f"{path}: {reason}; correct or remove it") from error


def find_vocab_size(directory: str | Path) -> int | None:
    """Ids of the model in `directory`, below which are all tokens that it can draw; None where nothing says so."""
    path = Path(directory) / "config.json"
    size = read_json(path).get("vocab_size") if path.exists() else None
    return size if isinstance(size, int) else None


def load_vocab_size(directory: str | Path) -> int:
    """The same of a model that must be there.

    Raises:
        ConfigError: config.json is missing, or does not say it.
    """
    path = Path(directory) / "config.json"
    size = read_json(path).get("vocab_size")
    if not isinstance(size, int):
        raise ConfigError(f"{path}: 'vocab_size' is missing; download the checkpoint's config.json again")
    return size


def _split_ids(value: Any, vocab_size: int | None) -> tuple[list[Any], list[Any]]:
    """Ids that a model can draw, and those that it cannot; what is no id counts as one, to be refused later."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    unknown = [i for i in ids if isinstance(i, int) and not 0 <= i < (vocab_size or i + 1)]
    return [i for i in ids if i not in unknown], unknown
