"""Messages of a chat as they come over the wire, and as chat templates know them."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from deployments.chat.errors import invalid
from deployments.chat.json_size import json_size, too_complex
from deployments.chat.tools import ToolCall
from deployments.chat.wire_model import Items, WireModel

MAX_TOOL_CALLS = 128


def _check_content(value: Any) -> Any:
    """Text of a message: a string, or text parts, which are joined by line breaks."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of text parts")
    texts = []
    for part in value:
        if not isinstance(part, dict):
            raise ValueError("each part must be an object")
        kind = part.get("type")
        if kind != "text":
            raise ValueError(f"this model takes text only, not {kind[:40]!r}" if isinstance(kind, str) else "no type")
        text = part.get("text")
        if not isinstance(text, str) or set(part) - {"type", "text"}:
            raise ValueError("a text part holds type and text, a string, and nothing else")
        texts.append(text)
    if not texts:
        raise ValueError("the list of parts is empty")
    return "\n".join(texts)


class ChatMessage(WireModel):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        str | None, BeforeValidator(_check_content, json_schema_input_type=str | list[dict[str, str]] | None)
    ] = None
    name: Annotated[str, Field(max_length=256)] | None = None
    tool_calls: Annotated[Items[ToolCall], Field(max_length=MAX_TOOL_CALLS)] | None = None
    """Of an assistant: what it called."""
    tool_call_id: str | None = None
    """Of a tool: the call that it answers."""
    reasoning_content: str | None = None
    """Of an assistant: what it thought. What becomes of it is the chat template's affair."""
    refusal: str | None = None
    """Accepted from earlier answers, without effect."""
    annotations: Any = None
    """Accepted from earlier answers, without effect."""
    function_call: Any = None
    """Not supported: use tool_calls."""
    audio: Any = None
    """Not supported."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("function_call", "audio"):
            if getattr(self, name) not in (None, []):
                raise ValueError(f"{name} is not supported by this server")
        if self.role != "assistant" and (self.tool_calls or self.reasoning_content):
            raise ValueError("tool_calls and reasoning_content belong to the assistant")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("a message of a tool, and no other, has a tool_call_id")
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing")
        return self

    def turn(self) -> dict[str, Any]:
        """As chat templates know it."""
        # Templates know the older name of the role only.
        turn: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role,
                                "content": self.content or ""}  # fmt: skip
        for name in ("name", "tool_call_id", "reasoning_content"):
            if getattr(self, name) is not None:
                turn[name] = getattr(self, name)
        if self.tool_calls:
            turn["tool_calls"] = [
                {"id": call.id, "type": "function",
                 "function": {"name": call.function.name, "arguments": json.loads(call.function.arguments or "{}")}}
                for call in self.tool_calls
            ]  # fmt: skip
        return turn


def check_messages(messages: Sequence[ChatMessage]) -> None:
    """Refuse calls whose arguments are no JSON object or hold too much, and answers of tools that nobody called.

    Raises:
        APIError: a 400 with the field at fault.
    """
    called: set[str] = set()
    # Each text is parsed by itself; what they hold together is bounded as what a body holds by itself.
    texts = [call.function.arguments for message in messages for call in message.tool_calls or ()]
    if json_size(*(text.encode(errors="surrogatepass") for text in texts)).is_too_much:
        raise too_complex("messages: the arguments of all tool calls together hold", "messages")
    for i, message in enumerate(messages):
        for j, call in enumerate(message.tool_calls or ()):
            called.add(call.id)
            if not _is_object(call.function.arguments or "{}"):
                param = f"messages[{i}].tool_calls[{j}].function.arguments"
                raise invalid(f"{param}: must be the text of a JSON object", param)
        if message.tool_call_id is not None and message.tool_call_id not in called:
            param = f"messages[{i}].tool_call_id"
            raise invalid(f"{param}: no earlier message calls a tool under this id", param)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
