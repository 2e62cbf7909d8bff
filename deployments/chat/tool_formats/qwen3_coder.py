"""Qwen3-Coder, Qwen3.5 and others: a call in tags, `<tool_call><function=name><parameter=key>value</parameter>…`.

Values are plain text without quotes, with a line break on either side. Source: the chat template of
Qwen/Qwen3-Coder-30B-A3B-Instruct.
"""

from deployments.chat.tool_formats.markup import NAME, CallMarkup
from deployments.chat.tool_formats.source import Reading, Source
from deployments.chat.tool_formats.values import Arguments, Parameters, is_name

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_ENDS = "<parameter=", ("\n</parameter>", "</parameter>")
MARKUPS = (
    CallMarkup(
        "",
        OPEN,
        (f"\n{FUNCTION}{NAME}>\n",),
        f"{FUNCTION_END}\n{CLOSE}",
        argument=(f"{PARAMETER}{NAME}>\n", PARAMETER_ENDS[0] + "\n"),
    ),
)


def read(source: Source, parameters: Parameters) -> Reading[None]:
    """Read a whole answer.

    Args:
        parameters: schemas that give values their types.
    """
    # Some models omit the outer tag.
    while tag := (yield from source.until([OPEN, FUNCTION], source.content)):
        source.mark()
        if tag == OPEN:
            yield from source.skip_space()
        is_function = tag == FUNCTION or (yield from source.passes(FUNCTION))
        if is_function and (yield from _pass_function(source, parameters)):
            yield from source.skip_space()
            yield from source.passes(CLOSE)
        else:
            source.rewind(tag)


def _pass_function(source: Source, parameters: Parameters) -> Reading[bool]:
    """Emit the call, beginning at its name; returns whether it is one."""
    name, tag = yield from source.text_until([">"])
    if not tag or not is_name(name):
        return False
    source.start_call(name)
    arguments = Arguments(source, parameters.get(name, {}))
    yield from source.skip_space()
    while (yield from source.passes(PARAMETER, FUNCTION_END)) == PARAMETER:
        key, tag = yield from source.text_until([">"])
        if not tag:
            return True
        yield from source.passes("\n")
        if not (yield from arguments.pass_value(key, PARAMETER_ENDS)):
            return True
        yield from source.skip_space()
    arguments.close()
    return True
