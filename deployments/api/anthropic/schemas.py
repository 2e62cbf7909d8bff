"""Requests of Anthropic's Messages API, and the chats that they stand for.

After https://docs.anthropic.com/en/api/messages.
"""

import json
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, Tag, ValidationError, model_validator

from deployments.chat.errors import invalid, of_validation
from deployments.chat.requests import MAX_MESSAGES, ChatRequest, Priority
from deployments.chat.structured import NonEmpty
from deployments.chat.tools import MAX_TOOLS, ToolName
from deployments.chat.wire_model import Items, NoEffect, RequestBody, Unsupported, WireModel, type_tag

MAX_STOP_SEQUENCES = 4


class TextBlock(WireModel):
    """Text."""

    type: Literal["text"]
    text: str
    cache_control: NoEffect = None
    """What prompts share is always cached."""
    citations: NoEffect = None


class ToolUseBlock(WireModel):
    """A call that the model made."""

    type: Literal["tool_use"]
    id: NonEmpty
    name: ToolName
    input: dict[str, Any]
    cache_control: NoEffect = None
    caller: NoEffect = None


class ToolResultBlock(WireModel):
    """What came of a call."""

    type: Literal["tool_result"]
    tool_use_id: NonEmpty
    content: str | Items[TextBlock] | None = None
    is_error: NoEffect = None
    cache_control: NoEffect = None


class ThinkingBlock(WireModel):
    """What the model thought."""

    type: Literal["thinking"]
    thinking: str
    signature: NoEffect = None


Block = Annotated[
    Annotated[TextBlock, Tag("[text]")]
    | Annotated[ToolUseBlock, Tag("[tool_use]")]
    | Annotated[ToolResultBlock, Tag("[tool_result]")]
    | Annotated[ThinkingBlock, Tag("[thinking]")],
    Discriminator(type_tag, "block_type", "the type of a block must be text, tool_use, tool_result or thinking"),
]


class InputMessage(WireModel):
    """One turn."""

    role: Literal["user", "assistant"]
    content: str | Annotated[Items[Block], Field(min_length=1)]


class AnthropicTool(WireModel):
    """A function that the model may ask for."""

    type: Literal["custom"] | None = None
    name: ToolName
    description: str | None = None
    input_schema: dict[str, Any]
    strict: NoEffect = None
    cache_control: NoEffect = None
    eager_input_streaming: NoEffect = None
    """Arguments always come as they are made."""


class AnthropicToolChoice(WireModel):
    """Whether and what to call."""

    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.type == "tool") != (self.name is not None):
            raise ValueError("a name goes with the type tool, and with no other")
        return self


