"""Server-sent events, and answers that end when the client leaves.

Chunks are put together from strings made once per choice; nothing here is validated or serialised per token but the
new text itself.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deployments.api.errors import error_body
from deployments.chat.errors import internal

logger = logging.getLogger("ray.serve")

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

encode_json = msgspec.json.Encoder().encode


class ClientLeftError(Exception):
    """The client closed the connection; there is nobody to answer."""


class EventStream(Response):
    """Sends byte chunks as they come, straight through ASGI.

    Args:
        chunks: whole events.
        headers: beside those of an event stream.
        stop: stops the work behind the chunks. Called when the answer ends, in whatever way: closing a generator that
            nobody has begun to read runs none of its code.
    """

    def __init__(
        self,
        chunks: AsyncGenerator[bytes, None],
        headers: Mapping[str, str] | None = None,
        stop: Callable[[], None] | None = None,
    ) -> None:
        super().__init__()
        self._chunks = chunks
        self._stop = stop
        self._extra_headers = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        """Send the chunks until they end or the client leaves."""
        try:
            with suppress(ClientLeftError):
                await until_disconnect(receive, self._send_all(send))
        finally:
            if self._stop is not None:
                self._stop()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS + self._extra_headers})
        try:
            async with aclosing(self._chunks) as chunks:
                async for chunk in chunks:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except Exception:  # too late for an HTTP error, but a stream is never just cut
            logger.exception("a stream failed")
            body = b"data: " + error_body(internal()) + b"\n\n" + DONE
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def until_disconnect(receive: Receive, work: Awaitable[T]) -> T:
    """Do `work`; cancel it when the client leaves. The request's body must have been read.

    Raises:
        ClientLeftError: the client left first.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeftError
        return task.result()
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def event(value: Any) -> bytes:
    """An event of plain values."""
    return b"data: " + encode_json(value) + b"\n\n"


class ChunkWriter:
    """Events of one streamed choice, with everything that stays the same made once.

    Args:
        head: the chunk's fields before `choices`.
        index: of the choice.
        is_chat: chat chunks carry `delta`, completion chunks `text`.
        with_usage: every chunk but the last says `"usage": null`.
    """

    def __init__(self, head: dict[str, Any], index: int, *, is_chat: bool, with_usage: bool) -> None:
        start = b"data: " + encode_json(head)[:-1] + b',"choices":[{"index":%d,' % index
        self._open_delta = start + b'"delta":'
        self._open_text = start + (b'"delta":{"content":' if is_chat else b'"text":')
        self._close_text = (b"}" if is_chat else b"") + b',"logprobs":'
        self._open_empty = start + (b'"delta":{}' if is_chat else b'"text":""') + b',"logprobs":null,"finish_reason":'
        self._open_role = start + b'"delta":{"role":"assistant","content":"","refusal":null},"logprobs":null'
        self._tail = b"}]" + (b',"usage":null' if with_usage else b"") + b"}\n\n"
        self._plain_tail = self._close_text + b'null,"finish_reason":null' + self._tail

    def role(self) -> bytes:
        """The first chunk of a chat choice."""
        return self._open_role + b',"finish_reason":null' + self._tail

    def text(self, text: str, logprobs: dict[str, Any] | None = None) -> bytes:
        """New text."""
        if logprobs is None:
            return self._open_text + encode_json(text) + self._plain_tail
        return (
            self._open_text + encode_json(text) + self._close_text + encode_json(logprobs)
            + b',"finish_reason":null' + self._tail
        )  # fmt: skip

    def delta(self, delta: dict[str, Any], logprobs: dict[str, Any] | None = None) -> bytes:
        """Anything else that is new in a chat choice."""
        return (
            self._open_delta + encode_json(delta) + b',"logprobs":' + encode_json(logprobs)
            + b',"finish_reason":null' + self._tail
        )  # fmt: skip

    def finish(self, reason: str) -> bytes:
        """The last chunk of a choice."""
        return self._open_empty + encode_json(reason) + self._tail
