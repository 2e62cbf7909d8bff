"""`Leader`: rank 0 as seen from the process of another rank."""

import os
import socket
import threading
from queue import SimpleQueue
from typing import Any

import msgspec

from llm.parallel.channel import Channel, FrameKind
from llm.parallel.ranks import BEAT_INTERVAL_S
from llm.parallel.tasks import TaskReply


class Leader:
    """Receives what rank 0 sends, in order, and replies. The process ends as soon as rank 0's is gone.

    One thread receives, so that rank 0 never waits for this one to read; another sends signs of life.

    Args:
        file_descriptor: descriptor of the socket that rank 0 has made.
    """

    def __init__(self, file_descriptor: int) -> None:
        self._channel = Channel(socket.socket(fileno=file_descriptor))
        self._frames: SimpleQueue[tuple[FrameKind, bytearray]] = SimpleQueue()
        self._over = threading.Event()
        for target in (self._receive, self._beat):
            threading.Thread(target=target, daemon=True).start()

    def next_frame(self) -> tuple[FrameKind, bytearray]:
        """Wait for the next step, call or task."""
        return self._frames.get()

    def reply(self, value: Any) -> None:
        """Answer the latest call."""
        self._channel.send(FrameKind.REPLY, msgspec.json.encode(value))

    def reply_to_task(self, number: int, content: Any) -> None:
        """Report what became of a task; any thread may."""
        self._channel.send(FrameKind.TASK_REPLY, msgspec.json.encode(TaskReply(number, content)))

    def fail(self, reason: str) -> None:
        """Report why this rank ends."""
        self._channel.send(FrameKind.FAILURE, reason.encode())

    def _receive(self) -> None:
        try:
            while True:
                self._frames.put(self._channel.receive())
        except (EOFError, OSError):
            # Nothing waits for what this process is doing, perhaps a collective that never ends.
            os._exit(0)

    def _beat(self) -> None:
        try:
            while not self._over.wait(BEAT_INTERVAL_S):
                self._channel.send(FrameKind.BEAT)
        except OSError:
            os._exit(0)
