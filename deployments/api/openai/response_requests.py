"""Requests of OpenAI's Responses API, and the chats that they stand for.

Nothing is stored: each request brings the whole conversation. Fields that need a store are refused by name.
"""

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, ValidationError

from deployments.chat.errors import invalid, of_validation
from deployments.chat.messages import ChatMessage
from deployments.chat.requests import MAX_MESSAGES, ChatRequest, Priority
from deployments.chat.structured import NonEmpty
from deployments.chat.tools import MAX_TOOLS, ToolName
from deployments.chat.wire_model import Items, NoEffect, RequestBody, Unsupported, WireModel, type_tag


class TextPart(WireModel):
    """A piece of a message."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: NoEffect = None
    logprobs: NoEffect = None


class MessageItem(WireModel):
    """A message of the conversation."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Items[TextPart]
    id: NoEffect = None
    status: NoEffect = None
    phase: NoEffect = None


class FunctionCallItem(WireModel):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: NonEmpty
    name: ToolName
    arguments: str
    id: NoEffect = None
    status: NoEffect = None
    namespace: str | None = None


class FunctionOutputItem(WireModel):
    """What came of a call."""

    type: Literal["function_call_output"]
    call_id: NonEmpty
    output: str | Items[TextPart]
    id: NoEffect = None
    status: NoEffect = None


class ReasoningText(WireModel):
    """A piece of the model's thoughts."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(WireModel):
    """What the model thought before its next item."""

    type: Literal["reasoning"]
    summary: Items[ReasoningText] | None = None
    content: Items[ReasoningText] | None = None
    encrypted_content: NoEffect = None
    id: NoEffect = None
    status: NoEffect = None


def _item_type(value: Any) -> str:
    return type_tag(value, default="message")


InputItem = Annotated[
    Annotated[MessageItem, Tag("[message]")]
    | Annotated[FunctionCallItem, Tag("[function_call]")]
    | Annotated[FunctionOutputItem, Tag("[function_call_output]")]
    | Annotated[ReasoningItem, Tag("[reasoning]")],
    Discriminator(
        _item_type, "item_type",
        "the type of an item must be message, function_call, function_call_output or reasoning",
    ),
]  # fmt: skip


class ResponseTool(WireModel):
    """A function that the model may ask for."""

    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseToolChoice(WireModel):
    """This function, and no other."""

    type: Literal["function"]
    name: ToolName


class ResponseTextFormat(WireModel):
    """Format of the text."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseText(WireModel):
    """How the text is to be."""

    format: ResponseTextFormat | None = None
    verbosity: NoEffect = None
    """The model decides how much it says."""


