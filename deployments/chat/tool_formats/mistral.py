"""Mistral: `[TOOL_CALLS][{"name": …, "arguments": {…}}]`, later `[TOOL_CALLS]name[ARGS]{…}` once for each call.

Between the two there was `[TOOL_CALLS]name[CALL_ID]id[ARGS]{…}`. Ids of calls are nine letters or digits; the chat
templates refuse all others. Source: https://github.com/mistralai/mistral-common (its tokenizers v3, v7, v11 and v13)
and the chat templates of mistralai/Mistral-Nemo-Instruct-2407 and mistralai/Mistral-Small-3.2-24B-Instruct-2506.
"""

import re

from deployments.chat.tool_formats.json_text import pass_arguments, pass_calls
from deployments.chat.tool_formats.markup import NAME, CallMarkup
from deployments.chat.tool_formats.source import Reading, Source
from deployments.chat.tool_formats.values import is_name

OPEN, CALL_ID, ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
ID_LENGTH = 9
MARKUPS = (
    CallMarkup(ARGUMENTS, OPEN, (NAME + ARGUMENTS,)),
    CallMarkup("", OPEN, (f'{{"name": "{NAME}", "arguments": ',), "}", open="[", separator=", ", close="]"),
)

_ID = re.compile(r"[a-zA-Z0-9]{9}")


def read(source: Source) -> Reading[None]:
    """Read a whole answer."""
    while (yield from source.until([OPEN], source.content)):
        source.mark()
        char = yield from source.skip_space()
        is_call = yield from (pass_calls(source) if char and char in "[{" else _pass_named(source))
        if not is_call:
            source.rewind(OPEN)


def _pass_named(source: Source) -> Reading[bool]:
    """Emit a call whose name comes before its arguments; returns whether it is one."""
    name = ""
    while (char := (yield from source.peek())) and char not in "[{" and len(name) <= 256:
        name += source.skip(1)
    call_id = ""
    if (yield from source.passes(CALL_ID)):
        call_id, tag = yield from source.text_until([ARGUMENTS])
        if not tag:
            return False
    else:
        yield from source.passes(ARGUMENTS)
    if not is_name(name.strip()) or (yield from source.skip_space()) != "{":
        return False
    source.start_call(name.strip(), call_id if _ID.fullmatch(call_id) else None)
    yield from pass_arguments(source)
    return True
