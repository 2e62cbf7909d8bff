"""Which families of models there are, and how a chat template tells them apart."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from deployments.chat.tool_formats import (
    deepseek,
    glm,
    granite,
    harmony,
    hermes,
    kimi,
    llama_json,
    mistral,
    pythonic,
    qwen3_coder,
)
from deployments.chat.tool_formats.markup import CallMarkup
from deployments.chat.tool_formats.source import Reading, Source
from deployments.chat.tool_formats.values import Parameters
from deployments.model_config import ToolParserName


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a family writes calls.

    Attributes:
        read: reads an answer, given the schemas of the tools' parameters.
        signs: regular expressions, all of which match a chat template that teaches this format.
        tags: what the reader looks for; if a tag is a special token, its text is shown to the reader.
        id_length: see `Source`.
        markups: spellings with which a grammar can bind calls, most specific first; empty if it cannot.
    """

    read: Callable[[Source, Parameters], Reading[None]]
    signs: tuple[str, ...]
    tags: tuple[str, ...]
    id_length: int | None = None
    markups: tuple[CallMarkup, ...] = ()

    def markup(self, template: str) -> CallMarkup | None:
        """The spelling that a chat template teaches."""
        return next((each for each in self.markups if each.sign in template), None)

    def is_taught(self, template: str) -> bool:
        """Whether a chat template teaches this format."""
        return all(re.search(sign, template) for sign in self.signs)


def _plain(read: Callable[[Source], Reading[None]]) -> Callable[[Source, Parameters], Reading[None]]:
    return lambda source, _: read(source)


TOOL_FORMATS: Mapping[ToolParserName, ToolFormat] = {
    ToolParserName.HARMONY: ToolFormat(
        _plain(partial(harmony.read, has_calls=True, has_reasoning=True)),
        (r"<\|channel\|>", r"<\|message\|>", r"<\|call\|>"),
        (harmony.START, harmony.CHANNEL, harmony.CONSTRAIN, harmony.MESSAGE, *harmony.ENDS),
        markups=harmony.MARKUPS,
    ),
    ToolParserName.KIMI: ToolFormat(
        _plain(kimi.read),
        (r"<\|tool_calls_section_begin\|>", r"<\|tool_call_argument_begin\|>"),
        (kimi.OPEN, kimi.CLOSE, kimi.CALL, kimi.ARGUMENTS, kimi.CALL_END),
        markups=kimi.MARKUPS,
    ),
    ToolParserName.DEEPSEEK: ToolFormat(
        _plain(deepseek.read),
        ("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>"),
        (deepseek.OPEN, deepseek.CLOSE, deepseek.CALL, deepseek.CALL_END, deepseek.SEPARATOR),
        markups=deepseek.MARKUPS,
    ),
    ToolParserName.GLM: ToolFormat(
        glm.read,
        ("<tool_call>", "<arg_key>", "<arg_value>"),
        (glm.OPEN, glm.CLOSE, glm.KEY, glm.KEY_END, glm.VALUE, glm.VALUE_END),
        markups=glm.MARKUPS,
    ),
    ToolParserName.QWEN3_CODER: ToolFormat(
        qwen3_coder.read,
        ("<tool_call>", "<function=", "<parameter="),
        (qwen3_coder.OPEN, qwen3_coder.CLOSE),
        markups=qwen3_coder.MARKUPS,
    ),
    ToolParserName.MISTRAL: ToolFormat(
        _plain(mistral.read),
        (r"\[TOOL_CALLS\]",),
        (mistral.OPEN, mistral.CALL_ID, mistral.ARGUMENTS),
        id_length=mistral.ID_LENGTH,
        markups=mistral.MARKUPS,
    ),
    ToolParserName.GRANITE: ToolFormat(
        _plain(granite.read), (r"<\|tool_call\|>",), (granite.OPEN,), markups=granite.MARKUPS
    ),
    ToolParserName.HERMES: ToolFormat(
        _plain(hermes.read),
        (r'<tool_call>(?:\\n|[^<>\w]){0,60}\{\s*\\?"name\\?"',),
        (hermes.OPEN, hermes.CLOSE),
        markups=hermes.MARKUPS,
    ),
    ToolParserName.PYTHONIC: ToolFormat(
        pythonic.read,
        (r"\[\w+\(\w+=\w+",),
        (*pythonic.TAGS, pythonic.END),
    ),
    ToolParserName.LLAMA3: ToolFormat(
        _plain(llama_json.read),
        (r'\{"name": [^{}\'"]{1,60}, "parameters": ',),
        (llama_json.TAG,),
        markups=llama_json.MARKUPS,
    ),
}
"""In the order in which a template is matched against them: more specific formats come first."""
