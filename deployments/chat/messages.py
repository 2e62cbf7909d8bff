"""Messages of a chat as sent over the wire, and in the form that chat templates expect.

What the user says is checked. What a model once wrote and the client repeats is never refused, whatever its form.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from deployments.chat.content import WRITTEN_BY_MODELS, text_of
from deployments.chat.errors import invalid
from deployments.chat.json_size import json_size, too_complex
from deployments.chat.tools import FunctionCall, ToolCall, Written
from deployments.chat.wire_model import Items, NoEffect, Unsupported, WireModel

MAX_TOOL_CALLS = 4096
"""Most calls in one message."""


def _text_or_nothing(value: Any) -> Any:
    return value if isinstance(value, str) else None


Thoughts = Annotated[str | None, BeforeValidator(_text_or_nothing, json_schema_input_type=Any)]


class ChatMessage(WireModel):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[
        str | None, BeforeValidator(text_of, json_schema_input_type=str | list[dict[str, Any]] | None)
    ] = None
    name: str | None = None
    tool_calls: Annotated[Items[ToolCall], Field(max_length=MAX_TOOL_CALLS)] | None = None
    """For an assistant: its tool calls."""
    tool_call_id: Written | None = None
    """For a tool: the call that it answers."""
    reasoning_content: Thoughts = None
    """For an assistant: its thoughts. The chat template decides what to do with them."""
    reasoning: Thoughts = None
    """Another name of `reasoning_content`."""
    function_call: FunctionCall | None = None
    """For an assistant: an older form of `tool_calls`, answered by a message with the role `function`."""
    prefix: bool | None = None
    """For the last message, if it is the assistant's: as `continue_final_message`, in the words of other servers."""
    refusal: NoEffect = None
    annotations: NoEffect = None
    audio: Annotated[Any, Unsupported()] = None
    """Not supported."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.role != "assistant" and (self.tool_calls or self.function_call or self.thoughts):
            raise ValueError("tool_calls and reasoning_content belong to the assistant")
        if self.role != "tool" and self.tool_call_id:
            raise ValueError("a message of a tool, and no other, has a tool_call_id")
        if self.content is None and self.role not in WRITTEN_BY_MODELS:
            raise ValueError("content is missing")
        return self

    @property
    def thoughts(self) -> str | None:
        """An assistant's thoughts, under either name."""
        return self.reasoning_content or self.reasoning

    @property
    def calls(self) -> list[ToolCall]:
        """An assistant's calls, in either form."""
        older = [ToolCall(function=self.function_call)] if self.function_call is not None else []
        return self.tool_calls or older

    def turn(self) -> dict[str, Any]:
        """The message in the form that chat templates expect."""
        turn: dict[str, Any] = {"role": _TEMPLATE_ROLES.get(self.role, self.role), "content": self.content or ""}
        for name, value in (("name", self.name), ("tool_call_id", self.tool_call_id)):
            if value is not None:
                turn[name] = value
        if self.thoughts is not None:
            turn["reasoning_content"] = self.thoughts
        if self.calls:
            turn["tool_calls"] = [call.turn() for call in self.calls]
        return turn


_TEMPLATE_ROLES = {"developer": "system", "function": "tool"}
"""Roles for which templates use another name."""


def check_continued(messages: Sequence[ChatMessage] | None, add_generation_prompt: bool | None) -> None:
    """Refuse to continue a last message that is not the assistant's text, or that a new turn would follow.

    Raises:
        APIError: a 400.
    """
    name = "continue_final_message"
    last = messages[-1] if messages else None
    if last is None or last.role != "assistant" or not last.content or last.calls:
        raise invalid(f"{name}: the last message must be the assistant's, with a text and no calls", name)
    if add_generation_prompt:
        raise invalid(f"{name}: continues the last message; leave out add_generation_prompt", name)


def check_messages(messages: Sequence[ChatMessage]) -> None:
    """Refuse calls whose arguments hold too much, and results of calls that were never made.

    Raises:
        APIError: a 400 with the field at fault.
    """
    called: set[str] = set()
    # Each text is parsed separately; together they may hold as much as a body may.
    texts = [call.arguments for message in messages for call in message.calls]
    if json_size(*(text.encode(errors="surrogatepass") for text in texts)).is_too_much:
        raise too_complex("messages: the arguments of all tool calls together hold", "messages")
    for i, message in enumerate(messages):
        called.update(call.id for call in message.calls)
        if message.tool_call_id and message.tool_call_id not in called:
            param = f"messages[{i}].tool_call_id"
            named = repr(message.tool_call_id[:80])
            raise invalid(f"{param}: no earlier message calls a tool under the id {named}", param)
        if message.role in ("tool", "function") and not called:
            raise invalid(f"messages[{i}]: a tool answers, and no earlier message calls one", f"messages[{i}]")
