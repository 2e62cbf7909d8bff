"""Keys of config.json that say which labels a classifier gives to texts."""

from collections.abc import Mapping
from typing import Any

from llm.errors import ConfigError
from llm.models.config_keys import shown

SUFFIX = "ForSequenceClassification"
"""Ending of the names of transformers' classes that classify sequences."""
_DEFAULT_NUM_LABELS = 2
_MAX_LABELS = 1 << 17


def label_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of a classifier's labels, by the keys of config.json.

    `id2label` counts before `num_labels`, and a file that has neither means two labels, as in transformers.

    Raises:
        ConfigError: a key holds something else than it should.
    """
    names, count = config.get("id2label"), config.get("num_labels")
    if names is None:
        count = _DEFAULT_NUM_LABELS if count is None else count
        if type(count) is not int or not 0 < count <= _MAX_LABELS:
            raise ConfigError(f"'num_labels' is {shown(count)}, but must be a number from 1 to {_MAX_LABELS}")
        return tuple(f"LABEL_{index}" for index in range(count))
    if not isinstance(names, Mapping) or not all(isinstance(name, str | int) for name in names.values()):
        raise ConfigError(f"'id2label' is {shown(names)}, but must be an object of names by number; correct it")
    by_index = {str(key): str(name) for key, name in names.items()}
    if not by_index or by_index.keys() != {str(index) for index in range(len(by_index))}:
        raise ConfigError(f"'id2label' is {shown(names)}, but must have the numbers from 0 on as keys; correct it")
    return tuple(by_index[str(index)] for index in range(len(by_index)))
