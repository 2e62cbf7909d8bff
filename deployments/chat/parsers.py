"""A model's text as what it means: reasoning, content, tool calls. Piece by piece, as the text comes.

What looks like markup but is none is given back as content, so nothing that the model wrote is lost.
"""

from collections.abc import Callable

from deployments.chat.output import OutputEvent, OutputParser, ReasoningDelta, TextDelta, num_held
from deployments.chat.tool_parsers import HermesToolParser, JsonToolParser


class PlainParser:
    """All text is content."""

    def push(self, text: str) -> list[OutputEvent]:
        """See `OutputParser`."""
        return [TextDelta(text)] if text else []

    def finish(self) -> list[OutputEvent]:
        """See `OutputParser`."""
        return []


class ReasoningParser:
    """Reasoning up to `</think>`, what `rest` makes of it behind.

    Args:
        rest: parser of the answer proper.
        is_open: the prompt ends with `<think>`, so the model begins inside.
    """

    _OPEN, _CLOSE = "<think>", "</think>"

    def __init__(self, rest: OutputParser, *, is_open: bool) -> None:
        self._rest = rest
        self._is_open = is_open
        self._is_settled = is_open
        self._is_over = False
        self._has_content = False
        self._held = ""

    def push(self, text: str) -> list[OutputEvent]:
        """See `OutputParser`."""
        if self._is_over:
            return self._content(text)
        self._held += text
        if not self._is_settled:
            start = self._held.lstrip()
            if not start or (self._OPEN.startswith(start) and start != self._OPEN):
                return []
            self._is_settled = True
            if not start.startswith(self._OPEN):
                self._is_over = True
                return self._flush()
            self._held, self._is_open = start[len(self._OPEN) :], True
        end = self._held.find(self._CLOSE)
        if end < 0:
            return self._reasoning(len(self._held) - num_held(self._held, self._CLOSE))
        events = self._reasoning(end)
        self._held = self._held[len(self._CLOSE) :]
        self._is_over = True
        return events + self._flush()

    def finish(self) -> list[OutputEvent]:
        """See `OutputParser`."""
        events = self._reasoning(len(self._held)) if self._is_settled and not self._is_over else self._flush()
        return events + self._rest.finish()

    def _reasoning(self, num_chars: int) -> list[OutputEvent]:
        text, self._held = self._held[:num_chars], self._held[num_chars:]
        if self._is_open:
            text = text.lstrip("\n")
            self._is_open = not text
        return [ReasoningDelta(text)] if text else []

    def _flush(self) -> list[OutputEvent]:
        held, self._held = self._held, ""
        return self._content(held)

    def _content(self, text: str) -> list[OutputEvent]:
        if self._is_settled and not self._has_content:  # the blank lines between the two belong to neither
            text = text.lstrip("\n")
            self._has_content = bool(text)
        return self._rest.push(text) if text else []


_TOOL_PARSERS: dict[str, Callable[[], OutputParser]] = {"hermes": HermesToolParser, "llama3": JsonToolParser}


def make_parser(tool_format: str | None, *, may_reason: bool, is_reasoning: bool) -> OutputParser:
    """A parser for one answer.

    Args:
        tool_format: `hermes` or `llama3`; None where no tool may be called.
        may_reason: the model may begin with `<think>`.
        is_reasoning: the prompt ends with `<think>`.
    """
    parser: OutputParser = PlainParser() if tool_format is None else _TOOL_PARSERS[tool_format]()
    return ReasoningParser(parser, is_open=is_reasoning) if may_reason or is_reasoning else parser
