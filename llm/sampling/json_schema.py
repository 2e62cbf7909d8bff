"""Converts JSON schemas to a form llguidance can follow: every answer it allows satisfies the original schema.

llguidance (https://github.com/guidance-ai/llguidance, docs/json_schema.md) stores numbers as doubles and ranges of
integers in 64 bits, and does not notice a reference that leads only back to itself.
"""

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

from llguidance import LLMatcher

from llm.errors import InvalidRequestError

MAX_DEPTH = 64
_MAX_STEPS = 200_000
_EXACT = 2**53
"""Doubles hold every integer up to this one."""
_LARGEST_BOUND = 2.0**63 - 1024
"""The largest double that fits in a signed 64-bit integer."""

_ONE_SCHEMA = frozenset(
    {"additionalItems", "additionalProperties", "contains", "else", "if", "items", "not", "propertyNames", "then",
     "unevaluatedItems", "unevaluatedProperties"}
)  # fmt: skip
_MANY_SCHEMAS = frozenset({"allOf", "anyOf", "items", "oneOf", "prefixItems"})
_NAMED_SCHEMAS = frozenset({"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"})

Schema = dict[str, Any]


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _is_count(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0 and value == value // 1


_SHAPES: dict[str, tuple[Callable[[object], bool], str]] = {
    "$ref": (lambda value: isinstance(value, str), "a text"),
    "type": (lambda value: isinstance(value, str) or _is_texts(value), "the name of a type, or a list of such"),
    "enum": (lambda value: isinstance(value, list), "a list"),
    "required": (_is_texts, "a list of texts"),
    "pattern": (lambda value: isinstance(value, str), "a text"),
    **{key: (lambda value: isinstance(value, dict), "an object") for key in _NAMED_SCHEMAS},
    **{key: (lambda value: isinstance(value, list), "a list") for key in _MANY_SCHEMAS - {"items"}},
    **dict.fromkeys(("minItems", "maxItems", "minLength", "maxLength"), (_is_count, "a number of 0 or more")),
}
_MEANT = frozenset({"$ref", "type"})
"""Keywords that are never left out."""


def invalid_grammar(message: str) -> InvalidRequestError:
    """Make the error for a grammar that cannot be followed."""
    return InvalidRequestError(f"grammar: {message}", param="grammar", code="invalid_grammar")


def parse_json(text: str) -> Any:
    """Parse a JSON text.

    Raises:
        InvalidRequestError: it is not JSON, is nested too deeply, or holds values that JSON or UTF-8 does not allow.
    """
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise invalid_grammar("it holds half of a surrogate pair") from None
    except (ValueError, RecursionError):
        raise invalid_grammar("it is not valid JSON, or nested too deeply") from None
    return value


def prepare(schema: object, *, is_lenient: bool = False) -> Schema:
    """Make a schema that llguidance can follow, with only answers that satisfy the given one.

    Args:
        schema: as `parse_json` returns it.
        is_lenient: leave out patterns that cannot be followed and keywords with invalid values; the compiler of the
            schema leaves out other keywords.

    Raises:
        InvalidRequestError: it is not a schema, or no answer satisfies it.
    """
    if not isinstance(schema, (dict, bool)):
        raise invalid_grammar("a JSON schema is an object")
    if depth_of(schema) > MAX_DEPTH:
        raise invalid_grammar(f"the schema is nested more than {MAX_DEPTH} levels deep")
    found = _Productive(schema)
    if not found.holds(schema):
        raise invalid_grammar("no answer fits the schema, or none that ends")
    if schema is True:
        return {}

    def change(node: Schema) -> object:
        if not found.holds(node):
            return False
        _check_shapes(node, is_lenient)
        node = _with_safe_bounds(node)
        if is_lenient and "pattern" in node and not _is_pattern(node["pattern"]):
            del node["pattern"]
        named = node.get("patternProperties")
        if is_lenient and named is not None:
            node["patternProperties"] = {key: value for key, value in named.items() if _is_pattern(key)}
        return node

    changed = _changed(schema, change)
    assert isinstance(changed, dict), "an object that an answer fits"
    changed.pop("x-guidance", None)  # options of the compiler are not for requests
    return changed


def children(schema: Schema) -> Iterator[object]:
    """The schemas directly within a schema."""
    for key, value in schema.items():
        if key in _MANY_SCHEMAS and isinstance(value, list):
            yield from value
        elif key in _NAMED_SCHEMAS and isinstance(value, dict):
            yield from value.values()
        elif key in _ONE_SCHEMA:
            yield value


def resolve(root: object, reference: str) -> object:
    """What a JSON pointer within `root` (`#/…`) refers to; None if it refers to nothing or is not such a pointer."""
    if reference not in ("", "#") and not reference.startswith("#/"):
        return None
    value = root
    for part in reference.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(value, dict) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            return None
    return value


def relocated(schema: object, place: str) -> Any:
    """Copy a schema so that its internal references remain valid after it moves to another place.

    Args:
        place: JSON pointer of that place, such as `#/$defs/name`.
    """

    def move(node: Schema) -> Schema:
        reference = node.get("$ref")
        if isinstance(reference, str) and reference.startswith("#"):
            node["$ref"] = place + reference[1:]
        return node

    return _changed(schema, move)


def depth_of(value: object) -> int:
    """Number of nesting levels, counted without recursion."""
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return depth


def _changed(schema: object, change: Callable[[Schema], object]) -> object:
    """A copy with `change` applied to every schema in it, outermost first."""
    if not isinstance(schema, dict):
        return schema
    changed = change(dict(schema))
    if not isinstance(changed, dict):
        return changed
    for key, value in changed.items():
        if key in _MANY_SCHEMAS and isinstance(value, list):
            changed[key] = [_changed(each, change) for each in value]
        elif key in _NAMED_SCHEMAS and isinstance(value, dict):
            changed[key] = {name: _changed(each, change) for name, each in value.items()}
        elif key in _ONE_SCHEMA:
            changed[key] = _changed(value, change)
    return changed


class _Productive:
    """Which schemas have a finite answer, as far as references, `false` and required parts decide it.

    It is the least fixed point: a reference counts once its target does, even if the two contain each other.

    Args:
        root: the schema in which references are resolved.

    Raises:
        InvalidRequestError: there are too many references to decide.
    """

    def __init__(self, root: object) -> None:
        self._root = root
        self._productive: set[str] = set()
        self._num_steps = 0
        references = sorted(set(_references(root)))
        is_growing = True
        while is_growing:
            is_growing = False
            for reference in [*references, *reversed(references)]:
                if reference not in self._productive and self.holds(resolve(root, reference)):
                    self._productive.add(reference)
                    is_growing = True

    def holds(self, schema: object) -> bool:
        """Whether some answer satisfies the schema."""
        self._num_steps += 1
        if self._num_steps > _MAX_STEPS:
            raise invalid_grammar("the schema's references are too many to follow")
        if not isinstance(schema, dict):
            return schema is not False
        reference = schema.get("$ref")
        is_local = isinstance(reference, str) and resolve(self._root, reference) is not None
        if is_local and reference not in self._productive:
            return False
        every, some = schema.get("allOf"), [schema.get(key) for key in ("anyOf", "oneOf")]
        if isinstance(every, list) and not all(map(self.holds, every)):
            return False
        if any(isinstance(options, list) and not any(map(self.holds, options)) for options in some):
            return False
        return self._has_productive_parts(schema)

    def _has_productive_parts(self, schema: Schema) -> bool:
        """Whether the required parts of an object or array of this schema can exist."""
        kinds = schema.get("type")
        properties, required = schema.get("properties"), schema.get("required")
        if kinds in ("object", ["object"]) and isinstance(properties, dict) and isinstance(required, list):
            names = [name for name in required if isinstance(name, str)]
            return all(self.holds(properties.get(name, True)) for name in names)
        num_items = schema.get("minItems", 0)
        if kinds in ("array", ["array"]) and isinstance(num_items, int) and num_items > 0:
            first, rest = schema.get("prefixItems"), schema.get("items", True)
            if not isinstance(first, list):
                first = rest if isinstance(rest, list) else []
            needed = [*first[:num_items], *([rest] if num_items > len(first) and not isinstance(rest, list) else [])]
            return all(map(self.holds, needed))
        return True


def _references(schema: object) -> Iterator[str]:
    stack = [schema]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                yield node["$ref"]
            stack += children(node)


def _check_shapes(schema: Schema, is_lenient: bool) -> None:
    """Refuse keywords with invalid values, or leave them out. A keyword without a value is absent."""
    for key, (has_shape, shape) in _SHAPES.items():
        if key not in schema or has_shape(schema[key]):
            continue
        if schema[key] is not None and (not is_lenient or key in _MEANT):
            raise invalid_grammar(f"{key} must be {shape}")
        del schema[key]


def _with_safe_bounds(schema: Schema) -> Schema:
    """Replace bounds of numbers by ones that doubles hold, none wider than the originals."""
    for side, sign in (("minimum", 1), ("maximum", -1)):
        exclusive = f"exclusive{side.capitalize()}"
        bounds = {key: schema[key] for key in (side, exclusive) if _is_number(schema.get(key))}
        if all(abs(bound) <= _EXACT for bound in bounds.values()):
            continue
        # With the sign flipped, the largest number allowed is the smallest.
        tightest = max(_inward(sign * bound, is_exclusive=key == exclusive) for key, bound in bounds.items())
        if tightest > _LARGEST_BOUND:
            raise invalid_grammar(f"{side}: no number of at most 64 bits is {'above' if sign > 0 else 'below'} it")
        for key in bounds:
            del schema[key]
        schema[side] = sign * max(int(tightest) if tightest.is_integer() else tightest, -int(_LARGEST_BOUND))
        if tightest > _EXACT:  # the next power of ten may be past 64 bits
            other = "maximum" if sign > 0 else "minimum"
            schema.setdefault(other, sign * int(_LARGEST_BOUND))
    return schema


def _inward(bound: float, *, is_exclusive: bool) -> float:
    """The smallest double that is not below a bound, or is above it if the bound is exclusive."""
    try:
        rounded = float(bound)
    except OverflowError:
        return math.inf if bound > 0 else -_LARGEST_BOUND
    is_outside = rounded <= bound if is_exclusive else rounded < bound
    return math.nextafter(rounded, math.inf) if is_outside else rounded


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_pattern(pattern: str) -> bool:
    """Whether llguidance can follow a regular expression in a schema."""
    grammar = LLMatcher.grammar_from_json_schema(json.dumps({"type": "string", "pattern": pattern}))
    return not LLMatcher.validate_grammar(grammar)