class ResponseReasoning(WireModel):
    """How long to think."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: NoEffect = None
    """Thoughts are given whole."""
    generate_summary: NoEffect = None


class ResponsesRequest(RequestBody):
    """Body of `POST /v1/responses`."""

    FIELDS: ClassVar = {
        "messages.*": "input",
        "max_completion_tokens": "max_output_tokens",
        "response_format.*": "text.format",
        r"(tools\[\d+\])\.function(.*)": r"\1\2",
        "reasoning_effort": "reasoning.effort",
    }
    """From a chat's fields to those here."""

    model: str
    input: str | Annotated[Items[InputItem], Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    """A system message in front of the conversation."""
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    tools: Annotated[Items[ResponseTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: ResponseText | None = None
    reasoning: ResponseReasoning | None = None
    priority: Priority | None = None
    """Extension. While requests wait, lower ones go first; 0 where it is not given. How low it may be, the API key
    says."""

    store: NoEffect = None
    """Nothing is stored."""
    metadata: dict[str, Any] | None = None
    """Given back with the response."""
    user: str | None = None
    """Given back with the response."""
    safety_identifier: NoEffect = None
    service_tier: NoEffect = None
    prompt_cache_key: NoEffect = None
    prompt_cache_retention: NoEffect = None
    include: NoEffect = None
    truncation: NoEffect = None
    """A conversation that is too long is an error."""
    stream_options: NoEffect = None

    previous_response_id: Annotated[Any, Unsupported()] = None
    """Not supported: nothing is stored."""
    conversation: Annotated[Any, Unsupported()] = None
    """Not supported: nothing is stored."""
    background: Annotated[Any, Unsupported()] = None
    """False only: nothing is stored."""
    prompt: Annotated[Any, Unsupported()] = None
    """Not supported."""
    max_tool_calls: NoEffect = None
    """This server calls no tools itself."""
    top_logprobs: Annotated[Any, Unsupported(0)] = None
    """Not supported."""
    context_management: NoEffect = None

    @property
    def takes_long(self) -> bool:
        """See `RequestBody`: what it has of tools and formats is known once it is a chat."""
        return True

    def to_chat(self) -> ChatRequest:
        """The same as a chat.

        Raises:
            APIError: a 400 with the field at fault.
        """
        chat = {
            "model": self.model,
            "messages": self._messages(),
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "tools": [_chat_tool(tool) for tool in self.tools or ()],
            "tool_choice": _chat_choice(self.tool_choice) if self.tools or self.tool_choice != "auto" else None,
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": _chat_format(self.text.format if self.text is not None else None),
            "reasoning_effort": self.reasoning.effort if self.reasoning is not None else None,
            "priority": self.priority,
        }
        try:
            return ChatRequest.model_validate(chat)
        except ValidationError as error:
            raise of_validation(error, ChatRequest) from None

    def _messages(self) -> list[ChatMessage]:
        turns: list[dict[str, Any]] = []
        if self.instructions:
            turns.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            turns.append({"role": "user", "content": self.input})
        else:
            for item in self.input:
                _add_item(turns, item)
        try:
            return [ChatMessage.model_validate(turn) for turn in turns]
        except ValidationError:
            raise invalid("input: reasoning must be followed by a message or a call", "input") from None


def _add_item(turns: list[dict[str, Any]], item: InputItem) -> None:
    """Add an item: thoughts, text and calls that follow one another are one turn of the assistant."""
    match item:
        case MessageItem(role="assistant"):
            turn = _assistant_turn(turns, without="content")
            turn["content"] = _text(item.content)
        case MessageItem():
            turns.append({"role": item.role, "content": _text(item.content)})
        case FunctionCallItem():
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            _assistant_turn(turns).setdefault("tool_calls", []).append(call)
        case FunctionOutputItem():
            turns.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
        case ReasoningItem():
            thoughts = "\n".join(part.text for part in item.content or item.summary or ())
            if thoughts:
                turns.append({"role": "assistant", "reasoning_content": thoughts})


def _assistant_turn(turns: list[dict[str, Any]], without: str | None = None) -> dict[str, Any]:
    """The assistant's turn that goes on, or a new one; new too if it has the field `without` already."""
    if not turns or turns[-1]["role"] != "assistant" or without in turns[-1] or (without and "tool_calls" in turns[-1]):
        turns.append({"role": "assistant"})
    return turns[-1]


def _text(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def _chat_tool(tool: ResponseTool) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude={"type"})}


def _chat_choice(choice: str | ResponseToolChoice | None) -> Any:
    return {"type": "function", "function": {"name": choice.name}} if isinstance(choice, ResponseToolChoice) else choice


def _chat_format(text_format: ResponseTextFormat | None) -> dict[str, Any] | None:
    if text_format is None:
        return None
    if text_format.type != "json_schema":
        return {"type": text_format.type}
    if text_format.schema_ is None or text_format.name is None:
        raise invalid("text.format: a json_schema has a name and a schema", "text.format")
    schema = {"name": text_format.name, "schema": text_format.schema_, "strict": text_format.strict}
    return {"type": "json_schema", "json_schema": schema}


def echoed(body: ResponsesRequest) -> dict[str, Any]:
    """Fields of the request that its response repeats."""
    choice = body.tool_choice
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": body.reasoning.effort if body.reasoning is not None else None, "summary": None},
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": _echoed_format(body)},
        "tool_choice": json.loads(choice.model_dump_json()) if isinstance(choice, WireModel) else choice or "auto",
        "tools": [{"strict": None, **tool.model_dump()} for tool in body.tools or ()],
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


def _echoed_format(body: ResponsesRequest) -> dict[str, Any]:
    if body.text is None or body.text.format is None:
        return {"type": "text"}
    return body.text.format.model_dump(by_alias=True, exclude_none=True)
