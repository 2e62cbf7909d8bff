"""From a turn to an HTTP answer, whole or as server-sent events, in the words of whichever API was asked."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from deployments.api.callers import timing_header
from deployments.api.json_parts import JSONResponse, json_pieces
from deployments.api.sse import EventStream, encode_json, until_disconnect
from deployments.chat.choices import Update
from deployments.chat.errors import APIError
from deployments.chat.turn import Turn

_INLINE_VALUES = 2_000


class AnswerWriter(Protocol):
    """Writes a turn in the words of one API: either as events (`begin`, `write`, `end`, or `failure`), or whole (`add`,
    then `whole`)."""

    def begin(self) -> bytes:
        """Events that come before anything is known."""
        ...

    def write(self, updates: Sequence[Update]) -> bytes:
        """Events that tell what is new."""
        ...

    def end(self) -> bytes:
        """Events that come once the turn is complete."""
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
        """About how many values the whole answer has."""
        ...


async def answer(request: Request, turn: Turn, writer: AnswerWriter, *, is_streamed: bool) -> Response:
    """The turn in the form that was asked for.

    Raises:
        APIError: it failed before anything was sent.
    """
    try:
        if is_streamed:
            await until_disconnect(request.receive, turn.begin())
            return EventStream(event_stream(turn, writer), writer.failure, timing_header(turn.phases_ms()), turn.cancel)
        pieces = await until_disconnect(request.receive, _whole(turn, writer))
    except BaseException:
        turn.cancel()
        raise
    return JSONResponse(pieces, timing_header(turn.phases_ms()))


async def event_stream(turn: Turn, writer: AnswerWriter) -> AsyncGenerator[bytes, None]:
    """Events of a turn that has begun, those that are ready together in one piece.

    Raises:
        APIError: a choice failed.
    """
    if first := writer.begin():
        yield first
    while True:
        events = writer.write(await turn.updates())
        if turn.is_complete:
            yield events + writer.end()
            return
        if events:
            yield events


async def _whole(turn: Turn, writer: AnswerWriter) -> list[bytes]:
    while not turn.is_complete:
        writer.add(await turn.updates())
    turn.cancel()
    if writer.num_values <= _INLINE_VALUES:
        return [encode_json(writer.whole())]
    return await asyncio.to_thread(lambda: json_pieces(writer.whole()))


def json_response(value: Any, headers: Mapping[str, str] | None = None) -> Response:
    """An answer of plain values."""
    return Response(encode_json(value), media_type="application/json", headers=headers)
