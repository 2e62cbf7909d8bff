"""Runs the server in a process of its own, shows its progress, and makes sure that no process of it is left at the
end."""

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TaskID, TextColumn

from deployments.observe.terminal import WARNING_MARK
from deployments.replica.engine_factory import PROGRESS_MARK
from deployments.serve.processes import adopt_orphans, kill_descendants

_STOP_TIMEOUT_S = 4.2
"""Seconds from the first Ctrl-C until all remaining processes are killed."""
_NUM_LAST_LINES = 20
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_PROGRESS = re.compile(rf"pid=(\d+).*{PROGRESS_MARK} (\d+) (\d+)")
_WARNING = re.compile(rf"{WARNING_MARK} (warning|error|critical): (.*)")
_END = object()


def run_server(path: Path, environment: Mapping[str, str], *, is_verbose: bool) -> int:
    """Serve a configuration file until the server ends, Ctrl-C or SIGTERM; returns the exit code.

    A second Ctrl-C ends everything at once.
    """
    # Service managers stop with SIGTERM; shells start background jobs, and so their children, with SIGINT ignored.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    adopt_orphans()
    news: queue.Queue[object] = queue.Queue()
    process = None
    with _Screen(is_verbose=is_verbose) as screen:
        try:
            process = _start(path, environment, news)
            return _follow(process, news, screen)
        except KeyboardInterrupt:
            return _stop(process, news, screen)
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # it cannot stop any faster now
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if process is not None:
                process.kill()
                process.wait()
            kill_descendants()


def _start(path: Path, environment: Mapping[str, str], news: "queue.Queue[object]") -> "subprocess.Popen[str]":
    """Start the server; its output and events go to `news`, and at the end `_END`."""
    events, descriptor = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "deployments.serve.runner", str(path), str(descriptor)],
        env={**os.environ, **environment, "PYTHONUNBUFFERED": "1"}, pass_fds=(descriptor,), start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    os.close(descriptor)
    assert process.stdout is not None, "piped"
    output = process.stdout

    def read_output() -> None:
        for line in output:
            news.put(line)

    def read_events() -> None:
        with os.fdopen(events) as lines:
            for line in lines:
                news.put(json.loads(line))
        # Ray's processes may hold the output open for longer than the server lives, but not the events.
        process.wait()
        news.put(_END)

    for target in (read_output, read_events):
        threading.Thread(target=target, daemon=True).start()
    return process


def _follow(process: "subprocess.Popen[str]", news: "queue.Queue[object]", screen: "_Screen") -> int:
    """Show output and events until the server ends by itself."""
    has_said_why = False
    while (item := news.get()) is not _END:
        has_said_why |= screen.show(item)
    if not has_said_why:
        screen.show_last_lines(f"the server ended unexpectedly (exit code {process.returncode}); its last lines:")
    return 1


def _stop(process: "subprocess.Popen[str] | None", news: "queue.Queue[object]", screen: "_Screen") -> int:
    """Have the server end its requests and then exit; returns the exit code, 130 if it had to be killed."""
    if process is None or not screen.is_ready:
        return 130  # nobody has been served yet
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    try:
        screen.say("Stopping: open requests end now. Ctrl-C again to stop at once.")
        process.send_signal(signal.SIGTERM)
        while (remaining := deadline - time.monotonic()) > 0:
            with suppress(queue.Empty):
                if news.get(timeout=remaining) is _END:
                    return 0
    except KeyboardInterrupt:
        pass
    return 130


class _Screen:
    """What the user sees: one line for the current stage, bars while weights load, the banner, warnings.

    Args:
        is_verbose: whether to show every line that the server and Ray print.
    """

    def __init__(self, *, is_verbose: bool) -> None:
        self.is_ready = False
        self._is_verbose = is_verbose
        self._console = Console(stderr=True, highlight=False)
        self._last_lines: deque[str] = deque(maxlen=_NUM_LAST_LINES)
        columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn()
        self._progress = Progress(*columns, console=self._console, transient=True)
        self._stage: TaskID | None = None
        self._bars: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_progress()

    def show(self, item: Any) -> bool:
        """Show a line that was printed or an event; True if it says why the server ends."""
        match item:
            case str():
                self._show_line(item.rstrip("\n"))
            case {"stage": text}:
                self._show_stage(text)
            case {"ready": banner}:
                self.is_ready = True
                self._stop_progress()
                print(banner, flush=True)
            case {"failed": message}:
                self._stop_progress()
                print(f"rayline: {message}", file=sys.stderr, flush=True)
                return True
        return False

    def say(self, text: str) -> None:
        """Print a line about what this command does."""
        self._console.print(text, style="dim", soft_wrap=True)

    def show_last_lines(self, why: str) -> None:
        """Print the last lines of the server's output, if nothing else is known about the failure."""
        self._stop_progress()
        lines: Iterable[str] = () if self._is_verbose else self._last_lines
        print("\n".join([f"rayline: {why}", *lines]), file=sys.stderr, flush=True)

    def _stop_progress(self) -> None:
        if self._console.is_terminal:  # otherwise it was not started, and would print an empty line
            self._progress.stop()

    def _show_line(self, line: str) -> None:
        if self._is_verbose:
            self._console.out(line)
        line = _COLOUR.sub("", line)
        if progress := _PROGRESS.search(line):
            self._show_progress(progress[1], int(progress[2]), int(progress[3]))
        elif warning := _WARNING.search(line):
            if not self._is_verbose:
                self._console.out(f"rayline: {warning[1]}: {warning[2]}")
        else:
            self._last_lines.append(line)

    def _show_stage(self, text: str) -> None:
        if not self._console.is_terminal:
            self.say(f"{text} …")
        elif self._stage is None:
            self._stage = self._progress.add_task(text, total=None)
        else:
            self._progress.update(self._stage, description=text)

    def _show_progress(self, pid: str, done: int, total: int) -> None:
        if pid not in self._bars:
            self._bars[pid] = self._progress.add_task(f"Loading weights, process {pid}", total=total)
        self._progress.update(self._bars[pid], completed=done)
