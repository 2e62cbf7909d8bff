"""Kimi K2: `<|tool_call_begin|>functions.name:0<|tool_call_argument_begin|>{…}<|tool_call_end|>`.

All calls of an answer are between `<|tool_calls_section_begin|>` and `<|tool_calls_section_end|>`. What the model
writes before the arguments is the call's id, which its template expects back. Source: the chat template of
moonshotai/Kimi-K2-Instruct and the tool call guidance in that repository.
"""

from deployments.chat.tool_formats.json_text import pass_arguments
from deployments.chat.tool_formats.markup import NAME, CallMarkup
from deployments.chat.tool_formats.source import Reading, Source
from deployments.chat.tool_formats.values import is_name

OPEN, CLOSE = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL, ARGUMENTS, CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
MARKUPS = (
    CallMarkup(
        "",
        OPEN,
        tuple(f"{CALL}functions.{NAME}:{i}{ARGUMENTS}" for i in range(100)),
        CALL_END,
        separator="",
        close=CLOSE,
    ),
)


def read(source: Source) -> Reading[None]:
    """Read a whole answer."""
    while (yield from source.until([OPEN], source.content)):
        source.mark()
        num_before = source.num_calls
        while (yield from _pass_call(source)):
            source.mark()
        if source.num_calls == num_before:
            source.rewind(OPEN)
            continue
        source.rewind()
        yield from source.skip_space()
        yield from source.passes(CLOSE)


def _pass_call(source: Source) -> Reading[bool]:
    """Emit the call here; returns whether there is one. If not, some may be consumed."""
    yield from source.skip_space()
    if not (yield from source.passes(CALL)):
        return False
    call_id, tag = yield from source.text_until([ARGUMENTS])
    call_id = call_id.strip()
    name = call_id.removeprefix("functions.").partition(":")[0]
    if not tag or not is_name(name) or (yield from source.skip_space()) != "{":
        return False
    source.start_call(name, call_id if ":" in call_id else None)
    yield from pass_arguments(source)
    yield from source.skip_space()
    yield from source.passes(CALL_END)
    return True
