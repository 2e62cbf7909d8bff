"""Reading the JSON files of a checkpoint."""

import json
from pathlib import Path
from typing import Any

from llm.errors import ConfigError
from llm.models.config_keys import shown


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file that holds an object.

    Raises:
        ConfigError: it is missing, is not JSON, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is missing; is {path.parent} a Hugging Face checkpoint?") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} does not hold a JSON object; download it again")
    return content


def read_json_if_there(path: Path) -> dict[str, Any]:
    """As `read_json`; nothing of a file that is missing.

    Raises:
        ConfigError: it is not JSON, or holds something else than an object.
    """
    return read_json(path) if path.exists() else {}


def wrong_type(path: Path, key: str, value: object, wanted: str) -> ConfigError:
    """The error for a value of a JSON file that is of another type than the one wanted."""
    return ConfigError(f"{path}: {key!r} is {shown(value)}, but must be {wanted}; correct it")
