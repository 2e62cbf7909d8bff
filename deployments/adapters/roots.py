"""Which directories administrators may name in requests."""

import os
from collections.abc import Sequence
from pathlib import Path

from llm.checkpoint.adapter_digest import ADAPTER_FILES


def find_inside(path: str, roots: Sequence[str]) -> Path | None:
    """The directory that a request names, without links; None if it, or one of an adapter's files in it, is outside of
    all roots.

    Whether something exists outside of the roots makes no difference.
    """
    if "\0" in path or not Path(path).is_absolute():
        return None
    allowed = [os.path.realpath(Path(root).expanduser()) for root in roots]
    real = os.path.realpath(path)
    for place in (real, *(os.path.realpath(os.path.join(real, name)) for name in ADAPTER_FILES)):
        if not any(place == root or place.startswith(root.rstrip(os.sep) + os.sep) for root in allowed):
            return None
    return Path(real)


def why_outside(path: str, roots: Sequence[str]) -> str:
    """What to tell an administrator whose path is outside of the roots."""
    if not roots:
        return "lora_path: no directory may be loaded by request; the setting adapter_roots allows some"
    return f"lora_path: {path[:200]!r} is not an absolute path within one of adapter_roots: {', '.join(roots)[:200]}"
