"""What a checkpoint says of the vectors and scores that it is for.

Most of it is in files of sentence-transformers: `modules.json`, the `config.json` in the directory of each module, and
`config_sentence_transformers.json`. Some is in keys of `config.json` that vLLM reads too.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm.checkpoint.json_files import read_json_if_there, read_text, wrong_type
from llm.checkpoint.label_defaults import LabelDefaults, load_label_defaults
from llm.errors import ConfigError
from llm.schemas import Pooling

_POOLINGS = {"lasttoken": Pooling.LAST, "mean": Pooling.MEAN}
_OLDER_POOLING_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Keys of a pooling module before sentence-transformers 5.4, and what they are called since."""
_WITHOUT_EFFECT = ("Transformer", "Pooling", "Normalize", "LogitScore")
"""Modules that are read, or that change nothing here: all vectors are normalized."""


@dataclass(frozen=True, slots=True)
class YesNo:
    """The tokens of which a cross-encoder says one after it has read a query and a document.

    Attributes:
        yes, no: the tokens, as ids or as texts; None where the checkpoint names none.
    """

    yes: int | str | None = None
    no: int | str | None = None


@dataclass(frozen=True, slots=True)
class VectorDefaults:
    """What a checkpoint says of its vectors and scores.

    Attributes:
        pooling: which hidden states make a vector; None where it does not say.
        pooling_refusal: why its vectors cannot be made as it says; None if they can.
        prompts: texts that go in front of inputs, by name.
        default_prompt: name of the prompt of inputs for which none is named; None for no prompt.
        is_matryoshka: whether vectors may be cut to their first numbers.
        dimensions: the sizes to which they may be cut; empty for any.
        yes_no: what makes it a cross-encoder; None if nothing says that it is one.
        scores_refusal: why its scores cannot be computed as it says; None if they can.
        is_embedder: whether it says that it is for vectors.
        labels: what it gives to texts if it is a classifier, which has neither vectors nor tokens; None if it is none.
    """

    pooling: Pooling | None = None
    pooling_refusal: str | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    is_matryoshka: bool = False
    dimensions: tuple[int, ...] = ()
    yes_no: YesNo | None = None
    scores_refusal: str | None = None
    is_embedder: bool = False
    labels: LabelDefaults | None = None


def load_vector_defaults(directory: str | Path) -> VectorDefaults:
    """Read what the checkpoint in `directory` says of its vectors and scores.

    Raises:
        ConfigError: a file holds something that cannot be used. Missing ones are fine.
    """
    directory = Path(directory)
    config = read_json_if_there(directory / "config.json")
    modules = _modules(directory)
    prompts, default_prompt = _prompts(directory / "config_sentence_transformers.json")
    labels = load_label_defaults(directory, config)
    if labels is not None:
        _refuse_modules_behind_labels(modules)
        return VectorDefaults(prompts=prompts, default_prompt=default_prompt, labels=labels)
    pooling, refusal = _pooling(modules)
    is_matryoshka, dimensions = _matryoshka(directory / "config.json", config)
    yes_no, scores_refusal = _yes_no(directory, config, modules)
    return VectorDefaults(
        pooling=pooling,
        pooling_refusal=refusal,
        prompts=prompts,
        default_prompt=default_prompt,
        is_matryoshka=is_matryoshka,
        dimensions=dimensions,
        yes_no=yes_no,
        scores_refusal=scores_refusal,
        is_embedder=any(kind == "Pooling" for kind, _ in modules),
    )


def _modules(directory: Path) -> list[tuple[str, Path]]:
    """The kind of each module, and the directory of its files."""
    path = directory / "modules.json"
    if not path.exists():
        pooling = directory / "1_Pooling"
        return [("Pooling", pooling)] if (pooling / "config.json").exists() else []
    try:
        content = json.loads(read_text(path))
        return [(str(module["type"]).rpartition(".")[2], directory / str(module["path"])) for module in content]
    except (OSError, ValueError, RecursionError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} is not a list of modules ({error!r}); download it again") from error


