"""Separates a model's text into reasoning, content and tool calls, piece by piece as the text arrives.

Text that looks like markup but is not is returned as content, so nothing that the model wrote is lost.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from deployments.chat.output import OutputEvent, OutputParser, TextDelta
from deployments.chat.tool_formats import harmony, kimi, llama_json
from deployments.chat.tool_formats.source import Reading, Source, SourceParser
from deployments.chat.tool_formats.table import TOOL_FORMATS
from deployments.model_config import ReasoningParserName, ToolParserName
from llm.serving.schemas import Preamble


@dataclass(frozen=True, slots=True)
class ThoughtTags:
    """What a model puts around its thoughts.

    Attributes:
        before, behind: the opening and closing tags.
        interrupts: text that also ends thoughts, and belongs to what follows.
    """

    before: str
    behind: str
    interrupts: tuple[str, ...] = ()


THOUGHT_TAGS: Mapping[ReasoningParserName, ThoughtTags] = {
    # Kimi K2 Thinking calls tools from within its thoughts without closing them.
    ReasoningParserName.THINK: ThoughtTags("<think>", "</think>", (kimi.OPEN,)),
    ReasoningParserName.MISTRAL: ThoughtTags("[THINK]", "[/THINK]"),
}
"""Tags of Qwen3, DeepSeek, GLM and Kimi, and of Mistral's reasoning models, as in their chat templates."""


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """How to read an answer.

    Attributes:
        tool_parser: how calls are written; None if there can be none.
        is_forced: the answer consists of calls as bare JSON, whatever the model's own form is.
        reasoning_parser: how thoughts are marked; None if there can be none.
        is_reasoning: whether the prompt ends within thoughts (True), after them (False) or without any (None).
        parameters: JSON schemas of the tools' parameters, by the tools' names.
    """

    tool_parser: ToolParserName | None = None
    is_forced: bool = False
    reasoning_parser: ReasoningParserName | None = None
    is_reasoning: bool | None = None
    parameters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def tags(self) -> frozenset[str]:
        """What the parser looks for. If a tag is a special token, it must reach the parser as text."""
        tags: set[str] = set()
        if self.tool_parser is not None and not self.is_forced:
            tags |= {*TOOL_FORMATS[self.tool_parser].tags}
        if self.reasoning_parser is ReasoningParserName.HARMONY or self.tool_parser is ToolParserName.HARMONY:
            tags |= {*TOOL_FORMATS[ToolParserName.HARMONY].tags}
        elif self.reasoning_parser is not None:
            thoughts = THOUGHT_TAGS[self.reasoning_parser]
            tags |= {thoughts.before, thoughts.behind}
        return frozenset(tags)


class PlainParser:
    """All text is content."""

    def push(self, text: str) -> list[OutputEvent]:
        """See `OutputParser`."""
        return [TextDelta(text)] if text else []

    def finish(self) -> list[OutputEvent]:
        """See `OutputParser`."""
        return []


class ChainedParser:
    """Passes the content that one parser finds to another.

    Args:
        first: takes the text.
        second: takes the first one's content.
    """

    def __init__(self, first: OutputParser, second: OutputParser) -> None:
        self._first = first
        self._second = second

    def push(self, text: str) -> list[OutputEvent]:
        """See `OutputParser`."""
        return self._passed_on(self._first.push(text))

    def finish(self) -> list[OutputEvent]:
        """See `OutputParser`."""
        return self._passed_on(self._first.finish()) + self._second.finish()

    def _passed_on(self, events: Sequence[OutputEvent]) -> list[OutputEvent]:
        passed: list[OutputEvent] = []
        for event in events:
            passed += self._second.push(event.text) if isinstance(event, TextDelta) else [event]
        return passed


class CallsOnlyParser:
    """Drops content. For answers that consist only of calls, which a limit may cut before the first has a name.

    Args:
        calls: finds them.
    """

    def __init__(self, calls: OutputParser) -> None:
        self._calls = calls

    def push(self, text: str) -> list[OutputEvent]:
        """See `OutputParser`."""
        return [event for event in self._calls.push(text) if not isinstance(event, TextDelta)]

    def finish(self) -> list[OutputEvent]:
        """See `OutputParser`."""
        return [event for event in self._calls.finish() if not isinstance(event, TextDelta)]


def make_parser(form: AnswerForm) -> OutputParser:
    """A parser for one answer."""
    thoughts = _thoughts_parser(form)
    if form.tool_parser is None or (form.tool_parser is ToolParserName.HARMONY and not form.is_forced):
        return thoughts or PlainParser()
    tool_format = TOOL_FORMATS[form.tool_parser]
    source = Source(tool_format.id_length)
    calls: OutputParser
    if form.is_forced:
        calls = CallsOnlyParser(SourceParser(source, llama_json.read))
    else:
        calls = SourceParser(source, partial(_read_calls, form=form))
    return calls if thoughts is None else ChainedParser(thoughts, calls)


def preamble_of(form: AnswerForm, *, may_call: bool) -> Preamble | None:
    """What an answer may begin with before a grammar binds it; None if nothing.

    Args:
        may_call: the grammar itself distinguishes an answer from calls.
    """
    if form.reasoning_parser is ReasoningParserName.HARMONY:
        return harmony.PREAMBLE.model_copy(update={"lead": ""}) if may_call else harmony.PREAMBLE
    if form.reasoning_parser is None or form.is_reasoning is False:
        return None
    tags = THOUGHT_TAGS[form.reasoning_parser]
    if form.is_reasoning:
        return Preamble(closing=tags.behind)
    return Preamble(opening=tags.before, closing=tags.behind, is_optional=True)


def _read_calls(source: Source, form: AnswerForm) -> Reading[None]:
    assert form.tool_parser is not None, "asked for"
    return TOOL_FORMATS[form.tool_parser].read(source, form.parameters)


def _thoughts_parser(form: AnswerForm) -> OutputParser | None:
    """The parser that separates thoughts from the rest, and in gpt-oss's format calls as well."""
    is_harmony = form.tool_parser is ToolParserName.HARMONY
    if is_harmony or form.reasoning_parser is ReasoningParserName.HARMONY:
        has_reasoning = form.reasoning_parser is ReasoningParserName.HARMONY
        has_calls = is_harmony and not form.is_forced
        return SourceParser(Source(), partial(harmony.read, has_calls=has_calls, has_reasoning=has_reasoning))
    if form.reasoning_parser is None:
        return None
    tags = THOUGHT_TAGS[form.reasoning_parser]
    return SourceParser(Source(), partial(_read_thoughts, tags=tags, is_open=form.is_reasoning is True))


def _read_thoughts(source: Source, tags: ThoughtTags, is_open: bool) -> Reading[None]:
    """Read an answer that begins with thoughts, or may."""
    if not is_open:
        source.mark()
        yield from source.skip_space()
        if not (yield from source.passes(tags.before)):
            source.rewind()
            return
        source.unmark()
    # The blank lines between thoughts and answer belong to neither.
    yield from source.skip_space("\n")
    tag = yield from source.until([tags.behind, *tags.interrupts], source.reasoning)
    if tag in tags.interrupts:
        source.back(len(tag))
    yield from source.skip_space("\n")
