"""Makes sure that no descendant of this process outlives it."""

import ctypes
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_LOOK_INTERVAL_S = 0.02


def adopt_orphans() -> None:
    """From now on, a descendant whose parent dies becomes a child of this process instead of init's (Linux).

    `kill_descendants` then also finds what a killed process left behind: Ray's workers, HAProxy.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(ancestor: int | None = None) -> list[int]:
    """Ids of all living processes that `ancestor` (this process, if None) started, directly or not.

    Returns None if there is no /proc.
    """
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):
            # The name in parentheses may hold anything; state and parent follow it.
            state, parent = path.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(path.parent.name))
    found: list[int] = []
    pending = [os.getpid() if ancestor is None else ancestor]
    while pending:
        below = children.get(pending.pop(), [])
        found += below
        pending += below
    return found


def kill_descendants(timeout_s: float = 5.0) -> None:
    """Send SIGKILL to all descendants until none is left, including those started meanwhile.

    It reaps children, so call it only when nothing waits for them anymore.
    """
    deadline = time.monotonic() + timeout_s
    while (left := descendants()) and time.monotonic() < deadline:
        for pid in left:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        _reap()
        time.sleep(_LOOK_INTERVAL_S)
    _reap()


def _reap() -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
