"""How a model writes calls and thoughts, and what its chat template expects, as found in the template itself."""

from dataclasses import dataclass, field

from deployments.chat.history import HistoryStyle, find_style
from deployments.chat.parsers import THOUGHT_TAGS
from deployments.chat.tool_formats.markup import CallMarkup
from deployments.chat.tool_formats.table import TOOL_FORMATS
from deployments.model_config import ReasoningParserName, ToolParserName
from llm.tokenization.hf_tokenizer import HFTokenizer

_TAIL_TOKENS = 16


@dataclass(frozen=True, slots=True)
class ModelFormat:
    """What to look for in a model's text, and how to show it what it once wrote.

    Attributes:
        tool_parser: how it writes calls; None if not known.
        reasoning_parser: how it marks thoughts; None if it has none.
        is_teaching: its chat template tells it about tools, or the configuration says that it knows them.
        history: how earlier calls are put into the template.
        markup: the text around a call's arguments, if a grammar can bind them.
        warning: what the server's operator should know.
    """

    tool_parser: ToolParserName | None = None
    reasoning_parser: ReasoningParserName | None = None
    is_teaching: bool = False
    history: HistoryStyle = field(default_factory=HistoryStyle)
    markup: CallMarkup | None = None
    warning: str | None = None


def find_format(
    tokenizer: HFTokenizer, tool_parser: ToolParserName, reasoning_parser: ReasoningParserName
) -> ModelFormat:
    """The model's format; where it is set to `auto`, the chat templates decide. Nothing is guessed."""
    templates = tokenizer.template_sources
    is_teaching = tool_parser is not ToolParserName.NONE and tokenizer.templates_read("tools")
    tools: ToolParserName | None = tool_parser if tool_parser in TOOL_FORMATS else None
    warning = None
    if tool_parser is ToolParserName.AUTO:
        tools = next((name for name, each in TOOL_FORMATS.items() if each.is_taught(templates)), None)
        if tools is None and is_teaching:
            warning = (
                "the chat template teaches an unknown form of tool calls, so answers to requests with tools stay text; "
                "if tool_parser can name this form, set it"
            )
    reasoning: ReasoningParserName | None = reasoning_parser
    if reasoning_parser in (ReasoningParserName.NONE, ReasoningParserName.AUTO):
        reasoning = _thoughts(templates, tools) if reasoning_parser is ReasoningParserName.AUTO else None
    history = find_style(tokenizer, tools) if tokenizer.has_chat_template else HistoryStyle()
    markup = TOOL_FORMATS[tools].markup(templates) if tools is not None else None
    return ModelFormat(tools, reasoning, is_teaching or tools is tool_parser, history, markup, warning)


def prompt_reasoning(tokenizer: HFTokenizer, form: ReasoningParserName | None, prompt_ids: list[int]) -> bool | None:
    """Whether a prompt ends within thoughts (True), after them (False), or without any (None)."""
    if form is None or form not in THOUGHT_TAGS:
        return None
    tags = THOUGHT_TAGS[form]
    shown_ids = tokenizer.special_ids({tags.before, tags.behind})
    tail = tokenizer.decode(prompt_ids[-_TAIL_TOKENS:], shown_ids=shown_ids).rstrip()
    return True if tail.endswith(tags.before) else False if tail.endswith(tags.behind) else None


def _thoughts(templates: str, tools: ToolParserName | None) -> ReasoningParserName | None:
    if tools is ToolParserName.HARMONY:
        return ReasoningParserName.HARMONY
    return next((name for name, tags in THOUGHT_TAGS.items() if tags.behind in templates), None)
