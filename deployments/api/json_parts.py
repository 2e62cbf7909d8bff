"""Long answers in JSON, written in pieces.

The encoder holds the interpreter's lock for its whole call, so one call for a million numbers would block everything
else.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deployments.api.sse import encode_json

_FEW = 256
_CONTAINERS_AT_ONCE, _SCALARS_AT_ONCE = 16, 4096
_PIECE_BYTES = 256 << 10


def json_pieces(value: Any) -> list[bytes]:
    """The JSON of a value, in pieces of a size worth sending. Call it in a thread if the value may be large."""
    pieces: list[bytes] = []
    parts: list[bytes] = []
    size = 0
    for part in _parts(value):
        parts.append(part)
        size += len(part)
        if size >= _PIECE_BYTES:
            pieces.append(b"".join(parts))
            parts, size = [], 0
    return [*pieces, b"".join(parts)]


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, dict):
        yield b"{"
        for index, (key, item) in enumerate(value.items()):
            yield (b"," if index else b"") + encode_json(key) + b":"
            yield from _parts(item)
        yield b"}"
    elif isinstance(value, list) and value:
        yield b"["
        yield from _items(value)
        yield b"]"
    else:
        yield encode_json(value)


def _items(items: list[Any]) -> Iterator[bytes]:
    are_containers = isinstance(items[0], (dict, list))
    if are_containers and len(items) <= _FEW:
        for index, item in enumerate(items):
            if index:
                yield b","
            yield from _parts(item)
        return
    left = iter(items)
    is_first = True
    while some := list(islice(left, _CONTAINERS_AT_ONCE if are_containers else _SCALARS_AT_ONCE)):
        yield (b"" if is_first else b",") + encode_json(some)[1:-1]
        is_first = False


class JSONResponse(Response):
    """Sends JSON that has been written in pieces.

    Args:
        pieces: what `json_pieces` returned.
        headers: headers besides those of JSON.
    """

    def __init__(self, pieces: Iterable[bytes], headers: Mapping[str, str] | None = None) -> None:
        self._pieces = list(pieces)
        length = {"content-length": str(sum(map(len, self._pieces)))}
        super().__init__(media_type="application/json", headers={**(headers or {}), **length})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        """Send piece after piece."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        for index, piece in enumerate(self._pieces, 1):
            more = index < len(self._pieces)
            await send({"type": "http.response.body", "body": piece, "more_body": more})
