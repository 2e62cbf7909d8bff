"""Llama 3.2 and Llama 4: `[name(key="value", other=2), another()]`, a list of Python calls in place of content.

Only brackets mark this format, so text counts as a call only if it names one of the request's tools. Source:
https://www.llama.com/docs/model-cards-and-prompt-formats/llama4/ and vLLM's
examples/tool_chat_template_llama3.2_pythonic.jinja.
"""

import re
from collections.abc import Collection

from deployments.chat.tool_formats.source import Reading, Source
from deployments.chat.tool_formats.values import from_literal, quoted

TAGS = ("<|python_start|>", "<|python_tag|>")
END = "<|python_end|>"

_KEY = re.compile(r"[^\W\d]\w*")
_NAME_CHARS = "_-."


def read(source: Source, names: Collection[str]) -> Reading[None]:
    """Read a whole answer.

    Args:
        names: names of the tools that may be called.
    """
    source.mark()
    yield from source.skip_space()
    if (yield from source.passes(*TAGS)):
        yield from source.skip_space()
    if not (yield from source.passes("[")):
        source.rewind()
        return
    while (yield from _pass_call(source, names)):
        source.mark()
        if (yield from source.skip_space(" \t\r\n,")) in ("", "]"):
            break
    else:
        source.rewind()
        return
    source.unmark()
    yield from source.passes("]")
    yield from source.skip_space()
    yield from source.passes(END)


def _pass_call(source: Source, names: Collection[str]) -> Reading[bool]:
    """Emit the call here; returns whether there is one. If not, some may be consumed."""
    yield from source.skip_space()
    name = yield from _word(source)
    if name not in names or not (yield from source.passes("(")):
        return False
    separator = "{"
    while (yield from source.skip_space()) not in ("", ")"):
        key = yield from _word(source)
        yield from source.skip_space()
        if not _KEY.fullmatch(key) or not (yield from source.passes("=")):
            break
        if separator == "{":
            source.start_call(name)
        source.arguments(separator + quoted(key) + ": ")
        value = yield from _pass_value(source)
        if value is None:
            return True  # cut off
        source.arguments(from_literal(value))
        separator = ", "
        yield from source.passes(",")
    is_whole = bool((yield from source.passes(")")))
    if separator == "{":
        if not is_whole:
            return False
        source.start_call(name)
        source.arguments("{")
    if is_whole or not source.is_over:
        source.arguments("}")
    return True


def _word(source: Source) -> Reading[str]:
    """A name; empty if there is none."""
    word = ""
    while True:
        char = yield from source.peek()
        if not char or not (char.isalnum() or char in _NAME_CHARS):
            return word
        word += source.skip(1)


def _pass_value(source: Source) -> Reading[str | None]:
    """The text of a Python value, up to the comma or bracket after it; None if it is cut off."""
    scan = _PythonScan()
    parts = ""
    while True:
        rest = source.rest
        end = scan.find_end(rest)
        parts += source.skip(end if end >= 0 else len(rest))
        if end >= 0:
            return parts.strip()
        if source.is_over:
            return None
        yield


class _PythonScan:
    """Finds the end of a Python value that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._quote = ""
        self._is_escaped = False

    def find_end(self, text: str) -> int:
        """The position of the comma or bracket after the value; -1 until it arrives."""
        for place, char in enumerate(text):
            if self._is_escaped:
                self._is_escaped = False
            elif self._quote:
                self._is_escaped = char == "\\"
                self._quote = "" if char == self._quote else self._quote
            elif char in "\"'":
                self._quote = char
            elif char in "([{":
                self._depth += 1
            elif not self._depth and char in ",)":
                return place
            elif char in ")]}":
                self._depth -= 1
        return -1
