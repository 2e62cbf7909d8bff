"""Requests of Anthropic's Messages API, and the chats that they stand for.

After https://docs.anthropic.com/en/api/messages.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationError, model_validator

from deployments.api.anthropic.blocks import Block, TextBlock, assistant_turn, check_block, system_text, user_turns
from deployments.chat.errors import invalid, of_validation
from deployments.chat.requests import MAX_MESSAGES, MAX_STOP_STRINGS, ChatRequest, Priority
from deployments.chat.skipped import AnySkipped
from deployments.chat.structured import NonEmpty
from deployments.chat.tools import MAX_TOOLS, ToolName
from deployments.chat.wire_model import Items, NoEffect, RequestBody, Unsupported, WireModel, type_tag


class InputMessage(WireModel):
    """One turn."""

    role: Literal["user", "assistant", "system"]
    content: str | Items[Block] | None = None

    def turns(self) -> list[dict[str, Any]]:
        """The same in the form that chats use."""
        if self.role == "system":
            return [{"role": "system", "content": system_text(self.content)}]
        if self.content is None or isinstance(self.content, str):
            return [{"role": self.role, "content": self.content or ""}]
        return [assistant_turn(self.content)] if self.role == "assistant" else user_turns(self.content)


def _check_tool_type(value: Any) -> Any:
    if value == "function":
        raise ValueError("this is a tool in OpenAI's form; leave out the type, and give name and input_schema")
    return value


class AnthropicTool(WireModel):
    """A function that the model may call."""

    type: Annotated[Literal["custom"] | None, BeforeValidator(_check_tool_type, json_schema_input_type=str)] = None
    name: ToolName
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    """The same as in chat completions."""
    cache_control: NoEffect = None
    eager_input_streaming: NoEffect = None
    """Ignored: arguments are always sent as they are generated."""


def _tool_tag(value: Any) -> str:
    return "[custom]" if type_tag(value, "custom") in ("[custom]", "[function]", "") else "[skipped]"


AnyTool = Annotated[Annotated[AnthropicTool, Tag("[custom]")] | AnySkipped, Discriminator(_tool_tag)]


class AnthropicToolChoice(WireModel):
    """Whether to call a tool, and which one."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.type == "tool") != (self.name is not None):
            raise ValueError("a name goes with the type tool, and with no other")
        return self


class Thinking(WireModel):
    """Whether to think first."""

    type: str
    """`disabled` or `enabled`, to turn thinking off or on; with any other, such as `adaptive`, the model decides."""
    budget_tokens: NoEffect = None
    display: NoEffect = None


class OutputFormat(WireModel):
    """A JSON schema that the answer follows."""

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(WireModel):
    """How the answer should be."""

    effort: str | None = None
    """Given to the chat template as `reasoning_effort`: `low`, `medium`, `high`, `xhigh` or `max`."""
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
    """Maps a chat's fields to the fields here."""

    messages: Annotated[Items[InputMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: str | Items[TextBlock] | None = None
    tools: Annotated[Items[AnyTool], Field(max_length=MAX_TOOLS)] | None = None
    """Tools of other types than `custom` are ignored: Anthropic's servers run them, or only its models know them."""
    tool_choice: AnthropicToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    """Older name of `output_config.format`."""
    cache_control: NoEffect = None
    speed: NoEffect = None
    context_management: NoEffect = None

    container: Annotated[Any, Unsupported()] = None
    """Not supported."""
    mcp_servers: Annotated[Any, Unsupported()] = None
    """Not supported."""
    compaction: Annotated[Any, Unsupported()] = None
    """Not supported: it asks for a summary in place of an answer."""
    thread: Annotated[Any, Unsupported()] = None
    """Not supported: no conversation is kept. Anthropic's clients then send the whole conversation each time."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for i, message in enumerate(self.messages):
            if message.content is None and message.role != "assistant":
                raise invalid(f"messages[{i}].content: is missing", f"messages[{i}].content")
            if isinstance(message.content, list):
                for j, block in enumerate(message.content):
                    if not isinstance(block, TextBlock):  # of which there may be very many
                        check_block(block, message.role, f"messages[{i}].content[{j}]")
        return self

    @property
    def takes_long(self) -> bool:
        """See `RequestBody`; its tools and formats are known once it has been converted to a chat."""
        return True

    def to_chat(self) -> ChatRequest:
        """The same request as a chat.

        Raises:
            APIError: a 400 with the field at fault.
        """
        messages = self._messages()
        chat: dict[str, Any] = {"model": self.model, "messages": messages, **self._sampling()}
        last = messages[-1]
        if last["role"] == "assistant" and last.get("content") and "tool_calls" not in last:
            chat["continue_final_message"] = True
        tools = [tool for tool in self.tools or () if isinstance(tool, AnthropicTool)]
        if tools:
            chat["tools"] = [
                {"type": "function", "function": {"name": tool.name, "description": tool.description,
                                                  "parameters": tool.input_schema, "strict": tool.strict}}
                for tool in tools
            ]  # fmt: skip
        if self.tool_choice is not None and (tools or self.tool_choice.type != "auto"):
            choice = self.tool_choice
            named = {"type": "function", "function": {"name": choice.name}}
            chat["tool_choice"] = {"any": "required", "tool": named}.get(choice.type, choice.type)
            chat["parallel_tool_calls"] = not choice.disable_parallel_tool_use
        effort = self.output_config.effort if self.output_config is not None else None
        if self.thinking is not None and self.thinking.type == "disabled":
            chat["reasoning_effort"] = "none"
        elif effort in _EFFORTS:
            chat["reasoning_effort"] = _EFFORTS[effort]
        if self.thinking is not None and self.thinking.type == "enabled":
            chat["thinking"] = True
        try:
            return ChatRequest.model_validate(chat)
        except ValidationError as error:
            raise of_validation(error, ChatRequest) from None

    def _sampling(self) -> dict[str, Any]:
        return {}

    def _messages(self) -> list[dict[str, Any]]:
        system = system_text(self.system)
        turns = [{"role": "system", "content": system}] if system else []
        return turns + [turn for message in self.messages for turn in message.turns()]


_EFFORTS = {"low": "low", "medium": "medium", "high": "high", "xhigh": "xhigh", "max": "xhigh"}
"""Maps effort levels to those of chats; other values have no effect."""


class MessagesRequest(CountTokensRequest):
    """Body of `POST /v1/messages`."""

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: Annotated[Items[NonEmpty], Field(max_length=MAX_STOP_STRINGS)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    priority: Priority | None = None
    """Extension. Waiting requests with lower values go first; 0 by default. The API key limits how low it may be."""
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
        newer = self.output_config.format if self.output_config is not None else None
        output_format = newer or self.output_format
        if output_format is None:
            return None
        return {"type": "json_schema", "json_schema": {"schema": output_format.schema_}}
