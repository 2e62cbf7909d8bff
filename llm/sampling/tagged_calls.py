"""Free text in which a tag begins tool calls: a model may call, and if it does, its calls must follow the schemas.

The text ends at the first occurrence of the tag, as in llguidance's structural tags (see docs/syntax.md of
https://github.com/guidance-ai/llguidance).
"""

import json
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from llm.config import StrictModel
from llm.sampling.json_schema import Schema, prepare, relocated, resolve

KEY = "\0"
"""Stands for the name of an argument."""

Pieces = Callable[[str], list[str]]
"""Lark for a text that may hold control tokens, piece by piece. Not for clients' texts, which hold none."""


class TaggedCall(StrictModel):
    """A call to one tool."""

    begins: Annotated[tuple[str, ...], Field(min_length=1)]
    """Texts of which any one precedes the arguments."""
    parameters: dict[str, Any]
    """JSON schema of the arguments."""
    is_strict: bool
    """Whether keywords that cannot be followed are refused."""
    end: str = ""
    """Text that follows the arguments."""


class TaggedCalls(StrictModel):
    """The format of calls. Every text may hold special tokens, written as their names."""

    tag: str
    """Text that begins calls; empty if calls replace all text."""
    open: str = ""
    """Text between the tag and the first call."""
    calls: Annotated[tuple[TaggedCall, ...], Field(min_length=1)]
    separator: str | None = None
    """Text between two calls after one tag; None if only one call is allowed."""
    close: str = ""
    """Text that follows the last call."""
    is_single: bool = False
    """Whether at most one call is allowed."""
    argument: tuple[str, str] | None = None
    """Texts around each argument that is written separately, with strings unquoted; `KEY` stands for its name. None if
    all arguments are one JSON object."""
    lead: str | None = None
    """Text that precedes an answer without calls; None if text that does not begin with a brace is one."""
    note: tuple[str, str] | None = None
    """Texts around text that precedes calls."""


class RuleWriter:
    """Writes the grammar in Lark.

    Args:
        form: the format of calls.
        pieces: Lark for a text.
        escape: makes a regular expression that matches only a given text.
        refer: makes a grammar of a schema, strict or not, and returns its name.
    """

    def __init__(
        self,
        form: TaggedCalls,
        pieces: Pieces,
        escape: Callable[[str], str],
        refer: Callable[[Schema, bool], str],
    ) -> None:
        self._form = form
        self._pieces = pieces
        self._escape = escape
        self._refer = refer

    def lark(self) -> str:
        """Write all rules."""
        form, pieces = self._form, self._pieces
        call = " | ".join(map(self._call, form.calls))
        others = [] if form.separator is None or form.is_single else [f"({_joined(pieces(form.separator), 'call')})*"]
        calls = _joined(pieces(form.open), "call", others, pieces(form.close))
        rules = [f"calls: {calls}", f"call: {call}"]
        if form.argument is not None:
            rules.append(self._text_up_to("value", form.argument[1]))
        if form.tag:
            rules.append(self._text_up_to("tagged", form.tag))
            # A second tag can follow text only if a second call is allowed.
            start, text = "tagged calls | TEXT" if form.is_single else "(tagged calls)* TEXT", "(?s:.*)"
        elif form.lead is not None:
            before, behind = form.note or ("", "")
            note = _joined(pieces(before), "TEXT", pieces(behind))
            start, text = f"({note})? calls | {_joined(pieces(form.lead), 'TEXT')}", "(?s:.*)"
        else:
            start, text = 'calls | TEXT | ""', r"[^{\s](?s:.*)"
        return "\n".join([f"start: {start}", *rules, f"TEXT: /{text}/"])

    def _text_up_to(self, name: str, tag: str) -> str:
        """A rule for the shortest text that ends with a tag, regardless of token boundaries."""
        first, *others = self._pieces(tag)
        if first.startswith("<"):
            return f"{name}: {_joined('ANY', first, others)}\nANY: /(?s:.*)/"
        text = f"{name}_text[lazy]: /(?s:.*){self._escape(json.loads(first))}/"
        return f"{name}: {_joined(f'{name}_text', others)}\n{text}"

    def _call(self, call: TaggedCall) -> str:
        begin = " | ".join(_joined(self._pieces(text)) for text in call.begins)
        arguments = self._refer(call.parameters, call.is_strict) if self._form.argument is None else self._fields(call)
        return _joined(f"({begin})", arguments, self._pieces(call.end))

    def _fields(self, call: TaggedCall) -> str:
        """Arguments one by one, in the schema's order. For a text, only the schema's choices are enforced."""
        assert self._form.argument is not None, "the form has them"
        before, behind = self._form.argument
        root = prepare(call.parameters, is_lenient=not call.is_strict)
        properties = {name: each for name, each in root.get("properties", {}).items() if each is not False}
        required = [name for name in root.get("required", ()) if name not in properties]
        parts = []
        for name, schema in [*properties.items(), *((name, True) for name in required)]:
            value = self._value(schema, root, call.is_strict)
            in_front, _, behind_key = before.partition(KEY)
            key = [*self._pieces(in_front), json.dumps(name), *self._pieces(behind_key)]
            field = _joined(key, value or "value")
            if value is not None:
                field = _joined(field, self._pieces(behind))
            parts.append(field if name in root.get("required", ()) else f"({field})?")
        return _joined(*parts) or '""'

    def _value(self, schema: object, root: Schema, is_strict: bool) -> str | None:
        """Lark for a value; None for any text."""
        target = schema
        for _ in range(_MAX_REFERENCES):
            if not isinstance(target, dict) or "$ref" not in target:
                break
            target = resolve(root, target["$ref"])
        if not isinstance(target, dict):
            return None
        choices = target.get("enum", [target["const"]] if "const" in target else None)
        if isinstance(choices, list) and choices and all(isinstance(choice, str) for choice in choices):
            return f"({' | '.join(map(json.dumps, choices))})"
        kinds = target.get("type")
        if kinds is None or "string" in ([kinds] if isinstance(kinds, str) else kinds):
            return None
        leaf = {"root": relocated(root, "#/$defs/root"), "leaf": relocated(target, "#/$defs/root")}
        return self._refer({"$ref": "#/$defs/leaf", "$defs": leaf}, is_strict)


_MAX_REFERENCES = 8


def _joined(*parts: str | list[str]) -> str:
    """Lark for one thing after another."""
    return " ".join(piece for part in parts for piece in ([part] if isinstance(part, str) else part) if piece)
