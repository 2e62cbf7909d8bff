"""`RankGroup`: the processes that hold the other parts of rank 0's model, and whether they are alive."""

import logging
import os
import selectors
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, Protocol

import msgspec

from llm.errors import RankLostError
from llm.parallel.channel import Channel, FrameKind, Int32Array, pack_arrays
from llm.parallel.environment import ENVIRONMENT
from llm.parallel.tasks import PendingTasks, Task, TaskReply

logger = logging.getLogger(__name__)

BEAT_INTERVAL_S = 0.5
_SILENCE_S = 4.0
"""Seconds without a sign of life after which a rank counts as lost; with the time to notice, within 5 s."""
_STARTING_SILENCE_S = 300.0
"""The same before steps: imports and initialization may keep a process's threads from running."""
STEP_TIMEOUT_S = 30.0
"""Most time that a step may take, including anything compiled or captured in it: a collective that some rank does not
join never ends by itself."""
CALL_TIMEOUT_S = 1800.0
"""Most time for what comes before steps: loading, sizing, capturing."""
_STUCK_S = 5.0
"""Wait after a rank is lost while the ranks start on GPUs: what rank 0 waits for on its device may never happen."""
_SOON_S = 1.0
"""Wait after a collective has failed, which may be before the lost rank is known."""
_STOP_S = 2.0
_POLL_S = 20e-6


class DeviceEvent(Protocol):
    """The methods of a `torch.cuda.Event` that waiting needs."""

    def query(self) -> bool:
        """Whether it has happened."""
        ...


@dataclass(slots=True)
class _Rank:
    """A process and what it has sent."""

    number: int
    process: subprocess.Popen[bytes]
    channel: Channel
    heard_at: float
    replies: SimpleQueue[bytearray] = field(default_factory=SimpleQueue)


