"""Server-sent events, and answers that end when the client disconnects."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deployments.api.errors import error_body, note_reason
from deployments.chat.errors import APIError, internal, of_engine
from llm.errors import LLMError

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
    """Sends byte chunks directly through ASGI as they arrive.

    Args:
        chunks: whole events.
        failure: the events that report an error in the format of the API that the client uses. Every stream that fails
            ends with them: by then it is too late for a status, but a stream is never just cut off.
        headers: headers besides those of an event stream.
        stop: stops the work that produces the chunks. Called when the answer ends, in whatever way, because closing a
            generator that nobody has begun to read runs none of its code.
    """

    def __init__(
        self,
        chunks: AsyncGenerator[bytes, None],
        failure: Callable[[APIError], bytes],
        headers: Mapping[str, str] | None = None,
        stop: Callable[[], None] | None = None,
    ) -> None:
        super().__init__()
        self._chunks = chunks
        self._failure = failure
        self._stop = stop
        self._extra_headers = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the chunks until they end or the client disconnects."""
        try:
            with suppress(ClientLeftError):
                await until_disconnect(receive, self._send_all(scope, send))
        finally:
            if self._stop is not None:
                self._stop()

    async def _send_all(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS + self._extra_headers})
        try:
            async with aclosing(self._chunks) as chunks:
                async for chunk in chunks:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except (APIError, LLMError) as raised:
            error = of_engine(raised) if isinstance(raised, LLMError) else raised
            note_reason(scope, error)
            await send({"type": "http.response.body", "body": self._failure(error), "more_body": True})
        except Exception:  # the edge of a request: logged in full here, with nothing revealed to the client
            logger.exception("a stream failed")
            note_reason(scope, internal())
            await send({"type": "http.response.body", "body": self._failure(internal()), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def until_disconnect(receive: Receive, work: Awaitable[T]) -> T:
    """Do `work`; cancel it when the client disconnects. The request's body must have been read.

    Raises:
        ClientLeftError: the client disconnected first.
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
    """An event made of plain values."""
    return b"data: " + encode_json(value) + b"\n\n"


def error_events(error: APIError) -> bytes:
    """The events that end a stream of OpenAI's completions after a failure."""
    return b"data: " + error_body(error) + b"\n\n" + DONE
