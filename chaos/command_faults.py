"""F23: `rayline serve` is told to stop with requests open. It runs as users run it, with a cluster of its own.

Like every function here, these take the address of a running front end; they do not use it.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import aiohttp

from chaos.fleet import ROOT, Outcome, free_port
from chaos.streams import Clients
from deployments.serve.processes import descendants

_READY_TIMEOUT_S = 180
_NUM_STREAMS, _NUM_OTHERS, _MAX_ROWS = 16, 8, 12
"""More requests than the engine has rows, so that some wait when the end comes."""
_MAX_STOP_S = 5.0
_GONE_TIMEOUT_S = 5.0


class Command:
    """A `rayline serve` process. Use as a context manager: whatever is left in the end is killed.

    Args:
        arguments: of `rayline serve`, without its port.
        program: what to run as `rayline`.
        directory: where to run it.
        environment: of the process.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        program: Sequence[str | Path] = (sys.executable, "-c", "from deployments.cli import main; main()"),
        directory: Path = ROOT,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 - closed on exit
        self.process = subprocess.Popen(
            [*program, "serve", "--port", str(self.port), *arguments], cwd=directory, env=environment,
            stdin=subprocess.DEVNULL, stdout=self._out, stderr=self._err,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pid in (*descendants(self.process.pid), self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self._out.close()
        self._err.close()

    @property
    def output(self) -> str:
        """What it has printed for programs: the banner."""
        return _content(self._out)

    @property
    def errors(self) -> str:
        """What it has printed beside that."""
        return _content(self._err)

    def wait_until_ready(self) -> None:
        """Wait for the banner.

        Raises:
            RuntimeError: the command ends instead, or takes too long.
        """
        deadline = time.monotonic() + _READY_TIMEOUT_S
        while "Rayline is ready" not in self.output:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"rayline serve is not ready: {self.errors[-2000:]}")
            time.sleep(0.05)

    def stop(self, how: signal.Signals = signal.SIGINT) -> tuple[float, list[int]]:
        """Tell it to stop; returns the seconds until the prompt is back, and its processes that are left."""
        below = descendants(self.process.pid)
        started = time.monotonic()
        self.process.send_signal(how)
        self.process.wait(60)
        seconds = time.monotonic() - started
        while (left := list(_alive(below))) and time.monotonic() - started < seconds + _GONE_TIMEOUT_S:
            time.sleep(0.05)
        return seconds, left


async def f23_behind_haproxy(front_end: str) -> Outcome:  # noqa: ARG001 - see above
    """Ctrl-C of `rayline serve` with streams open, behind HAProxy."""
    return await _stop_with_requests(signal.SIGINT)


async def f23_behind_serves_proxy(front_end: str) -> Outcome:  # noqa: ARG001 - see above
    """SIGTERM of `rayline serve` with streams open, behind Serve's own proxy."""
    return await _stop_with_requests(signal.SIGTERM, "--no-haproxy")


async def _stop_with_requests(how: signal.Signals, *arguments: str) -> Outcome:
    settings = {
        "engine_kind": "emulated", "emulation.tokens_per_s": 50, "emulation.max_seq_len": 4096,
        "engine.max_batch_size": _MAX_ROWS, "engine.num_pages": 8192,
    }  # fmt: skip
    options = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    with Command([*arguments, *options]) as command:
        await asyncio.to_thread(command.wait_until_ready)
        async with Clients(command.url) as clients, aiohttp.ClientSession(command.url) as session:
            streams = [asyncio.create_task(clients.ask(f"stream {i}", 3000)) for i in range(_NUM_STREAMS)]
            others = [asyncio.create_task(_ask_whole(session, f"other {i}")) for i in range(_NUM_OTHERS)]
            while (await clients.get("/rayline/stats"))["router"]["num_live"] < _NUM_STREAMS + _NUM_OTHERS:
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.5)
            seconds, left = await asyncio.to_thread(command.stop, how)
            stories = await asyncio.gather(*streams)
            statuses = await asyncio.gather(*others)
    begun = [story for story in stories if story.arrivals]
    told = [story for story in stories if story.error == "shutting_down"]
    figure = (
        f"{'HAProxy' if '--no-haproxy' not in arguments else 'Serve alone'}, {how.name}: {len(told)} of {len(stories)} "
        f"streams told ({len(begun)} had begun), {statuses.count(503)} of {len(statuses)} other requests got 503; "
        f"the prompt was back after {seconds:.1f} s with {len(left)} processes left"
    )
    is_told = len(told) == len(stories) and set(statuses) == {503}
    return Outcome(figure, is_told, bool(begun), seconds < _MAX_STOP_S, not left, command.process.returncode == 0)


async def _ask_whole(session: aiohttp.ClientSession, prompt: str) -> int:
    """HTTP status of a request that wants its answer whole; 0 where the connection breaks."""
    body = {"model": "demo", "prompt": prompt, "max_tokens": 3000}
    try:
        async with session.post("/v1/completions", json=body) as response:
            await response.read()
            return response.status
    except aiohttp.ClientError:
        return 0


def _alive(pids: Sequence[int]) -> Iterator[int]:
    for pid in pids:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                yield pid


def _content(file: IO[bytes]) -> str:
    size = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), size, 0).decode(errors="replace")
