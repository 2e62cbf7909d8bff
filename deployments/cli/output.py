"""Where commands print what people read."""

import sys

from rich.console import Console

_UNBOUNDED = 10_000
"""Columns for a line that no screen ends: more than any path or table needs."""


def make_console() -> Console:
    """Return a console that leaves a line whole: a terminal wraps it as it likes, a file or a pipe gets it as one."""
    width = None if sys.stdout.isatty() else _UNBOUNDED
    return Console(highlight=False, soft_wrap=True, width=width)
