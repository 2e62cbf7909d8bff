"""Settings from the command line, put over those of a configuration file."""

from pathlib import Path
from typing import Any

import yaml

from deployments.serve.config_file import list_applications, read_yaml
from llm.errors import ConfigError

LOCAL_HOST = "127.0.0.1"
"""Where a server listens unless it is told otherwise: for this machine alone."""


def read_content(path: Path) -> dict[str, Any]:
    """The content of a configuration file, each of whose first application's arguments may be set.

    Raises:
        ConfigError: it cannot be read, or has no list of applications.
    """
    content = read_yaml(path)
    list_applications(path, content)[0].setdefault("args", {})
    return content


def set_arguments(args: dict[str, Any], model: str | None, tp: int | None, settings: list[str]) -> None:
    """Set an application's arguments.

    Args:
        model: the model; None for the file's.
        tp: GPUs of each replica; None for the file's.
        settings: `name=value` for any other argument.

    Raises:
        ConfigError: a setting is not of that form, or names no group of settings.
    """
    if model is not None:
        args["model"] = model
    if tp is not None:
        args.setdefault("engine", {})["tensor_parallel_size"] = tp
        if args.get("replicas", {}).get("num_gpus"):  # the file's are for its own tensor_parallel_size
            args["replicas"]["num_gpus"] = tp
    for setting in settings:
        name, equals, value = setting.partition("=")
        *parents, last = name.strip().split(".")
        if not equals or not last:
            raise ConfigError(f"--set {setting}: give it as name=value, for example engine.max_seq_len=8192")
        place: Any = args
        for parent in parents:
            place = _inside(place, parent, setting)
        place[last] = yaml.safe_load(value)


def _inside(place: dict[str, Any] | list[Any], name: str, setting: str) -> Any:
    """The group of settings by this name, made if need be; of `models`, the entry with this number, from 0."""
    if isinstance(place, list):
        if not name.isdecimal() or int(name) >= len(place):
            raise ConfigError(f"--set {setting}: number the models of the file from 0 to {len(place) - 1}")
        return place[int(name)]
    inside = place.setdefault(name, {})
    if not isinstance(inside, dict) and not (name == "models" and isinstance(inside, list)):
        raise ConfigError(f"--set {setting}: {name} is a value, not a group of settings")
    return inside
