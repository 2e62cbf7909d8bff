"""gpt-oss: an answer of several messages, each in a channel: thoughts, calls and the answer proper.

`<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>commentary to=functions.name <|constrain|>json
<|message|>{…}<|call|>`, or `<|channel|>final<|message|>…<|return|>`. Commentary without a recipient is meant for the
user. Source: https://cookbook.openai.com/articles/openai-harmony.
"""

import re

from deployments.chat.tool_formats.markup import NAME, CallMarkup
from deployments.chat.tool_formats.source import Reading, Source
from llm.serving.schemas import Preamble

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")

PREAMBLE = Preamble(
    opening=f"{CHANNEL}analysis{MESSAGE}",
    closing=f"{ENDS[0]}{START}assistant",
    lead=f"{CHANNEL}final{MESSAGE}",
    is_optional=True,
)
"""What precedes an answer that a grammar binds."""

MARKUPS = (
    CallMarkup(
        "",
        "",
        (
            f"{CHANNEL}commentary to=functions.{NAME} {CONSTRAIN}json{MESSAGE}",
            f" to=functions.{NAME}{CHANNEL}commentary {CONSTRAIN}json{MESSAGE}",
            f" to=functions.{NAME}{CHANNEL}commentary json{MESSAGE}",
        ),
        lead=PREAMBLE.lead,
        note=(f"{CHANNEL}commentary{MESSAGE}", f"{ENDS[0]}{START}assistant"),
    ),
)

_BEGINNINGS = (START, CHANNEL, " to=", "to=")
_RECIPIENT = re.compile(r"(?:^|\s)to=([^\s<]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")


def read(source: Source, *, has_calls: bool, has_reasoning: bool) -> Reading[None]:
    """Read a whole answer, which continues after `<|start|>assistant`.

    Args:
        has_calls: messages to a function are calls; otherwise they are content.
        has_reasoning: thoughts are reasoning; otherwise they are content.
    """
    source.mark()
    is_message = bool((yield from source.passes(*_BEGINNINGS)))
    source.rewind()
    while is_message:
        source.mark()
        header, tag = yield from source.text_until([MESSAGE])
        if not tag:
            if CHANNEL in header or START in header:
                source.unmark()  # cut off in a header, which shows nothing
            else:
                source.rewind()
            return
        source.unmark()
        recipient, channel = _RECIPIENT.search(header), _CHANNEL.search(header)
        take = source.content
        if recipient is not None and has_calls:
            source.start_call(recipient[1].removeprefix("functions."))
            take = source.arguments
        elif channel is not None and channel[1] == "analysis" and has_reasoning:
            take = source.reasoning
        tag = yield from source.until([*ENDS, START], take, keeps_cut=False)
        is_message = tag == START or bool((yield from source.passes(START)))
