"""DeepSeek: calls between special tokens. V3 and R1 put the arguments in a fenced block, V3.1 does not.

V3: `<｜tool▁call▁begin｜>function<｜tool▁sep｜>name`, then a block ```` ```json ```` and `<｜tool▁call▁end｜>`.
V3.1: `<｜tool▁call▁begin｜>name<｜tool▁sep｜>{…}<｜tool▁call▁end｜>`. All calls of an answer are between
`<｜tool▁calls▁begin｜>` and `<｜tool▁calls▁end｜>`. Source: the chat templates of deepseek-ai/DeepSeek-V3.1 and of
deepseek-ai/DeepSeek-R1-Distill-Qwen-32B, and vLLM's examples/tool_chat_template_deepseekv3.jinja.
"""

from deployments.chat.tool_formats.json_text import pass_arguments
from deployments.chat.tool_formats.markup import NAME, CallMarkup
from deployments.chat.tool_formats.source import Reading, Source
from deployments.chat.tool_formats.values import is_name

OPEN, CLOSE = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, CALL_END, SEPARATOR = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
FENCE = "```"
MARKUPS = (
    CallMarkup(
        FENCE,
        OPEN,
        (f"{CALL}function{SEPARATOR}{NAME}\n{FENCE}json\n",),
        f"\n{FENCE}{CALL_END}",
        separator="\n",
        close=CLOSE,
    ),
    CallMarkup("", OPEN, (CALL + NAME + SEPARATOR,), CALL_END, separator="", close=CLOSE),
)


def read(source: Source) -> Reading[None]:
    """Read a whole answer."""
    while tag := (yield from source.until([OPEN, CALL], source.content)):
        source.mark()
        if tag == OPEN:
            yield from source.skip_space()
        if (tag == CALL or (yield from source.passes(CALL))) and (yield from _pass_calls(source)):
            continue
        source.rewind(tag)


def _pass_calls(source: Source) -> Reading[bool]:
    """Emit the calls after the first call's opening token; returns whether there is one."""
    if not (yield from _pass_call(source)):
        return False
    while True:
        yield from source.skip_space()
        tag = yield from source.passes(CALL, CLOSE)
        if tag != CALL:
            return True
        source.mark()
        if not (yield from _pass_call(source)):
            source.rewind()
            return True


def _pass_call(source: Source) -> Reading[bool]:
    """Emit the call after its opening token; returns whether it is one."""
    name, tag = yield from source.text_until([SEPARATOR])
    if not tag:
        return False
    if (yield from source.skip_space()) != "{":
        name, tag = yield from source.text_until(["\n"])
        yield from source.skip_space()
        if (yield from source.passes(FENCE)):
            yield from source.text_until(["\n"])
        if (yield from source.skip_space()) != "{":
            return False
    if not is_name(name.strip()):
        return False
    source.start_call(name.strip())
    yield from pass_arguments(source)
    yield from source.skip_space()
    if (yield from source.passes(FENCE)):
        yield from source.skip_space()
    yield from source.passes(CALL_END)
    return True
