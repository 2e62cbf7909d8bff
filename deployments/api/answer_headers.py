"""Headers that every answer gets, whether it is whole, streamed or an error."""

import secrets
from collections.abc import MutableMapping
from typing import Any

from starlette.types import Message

IGNORED_HEADER = "X-Rayline-Ignored"
"""Fields of the request's body that were ignored, separated by commas."""

_KEY = "added_headers"
_ANTHROPIC_REQUEST_ID = "request-id"


def add_header(scope: MutableMapping[str, Any], name: str, value: str) -> None:
    """Add a header, in Latin-1 characters, to the answer to this request."""
    scope.setdefault("state", {}).setdefault(_KEY, []).append((name.lower().encode(), value.encode("latin-1")))


def with_added_headers(scope: MutableMapping[str, Any], message: Message) -> Message:
    """An answer's message; if it begins the answer, with the headers that were added for this request."""
    added = scope.get("state", {}).get(_KEY)
    if not added or message["type"] != "http.response.start":
        return message
    return {**message, "headers": [*message.get("headers", ()), *added]}


def add_request_id(scope: MutableMapping[str, Any]) -> None:
    """Add the header in which Anthropic's clients look for a request's id: the client's own id, or a new one."""
    given = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"), "")
    add_header(scope, _ANTHROPIC_REQUEST_ID, given[:128] or f"req_{secrets.token_hex(12)}")
