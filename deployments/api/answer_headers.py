"""Headers that an answer gets whatever becomes of the request: whole, streamed or an error."""

import secrets
from collections.abc import MutableMapping
from typing import Any

from starlette.types import Message

IGNORED_HEADER = "X-Rayline-Ignored"
"""Fields of the request's body that were ignored, separated by commas."""

_KEY = "added_headers"
_ANTHROPIC_REQUEST_ID = "request-id"


def add_header(scope: MutableMapping[str, Any], name: str, value: str) -> None:
    """Give the answer to this request a header, in characters of Latin-1."""
    scope.setdefault("state", {}).setdefault(_KEY, []).append((name.lower().encode(), value.encode("latin-1")))


def with_added_headers(scope: MutableMapping[str, Any], message: Message) -> Message:
    """The message of an answer, with the headers added to the request if it begins the answer."""
    added = scope.get("state", {}).get(_KEY)
    if not added or message["type"] != "http.response.start":
        return message
    return {**message, "headers": [*message.get("headers", ()), *added]}


def add_request_id(scope: MutableMapping[str, Any]) -> None:
    """Give the answer the header in which Anthropic's clients look for a request's id: its own, or a new one."""
    given = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"), "")
    add_header(scope, _ANTHROPIC_REQUEST_ID, given[:128] or f"req_{secrets.token_hex(12)}")
