"""Reading the JSON files of a checkpoint."""

import json
from pathlib import Path
from typing import Any

from llm.errors import ConfigError


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file that holds an object.

    Raises:
        ConfigError: it is missing, is not JSON, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is missing; is {path.parent} a Hugging Face checkpoint?") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} does not hold a JSON object; download it again")
    return content
