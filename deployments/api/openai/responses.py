"""Answers of the OpenAI API, as `/docs` describes them. The server writes plain JSON; tests check it against these
models."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class ResponseModel(BaseModel):
    """An answer with exactly these fields."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


FinishReasonName = Literal["stop", "length", "tool_calls"]


class PromptTokensDetails(ResponseModel):
    """Where the prompt's tokens came from."""

    cached_tokens: int
    """Number of tokens from the prefix cache."""


class CompletionTokensDetails(ResponseModel):
    """What the output tokens are."""

    reasoning_tokens: int
    """Number of tokens of thoughts, estimated by their share of the text."""


class Usage(ResponseModel):
    """Token counts of a whole request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class TopLogprob(ResponseModel):
    """A token that could have been drawn instead."""

    token: str
    logprob: float
    bytes: list[int] | None
    """The token's bytes; None for a token that is part of a character."""


class TokenLogprob(TopLogprob):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(ResponseModel):
    """Log probabilities of a chat choice."""

    content: list[TokenLogprob]
    refusal: None


class CalledFunction(ResponseModel):
    """What a call asks for."""

    name: str
    arguments: str
    """The arguments in JSON, as the model wrote them."""


class AssistantToolCall(ResponseModel):
    """A call that the model makes."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(ResponseModel):
    """The model's turn."""

    role: Literal["assistant"]
    content: str | None
    """The text; None if there are calls and no text."""
    refusal: None
    tool_calls: list[AssistantToolCall] | None = None
    reasoning_content: str | None = None
    """What the model thought before it answered."""


class ChatChoice(ResponseModel):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReasonName


class ChatCompletion(ResponseModel):
    """Answer of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    """Seconds since 1970."""
    model: str
    choices: list[ChatChoice]
    usage: Usage


class FunctionDelta(ResponseModel):
    """What is new in a call."""

    name: str | None = None
    arguments: str


class ToolCallDelta(ResponseModel):
    """The beginning of a call, with id and name, or more of its arguments."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class ChatDelta(ResponseModel):
    """What is new: the role first, then pieces of content, reasoning or calls, nothing at the end."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None
    refusal: None = None


class ChatChunkChoice(ResponseModel):
    """What is new in one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReasonName | None


class ChatCompletionChunk(ResponseModel):
    """One event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    """With `stream_options.include_usage`: None in every chunk except the last, which has no choices."""


class PromptLogprob(ResponseModel):
    """How likely a token was at one position of a prompt."""

    logprob: float
    rank: int | None
    """Rank among the likeliest tokens, from 1; None if the token is not one of those asked for."""
    decoded_token: str


class CompletionLogprobs(ResponseModel):
    """Log probabilities of a completion choice."""

    tokens: list[str]
    token_logprobs: list[float | None]
    """None for the first token of a prompt that is echoed."""
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(ResponseModel):
    """One answer, or what is new in one in a stream."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None
    """If asked for: one entry for each token of the prompt, by token id; None for the first."""
    finish_reason: FinishReasonName | None


class Completion(ResponseModel):
    """Answer of `POST /v1/completions`, and one event of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ResponseObject(BaseModel):
    """Answer of `POST /v1/responses`; streamed as events with a `type` and a `sequence_number`."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete", "failed", "in_progress"]
    model: str
    output: list[dict[str, Any]]
    """Items of type `reasoning`, `message` or `function_call`."""
    usage: dict[str, Any] | None
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None


class DeletedResponse(ResponseModel):
    """Answer of `DELETE /v1/responses/{response_id}`."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


class ResponseItems(ResponseModel):
    """Answer of `GET /v1/responses/{response_id}/input_items`."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class MessageObject(ResponseModel):
    """Answer of `POST /v1/messages`; streamed as events with a `type`."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    """Blocks of type `thinking`, `text` or `tool_use`."""
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: dict[str, int]


class EmbeddingUsage(ResponseModel):
    """Token counts of the inputs."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingVector(ResponseModel):
    """One input's vector."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingList(ResponseModel):
    """Answer of `POST /v1/embeddings`."""

    object: Literal["list"]
    data: list[EmbeddingVector]
    model: str
    usage: EmbeddingUsage


class InputTokens(ResponseModel):
    """Answer of `POST /v1/messages/count_tokens`."""

    input_tokens: int


class ModelObject(ResponseModel):
    """A model that is served, or an adapter that requests may name in its place."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    type: Literal["model"]
    display_name: str
    """The same as `id`; Anthropic's clients read it, and the next two."""
    created_at: str
    max_input_tokens: int | None
    max_model_len: int | None
    """Context length in tokens; None while the model loads."""
    root: str
    """Where it was loaded from."""
    parent: str | None
    """The model that an adapter belongs to; None for a model."""
    aliases: list[str]
    """More names that requests may use."""
    state: Literal["ready", "starting", "asleep"]
    """`asleep`: it has no replica, and the next request starts one."""
    task: Literal["generate", "classify"] | None
    """`classify` for a model that gives labels to texts; `generate` for one that continues them, and makes vectors of
    them. None while the model loads."""


class ModelList(ResponseModel):
    """Answer of `GET /v1/models`."""

    object: Literal["list"]
    data: list[ModelObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Tokens(ResponseModel):
    """Answer of `POST /tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(ResponseModel):
    """Answer of `POST /detokenize`."""

    prompt: str


class Status(ResponseModel):
    """Answer of `GET /health` and `GET /ready`."""

    status: str


class Version(ResponseModel):
    """Answer of `GET /version`."""

    version: str


class Stats(ResponseModel):
    """Answer of `GET /rayline/stats`."""

    router: dict[str, Any]
    replicas: dict[str, dict[str, Any]]
    """What each replica last reported, by replica id."""
    models: dict[str, dict[str, Any]]
    """The state of each model, what is running there, and which replicas are its own."""
    batches: dict[str, Any] | None
    """What this router does for batches; None if it runs none."""
