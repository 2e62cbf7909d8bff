"""Ignored fields of a request's body: how they are named, and how a client is told."""

import re
from collections.abc import Iterator
from typing import Any

MAX_FIELDS = 64
"""Most distinct fields of one request that are noted; the rest are ignored without a note."""
_MAX_NAME_CHARS = 48
_MAX_PATH_CHARS = 120
_MAX_HEADER_CHARS = 1024
_UNSAFE = re.compile(r"[^A-Za-z0-9_$@:/-]")

_Place = tuple["_Place | None", str | int]
"""A place in a JSON value: the place that holds it, and its key or index there."""


class IgnoredFields:
    """Collects the fields of one request that were ignored.

    Among fields with the same name in the same kind of object, only the first is noted.

    Args:
        is_strict: refuse unknown fields instead of ignoring them.
    """

    def __init__(self, *, is_strict: bool = False) -> None:
        self.is_strict = is_strict
        self._first: dict[tuple[str, str], dict[str, Any]] = {}

    def note(self, kind: str, owner: dict[str, Any], name: str) -> None:
        """Note a field.

        Args:
            kind: kind of the object that holds the field, such as its model's name.
            owner: the parsed object itself, by which its place in the body is found.
            name: the field's name.
        """
        if len(self._first) < MAX_FIELDS:
            self._first.setdefault((kind, name), owner)

    def paths(self, body: Any) -> list[str]:
        """Where the fields are in the body, such as `messages[0].cache_control`, in characters safe for HTTP.

        Args:
            body: the JSON value whose objects were noted.
        """
        if not self._first:
            return []
        places = _places(body, {id(owner) for owner in self._first.values()})
        return [_written((places.get(id(owner)), name))[:_MAX_PATH_CHARS] for (_, name), owner in self._first.items()]


def header_value(paths: list[str]) -> str:
    """The paths as the value of a header; if it is too long, it is cut and ends with `...`."""
    value = ""
    for path in paths:
        longer = f"{value}, {path}" if value else path
        if len(longer) > _MAX_HEADER_CHARS - len(", ..."):
            return f"{value}, ..."
        value = longer
    return value


def _places(body: Any, wanted: set[int]) -> dict[int, _Place | None]:
    """Places of the objects with these ids; the search stops when all are found."""
    found: dict[int, _Place | None] = {}
    left: list[tuple[_Place | None, Any]] = [(None, body)]
    while left and len(found) < len(wanted):
        place, value = left.pop()
        if id(value) in wanted:
            found[id(value)] = place
        items = value.items() if isinstance(value, dict) else enumerate(value)
        inner = [((place, key), item) for key, item in items if type(item) is dict or type(item) is list]
        left.extend(reversed(inner))  # so that the first of many is visited first
    return found


def _written(place: _Place) -> str:
    path = "".join(reversed(list(_steps(place))))
    return path.removeprefix(".")


def _steps(place: _Place | None) -> Iterator[str]:
    """The place's steps from the inside out."""
    while place is not None:
        place, step = place
        yield f"[{step}]" if isinstance(step, int) else "." + _UNSAFE.sub("?", step[:_MAX_NAME_CHARS])
