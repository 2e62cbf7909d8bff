"""The few of a replica's log lines that are meant for the person at the terminal."""

import logging
import os
import sys
from pathlib import Path

WARNING_MARK = "rayline says"
"""Begins each line, for whoever reads the process's output."""
TERMINAL_VARIABLE = "RAYLINE_TERMINAL"
"""Set in the environment where somebody reads the output and looks for the mark."""

_LOGGERS = ("ray.serve", "llm", "deployments")
_OURS = tuple(str(Path(__file__).parents[2] / name) for name in ("deployments", "llm"))


class _TerminalHandler(logging.Handler):
    """Writes our own warnings and errors in one line each, past Serve's redirection of standard error."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        if not record.pathname.startswith(_OURS) or sys.__stderr__ is None:
            return
        error = record.exc_info[1] if record.exc_info else None
        text = record.getMessage() + (f" ({type(error).__name__}: {error})" if error is not None else "")
        sys.__stderr__.write(f"{WARNING_MARK} {record.levelname.lower()}: {' '.join(text.split())}\n")
        sys.__stderr__.flush()


def show_warnings() -> None:
    """Have this process write its warnings to its standard error, if `TERMINAL_VARIABLE` is set. A second call has no
    effect."""
    if os.environ.get(TERMINAL_VARIABLE) != "1":
        return
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(handler, _TerminalHandler) for handler in logger.handlers):
            logger.addHandler(_TerminalHandler())
