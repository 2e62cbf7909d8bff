"""Hermes, Qwen2.5 and Qwen3, Granite 4: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`.

Source: https://github.com/NousResearch/Hermes-Function-Calling and the chat templates of Qwen/Qwen2.5-7B-Instruct and
ibm-granite/granite-4.0-h-small.
"""

from deployments.chat.tool_formats.json_text import pass_call
from deployments.chat.tool_formats.markup import NAME, CallMarkup
from deployments.chat.tool_formats.source import Reading, Source

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MARKUPS = (CallMarkup("", OPEN, (f'\n{{"name": "{NAME}", "arguments": ',), "}\n" + CLOSE),)


def read(source: Source) -> Reading[None]:
    """Read a whole answer."""
    while (yield from source.until([OPEN], source.content)):
        source.mark()
        is_call = (yield from source.skip_space()) == "{" and (yield from pass_call(source, is_marked=True))
        if not is_call:
            source.rewind(OPEN)
            continue
        yield from source.skip_space()
        yield from source.passes(CLOSE)
