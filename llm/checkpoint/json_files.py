"""Reading the JSON files of a checkpoint, and its other texts."""

import json
from pathlib import Path
from typing import Any

from llm.errors import ConfigError
from llm.models.config_keys import shown

_POINTER = b"version https://git-lfs"
"""How the small files begin that Git leaves in place of large ones until Git LFS has fetched those."""


def is_pointer(path: Path) -> bool:
    """Whether a file is Git LFS's pointer to one that was not fetched."""
    try:
        with path.open("rb") as file:
            return file.read(len(_POINTER)) == _POINTER
    except OSError:
        return False


def read_text(path: Path) -> str:
    """Text of a file in UTF-8, without the mark that some editors put in front of it.

    Raises:
        ConfigError: the file is a pointer to one that was not fetched.
        OSError, UnicodeDecodeError: it cannot be read.
    """
    text = path.read_text(encoding="utf-8-sig")
    if text.startswith(_POINTER.decode()):
        raise ConfigError(pointer_fault(path))
    return text


def pointer_fault(path: str | Path) -> str:
    """What is wrong with such a pointer, and what to do."""
    return f"{path} is a pointer of Git LFS; get the file itself with: git lfs pull"


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file that holds an object.

    Raises:
        ConfigError: it is missing, is not JSON, or holds something else.
    """
    try:
        content = json.loads(read_text(path))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is missing; {_why_missing(path)}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} does not hold a JSON object; download it again")
    return content


def _why_missing(path: Path) -> str:
    """What else is there instead of a file, and what to do."""
    directory = path.parent
    if path.is_symlink():
        return f"it is a link to {path.readlink()}, which is not there; download the checkpoint again"
    inside = next(
        (found for pattern in ("*", "snapshots/*") for found in sorted(directory.glob(f"{pattern}/{path.name}"))), None
    )
    if inside is not None:
        return f"{inside} is there: give {inside.parent}"
    if (directory / "adapter_config.json").exists():
        return f"{directory} is an adapter: give the model that it was trained on, and this directory as lora"
    if (directory / "params.json").exists():
        return f"{directory} is in the format of the model's makers; get the checkpoint in Hugging Face's format"
    return f"is {directory} a Hugging Face checkpoint?"


def read_json_if_there(path: Path) -> dict[str, Any]:
    """As `read_json`; nothing of a file that is missing.

    Raises:
        ConfigError: it is not JSON, or holds something else than an object.
    """
    return read_json(path) if path.exists() else {}


def wrong_type(path: Path, key: str, value: object, wanted: str) -> ConfigError:
    """The error for a value of a JSON file that is of another type than the one wanted."""
    return ConfigError(f"{path}: {key!r} is {shown(value)}, but must be {wanted}; correct it")