class Thinking(WireModel):
    """Whether to think first."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: NoEffect = None
    display: NoEffect = None


class OutputFormat(WireModel):
    """A JSON schema that the answer keeps to."""

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(WireModel):
    """How the answer is to be."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    """Given to the chat template as `reasoning_effort`."""
    format: OutputFormat | None = None


class CountTokensRequest(RequestBody):
    """Body of `POST /v1/messages/count_tokens`."""

    FIELDS: ClassVar = {
        "messages.*": "messages",
        "max_completion_tokens": "max_tokens",
        "stop": "stop_sequences",
        "response_format.*": "output_config.format",
        r"(tools\[\d+\])\.function\.parameters": r"\1.input_schema",
        r"(tools\[\d+\])\.function(.*)": r"\1\2",
        "reasoning_effort": "output_config.effort",
    }
    """From a chat's fields to those here."""

    model: str
    messages: Annotated[Items[InputMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: str | Items[TextBlock] | None = None
    tools: Annotated[Items[AnthropicTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: NoEffect = None
    speed: NoEffect = None
    context_management: NoEffect = None

    container: Annotated[Any, Unsupported()] = None
    """Not supported."""
    mcp_servers: Annotated[Any, Unsupported()] = None
    """Not supported."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.messages[-1].role == "assistant":
            message = "messages: the last one must be the user's; answers cannot be begun by the client"
            raise invalid(message, "messages")
        return self

    @property
    def takes_long(self) -> bool:
        """See `RequestBody`: what it has of tools and formats is known once it is a chat."""
        return True

    def to_chat(self) -> ChatRequest:
        """The same as a chat.

        Raises:
            APIError: a 400 with the field at fault.
        """
        chat: dict[str, Any] = {"model": self.model, "messages": self._messages(), **self._sampling()}
        if self.tools:
            chat["tools"] = [
                {"type": "function", "function": {"name": tool.name, "description": tool.description,
                                                  "parameters": tool.input_schema}}
                for tool in self.tools
            ]  # fmt: skip
        if self.tool_choice is not None:
            choice = self.tool_choice
            named = {"type": "function", "function": {"name": choice.name}}
            chat["tool_choice"] = {"any": "required", "tool": named}.get(choice.type, choice.type)
            chat["parallel_tool_calls"] = not choice.disable_parallel_tool_use
        effort = self.output_config.effort if self.output_config is not None else None
        if self.thinking is not None and self.thinking.type == "disabled":
            chat["reasoning_effort"] = "none"
        elif effort is not None:
            chat["reasoning_effort"] = "xhigh" if effort == "max" else effort
        try:
            return ChatRequest.model_validate(chat)
        except ValidationError as error:
            raise of_validation(error, ChatRequest) from None

    def _sampling(self) -> dict[str, Any]:
        return {}

    def _messages(self) -> list[dict[str, Any]]:
        turns: list[dict[str, Any]] = []
        if self.system:
            turns.append({"role": "system", "content": _text(self.system)})
        for i, message in enumerate(self.messages):
            if isinstance(message.content, str):
                turns.append({"role": message.role, "content": message.content})
            elif message.role == "assistant":
                turns.append(_assistant_turn(message.content, f"messages[{i}].content"))
            else:
                turns += _user_turns(message.content, f"messages[{i}].content")
        return turns


class MessagesRequest(CountTokensRequest):
    """Body of `POST /v1/messages`."""

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: Annotated[Items[NonEmpty], Field(max_length=MAX_STOP_SEQUENCES)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    priority: Priority | None = None
    """Extension. While requests wait, lower ones go first; 0 where it is not given. How low it may be, the API key
    says."""
    metadata: NoEffect = None
    service_tier: NoEffect = None
    inference_geo: NoEffect = None

    def _sampling(self) -> dict[str, Any]:
        return {
            "max_completion_tokens": self.max_tokens,
            "stop": self.stop_sequences or None,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "priority": self.priority,
            "response_format": self._response_format(),
        }

    def _response_format(self) -> dict[str, Any] | None:
        if self.output_config is None or self.output_config.format is None:
            return None
        schema = self.output_config.format.schema_
        return {"type": "json_schema", "json_schema": {"name": "output", "schema": schema}}


def _assistant_turn(blocks: list[Block], param: str) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": "assistant"}
    for block in blocks:
        match block:
            case TextBlock():
                turn["content"] = turn.get("content", "") + block.text
            case ThinkingBlock():
                turn["reasoning_content"] = turn.get("reasoning_content", "") + block.thinking
            case ToolUseBlock():
                function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
                call = {"id": block.id, "type": "function", "function": function}
                turn.setdefault("tool_calls", []).append(call)
            case ToolResultBlock():
                raise invalid(f"{param}: a tool_result belongs to the user", param)
    if "tool_calls" not in turn:
        turn.setdefault("content", "")
    return turn


def _user_turns(blocks: list[Block], param: str) -> list[dict[str, Any]]:
    """Results of tools, each a turn of its own, then the text."""
    turns: list[dict[str, Any]] = []
    texts = []
    for block in blocks:
        match block:
            case TextBlock():
                texts.append(block.text)
            case ToolResultBlock():
                content = _text(block.content or "")
                turns.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": content})
            case _:
                raise invalid(f"{param}: {block.type} belongs to the assistant", param)
    return [*turns, {"role": "user", "content": "\n".join(texts)}] if texts else turns


def _text(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)
