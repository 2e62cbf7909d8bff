"""Converts arguments that models write as plain text or as Python to JSON, by the tools' schemas."""

import ast
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deployments.chat.tool_formats.source import Reading, Source

Parameters = Mapping[str, Mapping[str, Any]]
"""JSON schemas of the tools' parameters, by the tools' names."""


def quoted(text: str) -> str:
    """JSON of a text."""
    return json.dumps(text, ensure_ascii=False)


def from_literal(text: str) -> str:
    """JSON of a value written in JSON or in Python; JSON of the text itself if it is neither."""
    for read in (_load, _evaluate):
        try:
            return json.dumps(read(text), ensure_ascii=False, allow_nan=False)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return quoted(text)


def types_of(parameters: Mapping[str, Any], key: str) -> set[str]:
    """JSON types that a tool's schema allows for a parameter; empty if it does not say."""
    properties = parameters.get("properties")
    schema = properties.get(key) if isinstance(properties, Mapping) else None
    return _types(schema, 0)


class Arguments:
    """Emits the arguments of one call, each a key followed by plain text.

    Args:
        source: the source in which the call was started.
        parameters: schema of the tool's parameters.
    """

    def __init__(self, source: Source, parameters: Mapping[str, Any]) -> None:
        self._source = source
        self._parameters = parameters
        self._separator = "{"

    def pass_value(self, key: str, tags: Sequence[str]) -> Reading[str]:
        """Emit a key and the value up to the first of `tags`, which is consumed; returns the tag, empty at the end.

        Texts are emitted as they come, everything else once it is complete.
        """
        self._source.arguments(f"{self._separator}{quoted(key)}: ")
        self._separator = ", "
        types = types_of(self._parameters, key)
        if types <= {"string"}:
            self._source.arguments('"')
            tag = yield from self._source.until(
                tags, lambda text: self._source.arguments(quoted(text)[1:-1]), keeps_cut=False
            )
            if tag:
                self._source.arguments('"')
            return tag
        text, tag = yield from self._source.text_until(tags)
        if tag:
            self._source.arguments(quoted(text) if "string" in types and text != "null" else from_literal(text))
        return tag

    def close(self) -> None:
        """Finish the arguments after the last one, unless the text is cut off here."""
        if not self._source.is_over:
            self._source.arguments("{}" if self._separator == "{" else "}")


def is_name(text: str) -> bool:
    """Whether this may be the name of a tool."""
    return 0 < len(text) <= _MAX_NAME and not any(char.isspace() or char in "<>{}[]()\"'" for char in text)


_MAX_NAME = 256
_load: Callable[[str], Any] = json.JSONDecoder(parse_constant=lambda _: float("nan")).decode


def _evaluate(text: str) -> Any:
    with warnings.catch_warnings(action="ignore"):  # of unknown escapes in strings
        return ast.literal_eval(text)


def _types(schema: object, depth: int) -> set[str]:
    if not isinstance(schema, Mapping) or depth > 8:
        return set()
    kind = schema.get("type")
    if isinstance(kind, str):
        return {kind}
    if isinstance(kind, list):
        return {each for each in kind if isinstance(each, str)}
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list):
        return {_JSON_TYPES.get(type(value), "null") for value in values}
    found: set[str] = set()
    for key in ("anyOf", "oneOf", "allOf"):
        options = schema.get(key)
        for option in options if isinstance(options, list) else ():
            found |= _types(option, depth + 1)
    if not found and "$ref" in schema:
        return {"any"}
    return found


_JSON_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", dict: "object", list: "array"}
