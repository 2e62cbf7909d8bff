"""Headers that an answer gets whatever becomes of the request: whole, streamed or an error."""

from collections.abc import MutableMapping
from typing import Any

from starlette.types import Message

IGNORED_HEADER = "X-Rayline-Ignored"
"""Fields of the request's body that were ignored, separated by commas."""

_KEY = "added_headers"


def add_header(scope: MutableMapping[str, Any], name: str, value: str) -> None:
    """Give the answer to this request a header, in characters of Latin-1."""
    scope.setdefault("state", {}).setdefault(_KEY, []).append((name.lower().encode(), value.encode("latin-1")))


def with_added_headers(scope: MutableMapping[str, Any], message: Message) -> Message:
    """The message of an answer, with the headers added to the request if it begins the answer."""
    added = scope.get("state", {}).get(_KEY)
    if not added or message["type"] != "http.response.start":
        return message
    return {**message, "headers": [*message.get("headers", ()), *added]}
