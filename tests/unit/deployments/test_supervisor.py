"""What `rayline serve` shows of all that its server prints."""

import logging
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deployments.cli.supervisor import _STOP_TIMEOUT_S, _Screen
from deployments.observe.terminal import TERMINAL_VARIABLE, show_warnings

RAYS_LINE = "\x1b[36m(ServeController pid=7)\x1b[0m   • Direct ingress enabled\n"


def test_lines_of_ray_are_shown_only_where_they_are_asked_for(capsys: pytest.CaptureFixture[str]):
    for is_verbose in (False, True):
        _Screen(is_verbose=is_verbose).show(RAYS_LINE)
        out, err = capsys.readouterr()
        assert out == ""
        assert ("Direct ingress" in err) == is_verbose


def test_warnings_of_ours_are_always_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """From a replica's logger to the terminal of the command: the level, and all of it in one line."""
    monkeypatch.setenv(TERMINAL_VARIABLE, "1")
    monkeypatch.setattr(sys, "__stderr__", sys.stderr)
    loggers = [logging.getLogger(name) for name in ("ray.serve", "llm", "deployments")]
    before = [list(logger.handlers) for logger in loggers]
    try:
        show_warnings()
        show_warnings()
        record = logging.LogRecord(
            "ray.serve", logging.WARNING, show_warnings.__code__.co_filename, 1, "a\nb", (), None
        )
        logging.getLogger("ray.serve").handle(record)
        others = logging.LogRecord("ray.serve", logging.WARNING, "/ray/serve/replica.py", 1, "of Serve's", (), None)
        logging.getLogger("ray.serve").handle(others)
    finally:
        for logger, handlers in zip(loggers, before, strict=True):
            logger.handlers[:] = handlers
    printed = capsys.readouterr().err
    assert printed.count("a b") == 1
    (marked,) = [line for line in printed.splitlines() if line.startswith("rayline says")]
    _Screen(is_verbose=False).show(f"(ServeReplica:rayline:EngineReplica pid=9) {marked}\n")
    assert capsys.readouterr().err == "rayline: warning: a b\n"


def test_a_reason_is_one_line_and_an_end_without_one_shows_what_was_printed_last(capsys: pytest.CaptureFixture[str]):
    screen = _Screen(is_verbose=False)
    assert screen.show({"failed": "the port is in use"})
    assert capsys.readouterr().err == "rayline: the port is in use\n"
    screen.show(RAYS_LINE)
    screen.show_last_lines("the server ended unexpectedly")
    assert capsys.readouterr().err.splitlines() == [
        "rayline: the server ended unexpectedly", "(ServeController pid=7)   • Direct ingress enabled"
    ]  # fmt: skip


def test_the_banner_goes_to_standard_output(capsys: pytest.CaptureFixture[str]):
    screen = _Screen(is_verbose=False)
    assert not screen.show({"ready": "Rayline is ready: here"})
    assert screen.is_ready
    assert capsys.readouterr().out == "Rayline is ready: here\n"


# A server that has started and does not end when it is told to, with a process of its own.
_STUBBORN = """
import json, os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
with os.fdopen(int(sys.argv[-1]), "w") as events:
    print(json.dumps({"ready": f"{os.getpid()} {child.pid}"}), file=events, flush=True)
    time.sleep(300)
"""
_COMMAND = """
import subprocess, sys
from pathlib import Path
from deployments.cli import supervisor
start = subprocess.Popen
subprocess.Popen = lambda command, **options: start([sys.executable, "-c", sys.argv[1], *command[-2:]], **options)
sys.exit(supervisor.run_server(Path("nowhere"), {}, is_verbose=False))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_ends_everything_at_once(how: signal.Signals):
    """Also what the server has started, and where it does not react to the first."""
    command = [sys.executable, "-c", _COMMAND, _STUBBORN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        pids = [int(word) for word in process.stdout.readline().split()]
        assert len(pids) == 2
        process.send_signal(how)
        assert "Ctrl-C again" in process.stderr.readline()
        again_at = time.monotonic()
        process.send_signal(how)
        assert process.wait(30) == 130
        assert time.monotonic() - again_at < _STOP_TIMEOUT_S / 2, "it waited for the server"
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []
