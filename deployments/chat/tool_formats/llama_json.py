"""Llama 3: `{"name": …, "parameters": {…}}` in place of content: a single call, one after another, or a list.

Every model writes forced calls like this. Source: the chat template of
meta-llama/Llama-3.1-8B-Instruct and https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1/.
"""

from deployments.chat.tool_formats.json_text import pass_call
from deployments.chat.tool_formats.markup import NAME, CallMarkup
from deployments.chat.tool_formats.source import Reading, Source

TAG = "<|python_tag|>"
MARKUPS = (CallMarkup("", "", (f'{{"name": "{NAME}", "parameters": ',), "}", separator="; "),)


def read(source: Source) -> Reading[None]:
    """Read a whole answer."""
    source.mark()
    yield from source.skip_space()
    if (yield from source.passes(TAG)):
        yield from source.skip_space()
    if (yield from source.passes("[")):
        yield from source.skip_space()
    while (yield from source.peek()) == "{" and (yield from pass_call(source, is_marked=False)):
        source.mark()
        if not (yield from source.skip_space(" \t\r\n;,]")):
            source.unmark()
            return
    source.rewind()