def _refuse_modules_behind_labels(modules: Sequence[tuple[str, Path]]) -> None:
    for kind, place in modules:
        if kind != "Transformer":
            raise ConfigError(
                f"{place}: a module {kind} behind a model that classifies is not supported; remove it, and "
                "modules.json if there is one, if the labels are computed without it"
            )


def _pooling(modules: Sequence[tuple[str, Path]]) -> tuple[Pooling | None, str | None]:
    """The pooling that the modules ask for, or why it cannot be done."""
    for kind, place in modules:
        if kind not in _WITHOUT_EFFECT:
            return None, f"{place.parent / 'modules.json'}: vectors go through a module {kind}, which is not supported"
    found = [place for kind, place in modules if kind == "Pooling"]
    if not found:
        return None, None
    path = found[0] / "config.json"
    content = read_json_if_there(path)
    modes = content.get("pooling_mode")
    if modes is None:
        modes = [mode for key, mode in _OLDER_POOLING_KEYS.items() if content.get(key) is True] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or not modes or not all(isinstance(mode, str) for mode in modes):
        raise wrong_type(path, "pooling_mode", modes, "the name of a pooling, or a list of names")
    if len(modes) > 1 or modes[0] not in _POOLINGS:
        why = " (the first token of a causal model has seen nothing of the text)" if modes == ["cls"] else ""
        return None, f"{path}: pooling by {' and '.join(modes)}{why} is not supported"
    if modes == ["mean"] and content.get("include_prompt") is False:
        return None, f"{path}: include_prompt: false, a mean without the prompt's tokens, is not supported"
    return _POOLINGS[modes[0]], None


def _prompts(path: Path) -> tuple[dict[str, str], str | None]:
    content = read_json_if_there(path)
    prompts, default = content.get("prompts") or {}, content.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(prompt, str) for prompt in prompts.values()):
        raise wrong_type(path, "prompts", prompts, "an object of texts")
    if default is not None and default not in prompts:
        raise wrong_type(path, "default_prompt_name", default, "the name of one of the prompts")
    return prompts, default


def _matryoshka(path: Path, config: Mapping[str, Any]) -> tuple[bool, tuple[int, ...]]:
    """Whether vectors may be cut, and to which sizes; the keys are vLLM's."""
    sizes, is_matryoshka = config.get("matryoshka_dimensions"), config.get("is_matryoshka")
    if is_matryoshka is not None and not isinstance(is_matryoshka, bool):
        raise wrong_type(path, "is_matryoshka", is_matryoshka, "true or false")
    if sizes is None:
        return bool(is_matryoshka), ()
    if not isinstance(sizes, list) or not all(type(size) is int and size > 0 for size in sizes):
        raise wrong_type(path, "matryoshka_dimensions", sizes, "a list of whole numbers above 0")
    return bool(sizes), tuple(sorted(sizes))


def _yes_no(
    directory: Path, config: Mapping[str, Any], modules: Sequence[tuple[str, Path]]
) -> tuple[YesNo | None, str | None]:
    """The two tokens of a cross-encoder, or why it cannot score."""
    place = next((place for kind, place in modules if kind == "LogitScore"), None)
    if place is not None:
        content = read_json_if_there(place / "config.json")
        ids = [content.get(key) for key in ("true_token_id", "false_token_id")]
        if ids[1] is None:
            return None, f"{place / 'config.json'}: a score by the logit of true_token_id alone is not supported"
        if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
            raise wrong_type(place / "config.json", "true_token_id", ids, "a token's id, as must be false_token_id")
        return YesNo(*ids), None
    tokens = config.get("classifier_from_token")
    if tokens is not None:
        path = directory / "config.json"
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            raise wrong_type(path, "classifier_from_token", tokens, "a list of texts")
        if len(tokens) != 2 or config.get("is_original_qwen3_reranker") is not True:
            return None, f"{path}: classifier_from_token is supported for two tokens of a Qwen3-Reranker only"
        return YesNo(yes=tokens[1], no=tokens[0]), None
    kind = read_json_if_there(directory / "config_sentence_transformers.json").get("model_type")
    return (YesNo(), None) if kind == "CrossEncoder" else (None, None)
