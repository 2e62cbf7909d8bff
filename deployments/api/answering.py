"""Turns a turn into an HTTP answer, whole or as server-sent events, in the format of the API that was used."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from deployments.api.callers import timing_header
from deployments.api.json_parts import JSONResponse, json_pieces
from deployments.api.sse import EventStream, encode_json, until_disconnect
from deployments.chat.choices import Update
from deployments.chat.errors import APIError
from deployments.chat.turn import Turn

KEEP_ALIVE = b": keep-alive\n\n"
KEEP_ALIVE_S = 10.0
"""How often a client that waits for its stream to begin is told that the connection is alive."""
_INLINE_VALUES = 2_000


class AnswerWriter(Protocol):
    """Writes a turn in the format of one API: either as events (`begin`, `write`, `settle`, `end`, or `failure`), or
    whole (`add`, `settle`, `whole`)."""

    def begin(self) -> bytes:
        """Events sent before anything is known."""
        ...

    def write(self, updates: Sequence[Update]) -> bytes:
        """Events for what is new."""
        ...

    async def settle(self) -> None:
        """Do what must be done before the client is told that the turn is complete."""
        ...

    def end(self) -> bytes:
        """Events sent once the turn is complete."""
        ...

    def failure(self, error: APIError) -> bytes:
        """Events that end the stream because something failed."""
        ...

    def add(self, updates: Sequence[Update]) -> None:
        """Take in what is new."""
        ...

    def whole(self) -> dict[str, Any]:
        """The answer, once the turn is complete. May be called in a thread."""
        ...

    @property
    def num_values(self) -> int:
        """Approximate number of values in the whole answer."""
        ...


async def answer(
    request: Request,
    start: Coroutine[Any, Any, tuple[Turn, AnswerWriter]],
    failure: Callable[[APIError], bytes],
    *,
    is_streamed: bool,
) -> Response:
    """Answer with a turn, in the form that was asked for.

    A stream that has nothing to send for a while begins anyway, with comments that keep the connection open. From then
    on an error is sent as an event.

    Args:
        request: the HTTP request whose client waits.
        start: starts the turn, and creates its writer.
        failure: events that end a stream whose turn could not be started.
        is_streamed: whether to stream the answer.

    Raises:
        APIError, LLMError: the turn failed before anything was sent.
    """
    if not is_streamed:
        pieces, headers = await until_disconnect(request.receive, _whole(start))
        return JSONResponse(pieces, headers)
    begun = asyncio.create_task(_begun(start))
    try:
        await until_disconnect(request.receive, asyncio.wait({begun}, timeout=KEEP_ALIVE_S))
    except BaseException:
        _give_up(begun)
        raise
    if not begun.done():
        return EventStream(_late_stream(begun), failure, stop=lambda: _give_up(begun))
    turn, writer = begun.result()
    return EventStream(event_stream(turn, writer), writer.failure, timing_header(turn.phases_ms()), turn.cancel)


async def _begun(start: Coroutine[Any, Any, tuple[Turn, AnswerWriter]]) -> tuple[Turn, AnswerWriter]:
    """A turn that has something to send.

    Raises:
        APIError, LLMError: it could not be started, or failed at once.
    """
    turn, writer = await start
    try:
        await turn.begin()
    except BaseException:
        turn.cancel()
        raise
    return turn, writer


def _give_up(begun: "asyncio.Task[tuple[Turn, AnswerWriter]]") -> None:
    """End a turn that may not have begun."""
    begun.cancel()
    if begun.done() and not begun.cancelled() and begun.exception() is None:
        begun.result()[0].cancel()


async def _late_stream(begun: "asyncio.Task[tuple[Turn, AnswerWriter]]") -> AsyncGenerator[bytes, None]:
    """Comments until the turn has begun, then its events, or those of its failure."""
    while not begun.done():
        yield KEEP_ALIVE
        await asyncio.wait({begun}, timeout=KEEP_ALIVE_S)
    turn, writer = begun.result()
    try:
        async with aclosing(event_stream(turn, writer)) as events:
            async for some in events:
                yield some
    except APIError as error:
        yield writer.failure(error)


async def event_stream(turn: Turn, writer: AnswerWriter) -> AsyncGenerator[bytes, None]:
    """Events of a turn that has begun; events that are ready at the same time come as one chunk.

    Raises:
        APIError: a choice failed.
    """
    if first := writer.begin():
        yield first
    while True:
        events = writer.write(await turn.updates())
        if turn.is_complete:
            await writer.settle()
            yield events + writer.end()
            return
        if events:
            yield events


async def _whole(
    start: Coroutine[Any, Any, tuple[Turn, AnswerWriter]],
) -> tuple[list[bytes], dict[str, str]]:
    """The whole answer, in pieces, and its headers."""
    turn, writer = await _begun(start)
    try:
        while not turn.is_complete:
            writer.add(await turn.updates())
        await writer.settle()
    finally:
        turn.cancel()
    headers = timing_header(turn.phases_ms())
    if writer.num_values <= _INLINE_VALUES:
        return [encode_json(writer.whole())], headers
    return await asyncio.to_thread(lambda: json_pieces(writer.whole())), headers


def json_response(value: Any, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer made of plain values."""
    return Response(encode_json(value), media_type="application/json", headers=headers)
