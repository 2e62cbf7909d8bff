"""What a checkpoint that classifies texts says of its labels, in keys of transformers and of sentence-transformers."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from llm.checkpoint.json_files import read_json_if_there, wrong_type
from llm.errors import ConfigError
from llm.models.label_keys import SUFFIX, label_names


class LabelActivation(StrEnum):
    """What turns the logits of a text's labels into the numbers that clients get."""

    SOFTMAX = "softmax"
    """The probability of each label, of which exactly one is right."""
    SIGMOID = "sigmoid"
    """The probability of each label by itself."""
    IDENTITY = "identity"
    """The logits as they are."""


_BY_PROBLEM = {
    "regression": LabelActivation.IDENTITY,
    "multi_label_classification": LabelActivation.SIGMOID,
    "single_label_classification": None,
}
"""The activation for each `problem_type`; None for the one that the number of labels decides."""
_BY_CLASS = {"Sigmoid": LabelActivation.SIGMOID, "Identity": LabelActivation.IDENTITY}
"""The activation for each class of PyTorch that sentence-transformers names and that makes a score of one logit."""
_OLDER_KEY = "sbert_ce_default_activation_function"


@dataclass(frozen=True, slots=True)
class LabelDefaults:
    """What a checkpoint says of its labels.

    Attributes:
        names: of the labels, in the order of their logits.
        activation: for the probabilities of labels.
        score_activation: for the score of a pair of texts, by a model with one label.
    """

    names: tuple[str, ...]
    activation: LabelActivation
    score_activation: LabelActivation = LabelActivation.SIGMOID


def load_label_defaults(directory: Path, config: Mapping[str, Any]) -> LabelDefaults | None:
    """What the checkpoint in `directory` says of its labels; None if it is no classifier.

    Args:
        config: content of its config.json.

    Raises:
        ConfigError: a file holds something that cannot be used.
    """
    names = config.get("architectures") or [""]
    architecture = names[0] if isinstance(names, list) else names
    if not str(architecture).endswith(SUFFIX):
        return None
    path = directory / "config.json"
    try:
        labels = label_names(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    problem = config.get("problem_type")
    if problem is not None and (not isinstance(problem, str) or problem not in _BY_PROBLEM):
        raise wrong_type(path, "problem_type", problem, f"one of {', '.join(_BY_PROBLEM)}")
    default = LabelActivation.SOFTMAX if len(labels) > 1 else LabelActivation.SIGMOID
    return LabelDefaults(labels, _BY_PROBLEM.get(problem or "") or default, _score_activation(directory, config))


def _score_activation(directory: Path, config: Mapping[str, Any]) -> LabelActivation:
    """What sentence-transformers' `CrossEncoder` applies to a score: its newest file counts before older keys."""
    newest = directory / "config_sentence_transformers.json"
    path, older = directory / "config.json", config.get("sentence_transformers")
    if older is not None and not isinstance(older, Mapping):
        raise wrong_type(path, "sentence_transformers", older, "an object")
    candidates = (
        (newest, "activation_fn", read_json_if_there(newest).get("activation_fn")),
        (path, "sentence_transformers.activation_fn", (older or {}).get("activation_fn")),
        (path, _OLDER_KEY, config.get(_OLDER_KEY)),
    )
    for origin, key, name in candidates:
        if name is None:
            continue
        module, _, leaf = str(name).rpartition(".")
        if leaf not in _BY_CLASS or not module.startswith("torch.nn"):
            supported = ", ".join(f"torch.nn.{each}" for each in _BY_CLASS)
            raise ConfigError(f"{origin}: {key} {str(name)[:100]!r} is not supported; supported: {supported}")
        return _BY_CLASS[leaf]
    return LabelActivation.SIGMOID
