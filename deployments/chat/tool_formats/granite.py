"""Granite 3: `<|tool_call|>[{"name": …, "arguments": {…}}]`.

Source: the chat template of ibm-granite/granite-3.3-2b-instruct. Granite 4 writes calls as Hermes does.
"""

from deployments.chat.tool_formats.json_text import pass_calls
from deployments.chat.tool_formats.markup import NAME, CallMarkup
from deployments.chat.tool_formats.source import Reading, Source

OPEN = "<|tool_call|>"
MARKUPS = (CallMarkup("", OPEN, (f'{{"name": "{NAME}", "arguments": ',), "}", open="[", separator=", ", close="]"),)


def read(source: Source) -> Reading[None]:
    """Read a whole answer."""
    while (yield from source.until([OPEN], source.content)):
        source.mark()
        yield from source.skip_space()
        if not (yield from pass_calls(source)):
            source.rewind(OPEN)
