"""Grammars that reproduce the exact integers of schemas whose `const` or `enum` holds integers too large for a double.

llguidance turns the numbers of a schema into doubles: 1234567890123456789 would come out as 1234567890123456768. So the
    path from the root of the schema to such a number is written here as a Lark grammar, which refers to schemas for
    everything beside it. Objects on that path hold only the properties that the schema names.
"""

import json
from collections.abc import Iterable
from typing import Any

from llm.sampling.json_schema import Schema, children, invalid_grammar, relocated, resolve

_EXACT = 2**53
_ANNOTATIONS = frozenset(
    {"$comment", "$defs", "$id", "$schema", "default", "definitions", "deprecated", "description", "examples",
     "title"}
)  # fmt: skip
_KINDS: dict[type, set[str]] = {
    bool: {"boolean"}, int: {"integer", "number"}, float: {"number"}, str: {"string"}, list: {"array"},
    dict: {"object"}, type(None): {"null"},
}  # fmt: skip


def write_out(schema: Schema, options: Schema, prefix: str = "") -> list[dict[str, Any]]:
    """Write a grammar for the schema, and those that it refers to; none if llguidance follows the schema exactly.

    Args:
        schema: as `prepare` returns it.
        options: options of llguidance's schema compiler.
        prefix: prefix of the grammars' names.

    Raises:
        InvalidRequestError: there is a large integer in a place where this cannot be done.
    """
    writer = _Writer(schema, options, prefix)
    if not writer.reaches_large(schema):
        return []
    start = writer.rule(schema)
    lark = "\n".join([f"start: {start}", *writer.rules, r"WS: / |\n {0,40}/"])
    return [{"name": "large", "lark_grammar": lark}, *writer.leaves]


class _Writer:
    """Writes the rules of the grammar.

    Args:
        root: the whole schema.
        options: options of llguidance's schema compiler.
        prefix: prefix of the leaves' names.

    Attributes:
        rules: lines of the Lark grammar.
        leaves: grammars that the rules refer to.
    """

    def __init__(self, root: Schema, options: Schema, prefix: str) -> None:
        self.rules: list[str] = []
        self.leaves: list[dict[str, Any]] = []
        self._root = root
        self._options = options
        self._prefix = prefix
        self._num_rules = 0
        self._references: dict[str, str] = {}

    def reaches_large(self, schema: object) -> bool:
        """Whether a large integer may be part of an answer to the schema."""
        seen: set[str] = set()
        stack = [schema]
        while stack:
            node = stack.pop()
            if not isinstance(node, dict):
                continue
            if _has_large(node.get("const")) or _has_large(node.get("enum")):
                return True
            reference = node.get("$ref")
            if isinstance(reference, str) and reference not in seen:
                seen.add(reference)
                stack.append(resolve(self._root, reference))
            stack += children({key: value for key, value in node.items() if key not in ("$defs", "definitions")})
        return False

    def rule(self, schema: object) -> str:
        """The name of a rule for a schema."""
        if not isinstance(schema, dict) or not self.reaches_large(schema):
            return self._leaf(schema)
        keywords = schema.keys() - _ANNOTATIONS
        if keywords == {"$ref"}:
            return self._reference(schema["$ref"])
        if keywords <= {"const", "enum", "type"}:
            return self._add(" | ".join(map(_literal, _values(schema))))
        if keywords == {"anyOf"} or (keywords == {"allOf"} and len(schema["allOf"]) == 1):
            (options,) = (schema[key] for key in keywords)
            return self._add(" | ".join(self.rule(option) for option in options if option is not False))
        if keywords <= {"type", "properties", "required", "additionalProperties"}:
            return self._object(schema)
        if keywords <= {"type", "items", "minItems", "maxItems"}:
            return self._array(schema)
        raise invalid_grammar(f"an integer beyond 2^53 cannot be followed beside {', '.join(sorted(keywords))}")

    def _add(self, body: str, name: str | None = None) -> str:
        if not body:
            raise invalid_grammar("no answer fits the schema")
        self._num_rules += 1
        name = name or f"r{self._num_rules}"
        self.rules.append(f"{name}: {body}")
        return name

    def _leaf(self, schema: object) -> str:
        name = f"{self._prefix}leaf{len(self.leaves)}"
        definitions = {"root": relocated(self._root, "#/$defs/root"), "leaf": relocated(schema, "#/$defs/root")}
        leaf = {"$ref": "#/$defs/leaf", "$defs": definitions, "x-guidance": self._options}
        self.leaves.append({"name": name, "json_schema": leaf})
        return f"@{name}"

    def _reference(self, reference: str) -> str:
        name = self._references.get(reference)
        if name is None:
            name = self._references[reference] = f"ref{len(self._references)}"
            self._add(self.rule(resolve(self._root, reference)), name)
        return name

    def _object(self, schema: Schema) -> str:
        """Properties in their order; which of two rules continues says whether a comma is due."""
        required = set(schema.get("required", ()))
        properties = {name: each for name, each in schema.get("properties", {}).items() if each is not False}
        properties |= {name: {} for name in schema.get("required", ()) if name not in properties}
        first = rest = ""
        for name, each in reversed(properties.items()):
            pair = f'{_literal(name)} ":" WS? {self.rule(each)}'
            with_pair, with_comma = f"{pair} {rest}", f'"," WS? {pair} {rest}'
            is_last = not rest and not first
            skipped_first, skipped_rest = (first or '""', rest or '""')
            if name in required:
                first, rest = self._add(with_pair), self._add(with_comma)
            elif is_last:
                first, rest = self._add(f'{with_pair} | ""'), self._add(f'{with_comma} | ""')
            else:
                first, rest = self._add(f"{with_pair} | {skipped_first}"), self._add(f"{with_comma} | {skipped_rest}")
        return self._add(f'"{{" WS? {first} WS? "}}"')

    def _array(self, schema: Schema) -> str:
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if most == 0:
            return self._add('"[" WS? "]"')
        item = self.rule(schema.get("items", {}))
        upper = "" if most is None else str(most - 1)
        items = f'{item} ("," WS? {item}){{{max(least - 1, 0)},{upper}}}'
        return self._add(f'"[" WS? {items} WS? "]"' + (' | "[" WS? "]"' if least == 0 else ""))


def _values(schema: Schema) -> list[Any]:
    """The values that `const`, `enum` and `type` allow."""
    values = schema["enum"] if "enum" in schema else [schema["const"]]
    if "enum" in schema and "const" in schema:
        values = [value for value in values if value == schema["const"]]
    kinds = schema.get("type")
    kinds = {kinds} if isinstance(kinds, str) else set(kinds or ())
    return [value for value in values if not kinds or kinds & _KINDS[type(value)]]


def _literal(value: Any) -> str:
    """Lark for the JSON text of a value."""
    return json.dumps(json.dumps(value, ensure_ascii=False))


def _has_large(value: object) -> bool:
    stack = [value]
    while stack:
        each = stack.pop()
        if isinstance(each, int) and abs(each) > _EXACT:
            return True
        parts: Iterable[object] = each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()
        stack += parts
    return False
