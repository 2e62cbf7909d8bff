"""Where files are kept that can be had or made again."""

import os
from pathlib import Path

from llm.errors import CheckpointError

CACHE_VARIABLE = "RAYLINE_CACHE"
"""Environment variable with the cache directory."""


def cache_directory(*parts: str) -> Path:
    """A directory of the cache, which is made: `$RAYLINE_CACHE`, or `rayline` in `$XDG_CACHE_HOME` or `~/.cache`.

    Raises:
        CheckpointError: it cannot be made.
    """
    own = os.environ.get(CACHE_VARIABLE)
    root = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "rayline"
    directory = root.expanduser().joinpath(*parts)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{directory} cannot be made ({error}); set {CACHE_VARIABLE} to a directory that can be written"
        ) from error
    return directory
