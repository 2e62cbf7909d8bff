"""A server that streams tokens at a set pace and remembers when it wrote each, to check clients against."""

import asyncio
import itertools
import json
import multiprocessing
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import cast

_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_EVENT = (
    b'data: {"id":"cmpl-3f1c9a52b7d84e06a5c1d7e88b20f4c6","object":"text_completion","created":1790000000,'
    b'"model":"emulated","choices":[{"index":0,"text":" word","logprobs":null,"finish_reason":%s}]}\n\n'
)
_TOKEN = _EVENT % b"null"
_LAST_TOKEN = _EVENT % b'"length"'


@dataclass(slots=True)
class StreamLog:
    """What the server did for one request, in seconds on the machine's monotonic clock.

    Attributes:
        received_s: when the whole request had come.
        written_s: when each token was written to the socket.
    """

    received_s: float
    written_s: list[float] = field(default_factory=list)


class _Stream(asyncio.Protocol):
    """One connection."""

    def __init__(self, server: "_Server") -> None:
        self._server = server
        self._received = b""
        self._num_left = 0
        self._serial = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self._server.streams.pop(self, None)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        if not end or len(body) < int(lengths[0][15:]):
            return
        self._received = b""
        self._num_left = json.loads(body)["max_tokens"]
        self._serial = next(self._server.serials)
        self._server.logs[self._serial] = StreamLog(time.monotonic())
        self._server.streams[self] = None
        self._transport.write(_HEAD)

    def write_token(self) -> None:
        """Write the next token, and what ends the answer after the last one."""
        self._num_left -= 1
        log = self._server.logs[self._serial]
        log.written_s.append(time.monotonic())
        self._write(_TOKEN if self._num_left else _LAST_TOKEN)
        if not self._num_left:
            del self._server.streams[self]
            usage = {"prompt_tokens": self._serial, "completion_tokens": len(log.written_s)}
            self._write(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\ndata: [DONE]\n\n")
            self._transport.write(b"0\r\n\r\n")

    def _write(self, events: bytes) -> None:
        self._transport.write(b"%x\r\n%s\r\n" % (len(events), events))


class _Server:
    """Streams and logs."""

    def __init__(self) -> None:
        self.serials = itertools.count(1)
        self.streams: dict[_Stream, None] = {}
        self.logs: dict[int, StreamLog] = {}

    async def run(self, tokens_per_s: float, pipe: Connection) -> None:
        """Serve until the parent hangs up; whatever it sends is answered with the logs so far, which are forgotten."""
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _Stream(self), "127.0.0.1", 0, backlog=4096)
        pipe.send(server.sockets[0].getsockname()[1])
        loop.add_reader(pipe.fileno(), self._answer, pipe)
        due = time.monotonic()
        while True:
            due = max(due + 1 / tokens_per_s, time.monotonic())
            await asyncio.sleep(due - time.monotonic())
            for stream in list(self.streams):
                stream.write_token()

    def _answer(self, pipe: Connection) -> None:
        try:
            pipe.recv()
        except EOFError:
            raise SystemExit from None
        pipe.send(self.logs)
        self.logs = {}


def _serve(tokens_per_s: float, pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Not uvloop: it gathers writes, and the log would be ahead of the socket.
    asyncio.run(_Server().run(tokens_per_s, pipe))


class Emulator:
    """The server's process, seen from outside.

    Attributes:
        url: the API's base.
    """

    def __init__(self, port: int, pipe: Connection) -> None:
        self.url = f"http://127.0.0.1:{port}/v1"
        self._pipe = pipe

    def take_logs(self) -> dict[int, StreamLog]:
        """Requests since the last call, by the number that each got as its `prompt_tokens`."""
        self._pipe.send(None)
        logs: dict[int, StreamLog] = self._pipe.recv()
        return logs


@contextmanager
def emulator(tokens_per_s: float) -> Iterator[Emulator]:
    """A server in a process of its own, on a free port.

    Args:
        tokens_per_s: of each stream; all streams get their tokens together, as from an engine's step.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(tokens_per_s, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield Emulator(ours.recv(), ours)
    finally:
        ours.close()
        process.join(timeout=5)
        if process.is_alive():
            process.terminate()
