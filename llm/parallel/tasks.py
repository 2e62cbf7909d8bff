"""Tasks that ranks do beside their steps, in threads of their own, and reply to whenever they are done."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import msgspec


class Task(msgspec.Struct, frozen=True, array_like=True):
    """From rank 0: something to begin, in its place among the steps."""

    number: int
    """The reply goes by it."""
    content: Any


class TaskReply(msgspec.Struct, frozen=True, array_like=True):
    """To rank 0: what became of a task."""

    number: int
    content: Any


@dataclass(slots=True)
class _Pending:
    future: Future[Sequence[Any]]
    missing: set[int]
    replies: dict[int, Any] = field(default_factory=dict)


class PendingTasks:
    """The tasks that not every rank has done yet. Any thread may call it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: dict[int, _Pending] = {}
        self._num_tasks = 0

    def add(self, ranks: Sequence[int]) -> tuple[int, Future[Sequence[Any]]]:
        """Number a task that these ranks will be asked to do. The future has their replies, in this order."""
        pending = _Pending(Future(), set(ranks), dict.fromkeys(ranks))
        with self._lock:
            number = self._num_tasks
            self._num_tasks += 1
            self._pending[number] = pending
        return number, pending.future

    def take(self, rank: int, reply: TaskReply) -> None:
        """Take in a rank's reply. One to a task that nobody waits for any more is dropped."""
        with self._lock:
            pending = self._pending.get(reply.number)
            if pending is None:
                return
            pending.replies[rank] = reply.content
            pending.missing.discard(rank)
            if pending.missing:
                return
            del self._pending[reply.number]
        pending.future.set_result(list(pending.replies.values()))

    def fail(self, error: Exception) -> None:
        """End all tasks with an error: no reply will come."""
        with self._lock:
            ended = list(self._pending.values())
            self._pending.clear()
        for pending in ended:
            pending.future.set_exception(error)
