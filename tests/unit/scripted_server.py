"""An HTTP server on a real socket that answers by a script with times of its own, and remembers what it did when."""

import asyncio
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

Step = tuple[float, bytes]
"""Seconds to wait, then bytes of the body to send."""


@dataclass
class Answer:
    """What to send for a request; `is_cut` hangs up in the middle, `is_dropped` before anything."""

    steps: list[Step]
    status: str = "200 OK"
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "text/event-stream"})
    is_cut: bool = False
    is_dropped: bool = False


@dataclass
class Seen:
    """A request, and when its answer's steps were written, on the monotonic clock."""

    body: dict
    headers: dict[str, str]
    received_s: float
    written_s: list[float] = field(default_factory=list)
    connection: int = 0


class ScriptedServer:
    """Answers every request as `script` says; run it as a context manager."""

    def __init__(self, script: Callable[[dict], Answer]) -> None:
        self.script = script
        self.seen: list[Seen] = []
        self.most_at_once = 0
        self._num_at_once = 0
        self._num_connections = 0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> "ScriptedServer":
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def _run(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=512)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._num_connections += 1
        number = self._num_connections
        try:
            while await self._exchange(reader, writer, number):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:-2])}
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        seen = Seen(body, {"": head[0], **headers}, time.monotonic(), connection=number)
        self.seen.append(seen)
        self._num_at_once += 1
        self.most_at_once = max(self.most_at_once, self._num_at_once)
        try:
            return await self._answer(seen, self.script(body), writer)
        finally:
            self._num_at_once -= 1

    async def _answer(self, seen: Seen, answer: Answer, writer: asyncio.StreamWriter) -> bool:
        if answer.is_dropped:
            return False
        headers = "".join(f"{name}: {value}\r\n" for name, value in answer.headers.items())
        writer.write(f"HTTP/1.1 {answer.status}\r\n{headers}transfer-encoding: chunked\r\n\r\n".encode())
        for wait_s, data in answer.steps:
            await asyncio.sleep(wait_s)
            seen.written_s.append(time.monotonic())
            writer.write(b"%x\r\n%s\r\n" % (len(data), data))
            await writer.drain()
        if answer.is_cut:
            return False
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True


def event(document: dict) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(document).encode() + b"\n\n"


def chunk(text: str | None, finish_reason: str | None = None, *, role: str | None = None) -> bytes:
    """A chat's chunk."""
    delta = {key: value for key, value in (("role", role), ("content", text)) if value is not None}
    return event({"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}], "usage": None})


def usage(num_prompt: int, num_output: int) -> bytes:
    """The last chunk with `stream_options.include_usage`."""
    return event({"choices": [], "usage": {"prompt_tokens": num_prompt, "completion_tokens": num_output}})


DONE = b"data: [DONE]\n\n"


def tokens(num: int, gap_s: float = 0.0, first_s: float = 0.0) -> Answer:
    """An answer of `num` chunks of a token each."""
    steps = [(gap_s if i else first_s, chunk(" word")) for i in range(num)]
    return Answer([*steps, (0, chunk(None, "length") + usage(7, num) + DONE)])
