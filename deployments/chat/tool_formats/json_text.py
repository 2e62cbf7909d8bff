"""Reads calls written as JSON while they are being written."""

import json
import re
from collections.abc import Callable

from deployments.chat.tool_formats.source import Reading, Source

_HEAD = re.compile(
    r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_FIRST_KEY = re.compile(r'\{\s*"([^"\\]*)"')
_KEYS = frozenset({"type", "id", "name", "arguments", "parameters"})


class Nesting:
    """Finds the end of a JSON object or array in text that comes in pieces. The first piece begins with it.

    Args:
        depth: brackets that are open already.
    """

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = False
        self._is_escaped = False

    def find_end(self, text: str) -> int:
        """The position after the last bracket; -1 until it arrives."""
        for place, char in enumerate(text):
            if self._is_escaped:
                self._is_escaped = False
            elif self._in_string:
                self._is_escaped = char == "\\"
                self._in_string = char != '"'
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return place + 1
            elif char == '"':
                self._in_string = True
        return -1


def pass_json(source: Source, take: Callable[[str], None], depth: int = 0) -> Reading[bool]:
    """Pass the text of an object or array to `take` as it comes; returns whether it is complete.

    Args:
        depth: brackets that are open already.
    """
    nesting = Nesting(depth)
    while True:
        rest = source.rest
        end = nesting.find_end(rest)
        take(source.skip(end if end >= 0 else len(rest)))
        if end >= 0 or source.is_over:
            return end >= 0
        yield


def pass_arguments(source: Source) -> Reading[None]:
    """Emit the object here as the last call's arguments, as it comes; an empty one without white space in it."""
    text = source.skip(1)
    while (char := (yield from source.peek())) and char.isspace():
        text += source.skip(1)
    source.arguments(text.rstrip() if char == "}" else text)
    yield from pass_json(source, source.arguments, depth=1)


def pass_call(source: Source, *, is_marked: bool) -> Reading[bool]:
    """Emit the call that the JSON object here describes; returns whether it is one. If not, some may be consumed.

    Args:
        is_marked: markup announces a call, so an object without arguments is a call too.
    """
    nesting = Nesting()
    num_seen = 0
    while True:
        rest = source.rest
        head = _HEAD.match(rest)
        if head is not None:
            source.start_call(json.loads(head[1], strict=False))
            source.skip(head.end())
            yield from pass_arguments(source)
            yield from pass_json(source, lambda _: None, depth=1)
            return True
        end = nesting.find_end(rest[num_seen:])
        if end >= 0:
            return _give_whole(source, source.skip(num_seen + end), is_marked)
        num_seen = len(rest)
        first = _FIRST_KEY.match(rest)
        if source.is_over or (first is not None and first[1] not in _KEYS):
            return False
        yield


def pass_calls(source: Source) -> Reading[bool]:
    """Emit the calls of a JSON list, or the single call here; returns whether there is one. If not, some may be
    consumed.

    Call this where markup has announced calls.
    """
    is_list = bool((yield from source.passes("[")))
    num_before = source.num_calls
    while (yield from source.skip_space(" \t\r\n,")) == "{":
        is_first = source.num_calls == num_before
        if not is_first:
            source.mark()
        if not (yield from pass_call(source, is_marked=True)):
            if not is_first:
                source.rewind()
            break
        if not is_list:
            return True
    if source.num_calls == num_before:
        return False
    yield from source.passes("]")
    return True


def _give_whole(source: Source, text: str, is_marked: bool) -> bool:
    """Emit a call whose keys are in an unusual order; returns whether it is one."""
    try:
        value = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return False
    arguments = value.get("arguments", value.get("parameters", {} if is_marked else None))
    if isinstance(arguments, str):
        arguments = _object_of(arguments)
    if not isinstance(value.get("name"), str) or not isinstance(arguments, dict):
        return False
    source.start_call(value["name"])
    source.arguments(json.dumps(arguments, ensure_ascii=False))
    return True


def _object_of(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
