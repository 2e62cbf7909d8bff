"""Fields of a request's body that were ignored: what they are called, and how a client is told."""

import re
from collections.abc import Iterator
from typing import Any

MAX_FIELDS = 64
"""Different fields of one request that are noted; the rest are ignored all the same."""
_MAX_NAME_CHARS = 48
_MAX_PATH_CHARS = 120
_MAX_HEADER_CHARS = 1024
_UNSAFE = re.compile(r"[^A-Za-z0-9_$@:/-]")

_Place = tuple["_Place | None", str | int]
"""A place in a JSON value: the place that holds it, and its key or index there."""


class IgnoredFields:
    """Collects the fields of one request that were ignored.

    Of fields with the same name in the same kind of object, the first one stands for all.

    Args:
        is_strict: unknown fields are to be refused, not ignored.
    """

    def __init__(self, *, is_strict: bool = False) -> None:
        self.is_strict = is_strict
        self._first: dict[tuple[str, str], dict[str, Any]] = {}

    def note(self, kind: str, owner: dict[str, Any], name: str) -> None:
        """Note a field.

        Args:
            kind: of the object that holds the field, such as its model's name.
            owner: the object itself, as it was parsed, by which its place in the body is found.
            name: the field's name.
        """
        if len(self._first) < MAX_FIELDS:
            self._first.setdefault((kind, name), owner)

    def paths(self, body: Any) -> list[str]:
        """Where the fields stand in the body, such as `messages[0].cache_control`, in characters safe for HTTP.

        Args:
            body: the JSON value whose objects were noted.
        """
        if not self._first:
            return []
        places = _places(body, {id(owner) for owner in self._first.values()})
        return [_written((places.get(id(owner)), name))[:_MAX_PATH_CHARS] for (_, name), owner in self._first.items()]


def header_value(paths: list[str]) -> str:
    """The paths as the value of a header, cut at a bounded length, where it ends with `...`."""
    value = ""
    for path in paths:
        longer = f"{value}, {path}" if value else path
        if len(longer) > _MAX_HEADER_CHARS - len(", ..."):
            return f"{value}, ..."
        value = longer
    return value


def _places(body: Any, wanted: set[int]) -> dict[int, _Place | None]:
    """Places of the objects with these ids, looked for until all are found."""
    found: dict[int, _Place | None] = {}
    left: list[tuple[_Place | None, Any]] = [(None, body)]
    while left and len(found) < len(wanted):
        place, value = left.pop()
        if id(value) in wanted:
            found[id(value)] = place
        items = value.items() if isinstance(value, dict) else enumerate(value)
        left.extend(((place, key), item) for key, item in items if isinstance(item, (dict, list)))
    return found


def _written(place: _Place) -> str:
    path = "".join(reversed(list(_steps(place))))
    return path.removeprefix(".")


def _steps(place: _Place | None) -> Iterator[str]:
    """The place's steps from the inside out."""
    while place is not None:
        place, step = place
        yield f"[{step}]" if isinstance(step, int) else "." + _UNSAFE.sub("?", step[:_MAX_NAME_CHARS])
