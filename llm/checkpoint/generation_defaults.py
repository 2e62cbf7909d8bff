"""What a checkpoint recommends for generation.

Sampling that generation_config.json recommends and the engine cannot do is named, not refused, since the model itself
computes the same.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, ValidationError

from llm.checkpoint.json_files import read_json, read_json_if_there, wrong_type
from llm.config import StrictModel, describe
from llm.errors import ConfigError
from llm.models.config_keys import key_names, shown

_TAKEN_AS_IS = ("top_p", "min_p", "repetition_penalty", "max_new_tokens", "min_new_tokens")
_APPLIED = frozenset({
    *_TAKEN_AS_IS, "do_sample", "temperature", "top_k", "stop_strings", "suppress_tokens", "eos_token_id",
    "bos_token_id",
})  # fmt: skip
"""Keys of generation_config.json that count."""


_ID_KEYS = ("eos_token_id", "bos_token_id", "suppress_tokens")

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
    bos_token_id: TokenId | None = None
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
    found, config = read_json_if_there(path), read_json_if_there(config_path)
    warnings = [f"{path}: {what} is not applied: the engine cannot do it" for what in _not_applied(found)]
    vocab_size = find_vocab_size(directory)
    ids: dict[str, list[int]] = {}
    for key in _ID_KEYS:
        is_older = found.get(key) is None and key != "suppress_tokens"
        given, origin = (config, config_path) if is_older else (found, path)
        ids[key], unknown = _split_ids(_read_ids(origin, key, given.get(key)), vocab_size)
        if unknown:
            warnings.append(f"{origin}: {key} {shown(unknown)} is left out: the model has {vocab_size} ids")
    fields = {key: found.get(key) for key in _TAKEN_AS_IS}
    try:
        return GenerationDefaults(
            **{**fields, **_sampling(found, path)},
            suppress_tokens=tuple(ids["suppress_tokens"]),
            eos_token_ids=frozenset(ids["eos_token_id"]),
            bos_token_id=next(iter(ids["bos_token_id"]), None),
            warnings=tuple(warnings),
        )
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe(error)}; correct or remove it") from error


def _sampling(found: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The fields of `GenerationDefaults` that the file expresses in another way."""
    do_sample, top_k, stop = (found.get(key) for key in ("do_sample", "top_k", "stop_strings"))
    if do_sample is not None and not isinstance(do_sample, bool):
        raise wrong_type(path, "do_sample", do_sample, "true or false")
    if isinstance(top_k, bool):
        raise wrong_type(path, "top_k", top_k, "a whole number")
    if stop is not None and not isinstance(stop, (str, list)):
        raise wrong_type(path, "stop_strings", stop, "text, or a list of texts")
    fields: dict[str, Any] = {"top_k": None if top_k in (0, -1) else top_k}
    fields["temperature"] = 0.0 if do_sample is False else found.get("temperature")
    fields["stop_strings"] = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    return fields


def find_vocab_size(directory: str | Path) -> int | None:
    """Size of the vocabulary of the model in `directory`; None if config.json does not say it.

    Raises:
        ConfigError: config.json cannot be read, or does not give a whole number.
    """
    path = Path(directory) / "config.json"
    config = read_json_if_there(path)
    text = config.get("text_config")  # of a model that can do more than text
    size = config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
    if size is None:
        return None
    if isinstance(size, bool) or not isinstance(size, int):
        raise wrong_type(path, "vocab_size", size, "a whole number")
    return size


def load_vocab_size(directory: str | Path) -> int:
    """Size of the vocabulary of the model in `directory`, which has to be there.

    Raises:
        ConfigError: config.json is missing, or does not say the size.
    """
    path = Path(directory) / "config.json"
    read_json(path)
    size = find_vocab_size(directory)
    if size is None:
        raise ConfigError(f"{path}: 'vocab_size' is missing; download the checkpoint's config.json again")
    return size


def _read_ids(path: Path, key: str, value: Any) -> list[int]:
    """The ids that a key holds: one, or a list of them."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise wrong_type(path, key, value, "a token's id, or a list of them")
    return ids


def _split_ids(ids: list[int], vocab_size: int | None) -> tuple[list[int], list[int]]:
    """Split ids into those below the size of the vocabulary, and the others."""
    known = [i for i in ids if 0 <= i < (vocab_size or i + 1)]
    return known, [i for i in ids if i not in known]
