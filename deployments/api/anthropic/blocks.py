"""The blocks that make up messages of Anthropic's Messages API, and the chat turns that they stand for.

After https://docs.anthropic.com/en/api/messages. What the model once wrote is never refused, whatever its form.
"""

import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag

from deployments.chat.content import failed, placeholder
from deployments.chat.errors import invalid
from deployments.chat.tools import Written
from deployments.chat.wire_model import Items, NoEffect, WireModel, type_tag

_BILLING = re.compile(r"\Ax-anthropic-billing-header:[^\n]*\n*")
"""A line that some clients put in front of the system prompt. It changes from request to request, so no two prompts
would share a beginning, and the model has no use for it."""


class TextBlock(WireModel):
    """Text."""

    type: Literal["text"]
    text: str = ""
    cache_control: NoEffect = None
    """Ignored: shared parts of prompts are always cached."""
    citations: NoEffect = None


class ToolUseBlock(WireModel):
    """A tool call that the model made."""

    type: Literal["tool_use"]
    id: Written = ""
    name: Written = ""
    input: Any = None
    """An object, if the model made no mistake."""
    cache_control: NoEffect = None
    caller: NoEffect = None

    def call(self) -> dict[str, Any]:
        """The same in the form that chats use."""
        arguments = self.input if isinstance(self.input, str) else json.dumps(self.input or {}, ensure_ascii=False)
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": arguments}}


class ThinkingBlock(WireModel):
    """The model's thoughts."""

    type: Literal["thinking"]
    thinking: str = ""
    signature: NoEffect = None


def _block_tag(value: Any) -> str:
    tag = type_tag(value)
    return tag if tag in ("[text]", "[tool_use]", "[tool_result]", "[thinking]") else "[other]"


def _result_tag(value: Any) -> str:
    return "[text]" if type_tag(value) == "[text]" else "[other]"


OtherBlock = dict[str, Any]
"""A block of another type, such as an image."""


class ToolResultBlock(WireModel):
    """The result of a tool call."""

    type: Literal["tool_result"]
    tool_use_id: Written = ""
    content: (
        str
        | Items[
            Annotated[
                Annotated[TextBlock, Tag("[text]")] | Annotated[OtherBlock, Tag("[other]")],
                Discriminator(_result_tag),
            ]
        ]
        | None
    ) = None
    is_error: bool | None = None
    """Told to the model in words."""
    cache_control: NoEffect = None

    def turn(self) -> dict[str, Any]:
        """The same in the form that chats use, with a placeholder for parts without text."""
        content = self.content or ""
        if not isinstance(content, str):
            content = "\n".join(map(_told, content))
        return {
            "role": "tool",
            "tool_call_id": self.tool_use_id,
            "content": failed(content) if self.is_error else content,
        }


Block = Annotated[
    Annotated[TextBlock, Tag("[text]")]
    | Annotated[ToolUseBlock, Tag("[tool_use]")]
    | Annotated[ToolResultBlock, Tag("[tool_result]")]
    | Annotated[ThinkingBlock, Tag("[thinking]")]
    | Annotated[OtherBlock, Tag("[other]")],
    Discriminator(_block_tag),
]


def check_block(block: Block, role: str, param: str) -> None:
    """Refuse user content that cannot be passed to the model, and blocks in messages of the wrong role.

    Raises:
        APIError: a 400 that names the block.
    """
    if role != "user" and isinstance(block, ToolResultBlock):
        raise invalid(f"{param}: a tool_result belongs to the user", param)
    if role != "assistant" and isinstance(block, (ToolUseBlock, ThinkingBlock)):
        raise invalid(f"{param}: {block.type} belongs to the assistant", param)
    if role != "assistant" and isinstance(block, dict) and _text_in(block) is None:
        kind = block.get("type")
        what = f"this model takes text only, not {kind[:40]!r}" if isinstance(kind, str) else "the block has no type"
        raise invalid(f"{param}: {what}", param)


def assistant_turn(blocks: Sequence[Block]) -> dict[str, Any]:
    """The assistant's turn. Blocks of unknown types are left out."""
    turn: dict[str, Any] = {"role": "assistant"}
    for block in blocks:
        match block:
            case TextBlock():
                turn["content"] = turn.get("content", "") + block.text
            case ThinkingBlock():
                turn["reasoning_content"] = turn.get("reasoning_content", "") + block.thinking
            case ToolUseBlock():
                turn.setdefault("tool_calls", []).append(block.call())
    return turn


def user_turns(blocks: Sequence[Block]) -> list[dict[str, Any]]:
    """Tool results, each as its own turn, then the text."""
    turns = [block.turn() for block in blocks if isinstance(block, ToolResultBlock)]
    texts = [_told(block) for block in blocks if not isinstance(block, ToolResultBlock)]
    return [*turns, {"role": "user", "content": "\n".join(texts)}] if texts or not turns else turns


def system_text(content: str | Sequence[Block] | None) -> str:
    """The text of a system prompt, without the line that some clients add for billing."""
    if content is None or isinstance(content, str):
        return _BILLING.sub("", content or "")
    texts = [_BILLING.sub("", _told(block)) for block in content]
    return "\n".join(filter(None, texts))


def _told(block: Block) -> str:
    """What the model is shown for a block: its text, or a placeholder."""
    if isinstance(block, TextBlock):
        return block.text
    assert isinstance(block, dict), "checked"
    text = _text_in(block)
    return placeholder(str(block.get("type"))) if text is None else text


def _text_in(block: OtherBlock) -> str | None:
    """The text of a document or of a search result, or the name of a found tool, if it has one."""
    source = block.get("source")
    if block.get("type") == "document" and isinstance(source, dict):
        found = source.get("data") if source.get("type") == "text" else source.get("content")
    elif block.get("type") == "search_result":
        found = block.get("content")
    elif block.get("type") == "tool_reference":
        found = block.get("tool_name")
    else:
        return None
    parts = found if isinstance(found, list) else [found]
    texts = [block.get("title"), *(part.get("text") if isinstance(part, dict) else part for part in parts)]
    if not all(isinstance(text, str) for text in texts[1:]):
        return None
    return "\n".join(text for text in texts if isinstance(text, str))
