"""Free text in which a tag begins calls of tools, which are bound: a model may call, and if it does, by the schemas.

The text is ended by the first place where the tag stands, as in llguidance's structural tags, see docs/syntax.md of
https://github.com/guidance-ai/llguidance.
"""

import json
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from llm.config import StrictModel


class TaggedCall(StrictModel):
    """A call of one tool."""

    begins: Annotated[tuple[str, ...], Field(min_length=1)]
    """What stands in front of the arguments, any of these."""
    parameters: dict[str, Any]
    """JSON schema of the arguments."""
    is_strict: bool
    """Keywords that cannot be followed are refused."""
    end: str = ""
    """What stands behind the arguments."""


class TaggedCalls(StrictModel):
    """What calls look like. Every text may hold special tokens, written as their names."""

    tag: str
    """What begins calls; empty where they stand in place of all text and begin with a brace."""
    open: str = ""
    """What stands between the tag and the first call."""
    calls: Annotated[tuple[TaggedCall, ...], Field(min_length=1)]
    separator: str | None = None
    """What stands between two calls behind one tag; None where there is one call only."""
    close: str = ""
    """What stands behind the last call."""
    is_single: bool = False
    """At most one call."""


Pieces = Callable[[str], list[str]]
"""Lark for a text that may hold special tokens."""


def write_rules(
    form: TaggedCalls, pieces: Pieces, args: Callable[[TaggedCall], str], tag_regex: Callable[[str], str]
) -> str:
    """The grammar in Lark.

    Args:
        pieces: Lark for a text, piece by piece.
        args: names the grammar of a call's arguments.
        tag_regex: a regular expression that matches a text alone.
    """
    alternatives = []
    for call in form.calls:
        begin = " | ".join(" ".join(pieces(text)) for text in call.begins)
        alternatives.append(" ".join([f"({begin})", args(call), *pieces(call.end)]))
    repeated = f"({' '.join([*pieces(form.separator), 'call'])})*" if form.separator is not None else ""
    calls = " ".join([*pieces(form.open), "call", "" if form.is_single else repeated, *pieces(form.close)])
    rules = [f"calls: {calls}", f"call: {' | '.join(alternatives)}"]
    if not form.tag:
        return "\n".join([r'start: calls | TEXT | ""', *rules, r"TEXT: /[^{\s](?s:.*)/"])
    tag = pieces(form.tag)
    if tag[0].startswith("<"):
        tagged = f"TEXT {' '.join(tag)} calls"
    else:
        tagged = " ".join(["text", *tag[1:], "calls"])
        rules.append(f"text[lazy]: /(?s:.*){tag_regex(json.loads(tag[0]))}/")
    start = f"{tagged} | TEXT" if form.is_single else f"({tagged})* TEXT"
    return "\n".join([f"start: {start}", *rules, "TEXT: /(?s:.*)/"])
