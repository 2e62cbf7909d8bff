"""The console on which commands print text for people."""

import sys

from rich.console import Console

_UNBOUNDED = 10_000
"""Width, in columns, of output that is not wrapped: more than any path or table needs."""


def make_console() -> Console:
    """Return a console that does not break lines: a terminal wraps them itself, a file or a pipe gets them whole."""
    width = None if sys.stdout.isatty() else _UNBOUNDED
    return Console(highlight=False, soft_wrap=True, width=width)
