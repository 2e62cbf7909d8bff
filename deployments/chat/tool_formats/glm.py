"""GLM-4.5 to 4.7: `<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value>…</tool_call>`.

Text values are plain; everything else is JSON. Source: the chat templates of zai-org/GLM-4.6 and zai-org/GLM-4.7-Flash.
"""

from deployments.chat.tool_formats.markup import NAME, CallMarkup
from deployments.chat.tool_formats.source import Reading, Source
from deployments.chat.tool_formats.values import Arguments, Parameters, is_name

OPEN, CLOSE = "<tool_call>", "</tool_call>"
KEY, KEY_END = "<arg_key>", "</arg_key>"
VALUE, VALUE_END = "<arg_value>", "</arg_value>"
MARKUPS = (
    CallMarkup(KEY_END + VALUE, OPEN, (NAME,), CLOSE, argument=(KEY + NAME + KEY_END + VALUE, VALUE_END)),
    CallMarkup("", OPEN, (f"{NAME}\n",), CLOSE, argument=(f"{KEY}{NAME}{KEY_END}\n{VALUE}", f"{VALUE_END}\n")),
)


def read(source: Source, parameters: Parameters) -> Reading[None]:
    """Read a whole answer.

    Args:
        parameters: schemas that give values their types.
    """
    while (yield from source.until([OPEN], source.content)):
        source.mark()
        if not (yield from _pass_call(source, parameters)):
            source.rewind(OPEN)


def _pass_call(source: Source, parameters: Parameters) -> Reading[bool]:
    """Emit the call after its opening tag; returns whether it is one."""
    yield from source.skip_space()
    name, tag = yield from source.text_until(["\n", KEY, CLOSE])
    name = name.strip()
    if not tag or not is_name(name):
        return False
    source.start_call(name)
    arguments = Arguments(source, parameters.get(name, {}))
    while tag != CLOSE:
        if tag != KEY:
            yield from source.skip_space()
            tag = yield from source.passes(KEY, CLOSE)
            if tag != KEY:
                break
        key, tag = yield from source.text_until([KEY_END])
        yield from source.skip_space()
        if not tag or not (yield from source.passes(VALUE)):
            return True
        tag = yield from arguments.pass_value(key.strip(), [VALUE_END])
        if not tag:
            return True
    arguments.close()
    return True