class RankGroup:
    """Ranks 1 and up, as rank 0 sees them. One thread calls it.

    Each rank is a process of its own, connected by a pair of sockets: when this process ends, for whatever reason, the
    ranks see their end of it close and end too. A thread of this process listens to them. Once one is lost, all are
    killed, and `failure` says why.

    Args:
        size: number of ranks, including this one.
        module: what `python -m` runs as a rank; its argument is the number of its socket's file descriptor.
        settings: settings of all ranks; each gets them with its `rank` as the first call.
        on_gpus: whether they meet on GPUs, which wait for each other forever.
    """

    def __init__(self, size: int, module: str, settings: dict[str, Any], *, on_gpus: bool = False) -> None:
        self.failure: str | None = None
        self._on_gpus = on_gpus
        self._is_lost = threading.Event()
        self._is_noticed = threading.Event()
        self._most_silence_s = _STARTING_SILENCE_S
        self._failing = threading.Lock()
        self._is_closed = threading.Event()
        self._ranks: list[_Rank] = []
        self._selector = selectors.DefaultSelector()
        os.environ.update(ENVIRONMENT)
        try:
            for number in range(1, size):
                self._ranks.append(_start(number, module))
        except BaseException:
            _kill(self._ranks)
            raise
        self._tasks = PendingTasks()
        self._finalizer = weakref.finalize(self, _end, self._ranks, self._is_closed)
        for rank in self._ranks:
            self._selector.register(rank.channel.socket, selectors.EVENT_READ, rank)
        threading.Thread(target=_listen, args=(weakref.ref(self),), name="ranks", daemon=True).start()
        for rank in self._ranks:
            self._send(rank, FrameKind.CALL, _json({**settings, "rank": rank.number}))

    @property
    def process_ids(self) -> list[int]:
        """Process ids of ranks 1 and up."""
        return [rank.process.pid for rank in self._ranks]

    def call(self, name: str, **arguments: object) -> None:
        """Ask all ranks to do something; each sends one reply."""
        for rank in self._ranks:
            self._send(rank, FrameKind.CALL, _json({"name": name, **arguments}))

    def replies(self) -> list[Any]:
        """Wait for each rank's reply to the oldest call whose replies have not been read.

        Raises:
            RankLostError: a rank is lost.
        """
        return [self._reply(rank) for rank in self._ranks]

    def begin(self, content: object) -> Future[Sequence[Any]]:
        """Have all ranks begin a task, behind the steps sent so far, and do it beside those that follow.

        Args:
            content: what to do, as JSON can hold it.

        Returns:
            Their replies, in order of ranks; RankLostError if one is lost before it has replied.
        """
        number, future = self._tasks.add([rank.number for rank in self._ranks])
        try:
            for rank in self._ranks:
                self._send(rank, FrameKind.TASK, msgspec.json.encode(Task(number, content)))
        except RankLostError as error:
            self._tasks.fail(error)
        return future

    def expect_beats(self) -> None:
        """Declare the ranks ready to run steps: from now on none may be silent."""
        self._most_silence_s = _SILENCE_S

    def send_step(self, arrays: Sequence[Int32Array]) -> None:
        """Make all ranks run a step.

        Raises:
            RankLostError: a rank is lost.
        """
        payload = pack_arrays(arrays)
        for rank in self._ranks:
            self._send(rank, FrameKind.STEP, payload)

    def wait_for(self, event: DeviceEvent) -> None:
        """Wait for the device as long as the ranks are alive.

        Raises:
            RankLostError: a rank is lost, or takes too long.
        """
        deadline = time.monotonic() + STEP_TIMEOUT_S
        while not event.query():
            self.check()
            if time.monotonic() > deadline:
                self.fail(f"a step was not done after {STEP_TIMEOUT_S:.0f} s: a rank hangs")
            time.sleep(_POLL_S)

    def check(self) -> None:
        """Raise RankLostError if a rank is lost."""
        if self.failure is not None:
            self._is_noticed.set()
            raise RankLostError(self.failure)

    def fail(self, reason: str) -> None:
        """Give up all ranks; the first reason is kept."""
        with self._failing:
            if self.failure is not None or self._is_closed.is_set():
                return
            self.failure = reason
        self._is_lost.set()
        logger.error("ranks are given up: %s", reason)
        _kill(self._ranks)
        self._tasks.fail(RankLostError(reason))
        if self._on_gpus and self._most_silence_s == _STARTING_SILENCE_S:
            threading.Thread(target=self._end_if_stuck, daemon=True).start()

    def fail_step(self, error: Exception) -> None:
        """Give up all ranks because rank 0 failed in a step; if a rank is lost, that is the reason given."""
        if not self._is_lost.wait(_SOON_S):
            self.fail(f"rank 0 could not launch a step: {type(error).__name__}: {error}")

    def _end_if_stuck(self) -> None:
        """End this process if its thread, waiting in vain for its device, does not notice that ranks are lost."""
        if not self._is_noticed.wait(_STUCK_S):
            logger.critical("this process waits for a rank that is lost (%s), and ends", self.failure)
            os._exit(1)

    def close(self) -> None:
        """End all ranks; does nothing the second time."""
        self._finalizer()

    def listen(self, timeout_s: float) -> None:
        """Read what ranks have sent, and find those that are silent; called by the group's own thread."""
        for key, _ in self._selector.select(timeout_s):
            rank: _Rank = key.data
            try:
                kind, payload = rank.channel.receive()
            except (EOFError, OSError):
                self._selector.unregister(rank.channel.socket)
                self.fail(f"rank {rank.number} has ended{_how(rank.process)}")
                continue
            rank.heard_at = time.monotonic()
            if kind is FrameKind.REPLY:
                rank.replies.put(payload)
            elif kind is FrameKind.TASK_REPLY:
                self._tasks.take(rank.number, msgspec.json.decode(payload, type=TaskReply))
            elif kind is FrameKind.FAILURE:
                self.fail(f"rank {rank.number} failed: {payload.decode(errors='replace')}")
        now = time.monotonic()
        for rank in self._ranks:
            if now - rank.heard_at > self._most_silence_s:
                self.fail(f"rank {rank.number} has been silent for {self._most_silence_s:.0f} s")

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to listen to."""
        return self._is_closed.is_set() or self.failure is not None

    def _send(self, rank: _Rank, kind: FrameKind, payload: bytes) -> None:
        self.check()
        try:
            rank.channel.send(kind, payload)
        except OSError as error:
            self.fail(f"rank {rank.number} has ended{_how(rank.process)} ({error})")
            self.check()

    def _reply(self, rank: _Rank) -> Any:
        deadline = time.monotonic() + CALL_TIMEOUT_S
        while True:
            try:
                return msgspec.json.decode(rank.replies.get(timeout=0.1))
            except Empty:
                self.check()
                if time.monotonic() > deadline:
                    self.fail(f"rank {rank.number} gave no reply within {CALL_TIMEOUT_S:.0f} s")


def _start(number: int, module: str) -> _Rank:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        )
    return _Rank(number, process, Channel(ours), heard_at=time.monotonic())


def _listen(group_ref: "weakref.ref[RankGroup]") -> None:
    """Listen until the group has ended or is no longer in use."""
    while True:
        group = group_ref()
        if group is None or group.is_over:
            return
        group.listen(BEAT_INTERVAL_S / 2)
        del group


def _end(ranks: Sequence[_Rank], is_closed: threading.Event) -> None:
    """Let processes end, which they do when the other end of their sockets closes."""
    is_closed.set()  # from now on it is no failure if they end
    for rank in ranks:
        with suppress(OSError):
            rank.channel.socket.shutdown(socket.SHUT_RDWR)
    deadline = time.monotonic() + _STOP_S
    for rank in ranks:
        with suppress(subprocess.TimeoutExpired):
            rank.process.wait(max(deadline - time.monotonic(), 0))
    _kill(ranks)


def _kill(ranks: Sequence[_Rank]) -> None:
    """Kill processes, and wait until they are gone: nothing they hold is needed."""
    for rank in ranks:
        rank.process.kill()
    for rank in ranks:
        try:
            rank.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:  # stuck in the kernel, which will not let go of it
            logger.warning("rank %d is killed, but not gone yet", rank.number)


def _how(process: subprocess.Popen[bytes]) -> str:
    """How a process has ended, for a message."""
    try:
        code = process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        return ""
    return f", killed by signal {-code}" if code < 0 else f" with exit code {code}"


def _json(value: dict[str, Any]) -> bytes:
    return msgspec.json.encode(value)
