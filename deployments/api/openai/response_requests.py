"""Requests of OpenAI's Responses API, and the chats that they stand for."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationError

from deployments.api.openai.response_items import InputItem, MessageItem, chat_turns
from deployments.api.openai.response_tools import (
    FunctionNames,
    ResponseTool,
    ResponseToolChoice,
    at_own_place,
    chat_tools,
    echoed_tool,
    functions_of,
)
from deployments.chat.errors import APIError, invalid, of_validation
from deployments.chat.messages import ChatMessage
from deployments.chat.requests import MAX_MESSAGES, ChatRequest, DrawFields
from deployments.chat.skipped import Skipped
from deployments.chat.thinking import Effort
from deployments.chat.wire_model import Items, NoEffect, Unsupported, WireModel
from llm.config import MAX_TOP_LOGPROBS


class ResponseTextFormat(WireModel):
    """Format of the text."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseText(WireModel):
    """How the text should be."""

    format: ResponseTextFormat | None = None
    verbosity: NoEffect = None
    """Ignored: the model decides how much it writes."""


class ResponseReasoning(WireModel):
    """How long to think."""

    effort: Effort | None = None
    summary: NoEffect = None
    """Ignored: thoughts are given in full."""
    generate_summary: NoEffect = None


def _or_none(value: Any) -> Any:
    return None if value == "" else value


class ResponsesRequest(DrawFields):
    """Body of `POST /v1/responses`."""

    FIELDS: ClassVar = {
        "messages.*": "input",
        "max_completion_tokens": "max_output_tokens",
        "response_format.*": "text.format",
        "reasoning_effort": "reasoning.effort",
    }
    """Maps a chat's fields to the fields here."""

    input: str | Annotated[Items[InputItem], Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    """A system message in front of the conversation."""
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    tools: Items[ResponseTool] | None = None
    """Functions, by themselves or in a namespace; tools of other kinds are ignored."""
    tool_choice: ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: ResponseText | None = None
    reasoning: ResponseReasoning | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """Extension. Variables for the model's chat template, as in a chat."""
    store: bool | None = None
    """Store the response, for `previous_response_id` and `GET /v1/responses/{id}`. True by default."""
    previous_response_id: Annotated[str | None, BeforeValidator(_or_none, json_schema_input_type=str)] = None
    """The response whose conversation is continued; `input` holds what is new."""
    include: Items[str] | None = None
    """`reasoning.encrypted_content` or `message.output_text.logprobs`; others are ignored."""
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    metadata: dict[str, Any] | None = None
    """Returned with the response."""
    user: str | None = None
    """Returned with the response."""
    safety_identifier: NoEffect = None
    service_tier: NoEffect = None
    prompt_cache_retention: NoEffect = None
    truncation: NoEffect = None
    """Ignored: a conversation that is too long is an error."""
    stream_options: NoEffect = None

    conversation: Annotated[Any, Unsupported()] = None
    """Not supported: use `previous_response_id`."""
    background: Annotated[Any, Unsupported()] = None
    """Must be false."""
    prompt: Annotated[Any, Unsupported()] = None
    """Not supported."""
    max_tool_calls: NoEffect = None
    """Ignored: this server calls no tools itself."""
    context_management: NoEffect = None

    @property
    def takes_long(self) -> bool:
        """See `RequestBody`; its tools and formats are known once it has been converted to a chat."""
        return True

    def to_chat(self) -> ChatRequest:
        """The same request as a chat.

        Raises:
            APIError: a 400 with the field at fault.
        """
        functions = functions_of(self.tools or ())
        tools, choice = chat_tools(functions, self.tool_choice)
        chat = {
            "model": self.model,
            "messages": self._messages(),
            "max_completion_tokens": self.max_output_tokens,
            **{name: getattr(self, name) for name in DrawFields.model_fields if name != "model"},
            "tools": tools,
            "tool_choice": choice,
            "logprobs": self.wants_logprobs,
            "top_logprobs": (self.top_logprobs or 0) if self.wants_logprobs else None,
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": _chat_format(self.text.format if self.text is not None else None),
            "reasoning_effort": self.reasoning.effort if self.reasoning is not None else None,
            "chat_template_kwargs": self.chat_template_kwargs,
        }
        try:
            return ChatRequest.model_validate(chat)
        except ValidationError as error:
            raise at_own_place(of_validation(error, ChatRequest), functions) from None
        except APIError as error:
            raise at_own_place(error, functions) from None

    def _messages(self) -> list[ChatMessage]:
        turns = [{"role": "system", "content": self.instructions}] if self.instructions else []
        turns += chat_turns(self.items())
        if not turns:
            raise invalid("input: holds nothing that a model can read", "input")
        try:
            return [ChatMessage.model_validate(turn) for turn in turns]
        except ValidationError as error:
            raise invalid(f"input: {error.errors()[0]['msg'].removeprefix('Value error, ')}", "input") from None

    def items(self) -> list[Any]:
        """The `input` as items."""
        return [MessageItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input

    @property
    def function_names(self) -> FunctionNames:
        """The client's names for the functions."""
        return FunctionNames.of(functions_of(self.tools or ()))

    @property
    def wants_logprobs(self) -> bool:
        """Whether the tokens' log probabilities are asked for."""
        return bool(self.top_logprobs) or "message.output_text.logprobs" in (self.include or ())

    @property
    def wants_sealed_thoughts(self) -> bool:
        """Whether reasoning items must hold the thoughts in a form that a stateless client can send back."""
        return "reasoning.encrypted_content" in (self.include or ())


_FORMAT_NAME = "response"
"""Name of a schema to which the request gives none."""


def _chat_format(text_format: ResponseTextFormat | None) -> dict[str, Any] | None:
    if text_format is None:
        return None
    if text_format.type != "json_schema":
        return {"type": text_format.type}
    if text_format.schema_ is None:
        raise invalid("text.format.schema: is missing, and the type json_schema needs it", "text.format.schema")
    schema = {"name": text_format.name, "schema": text_format.schema_, "strict": text_format.strict}
    return {"type": "json_schema", "json_schema": schema}


def echoed(body: ResponsesRequest, *, is_stored: bool) -> dict[str, Any]:
    """The fields of the request that its response repeats.

    Args:
        body: the request.
        is_stored: whether the response will be stored.
    """
    choice = body.tool_choice
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": body.reasoning.effort if body.reasoning is not None else None, "summary": None},
        "store": is_stored,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": _echoed_format(body)},
        "tool_choice": choice.model_dump(exclude_none=True) if isinstance(choice, WireModel) else choice or "auto",
        "tools": [echoed_tool(tool) for tool in body.tools or () if not isinstance(tool, Skipped)],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


def _echoed_format(body: ResponsesRequest) -> dict[str, Any]:
    if body.text is None or body.text.format is None:
        return {"type": "text"}
    named = {"name": _FORMAT_NAME} if body.text.format.type == "json_schema" else {}
    return {**named, **body.text.format.model_dump(by_alias=True, exclude_none=True)}
