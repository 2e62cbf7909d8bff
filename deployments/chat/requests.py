"""Requests of the OpenAI API as sent over the wire, with strict types and explicit bounds.

See `wire_model` for how fields without effect, unsupported fields and unknown fields are treated.
"""

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from deployments.accounts_config import MAX_PRIORITY, MIN_PRIORITY
from deployments.chat.errors import invalid, of_validation
from deployments.chat.messages import ChatMessage, check_continued, check_messages
from deployments.chat.structured import StructuredFields
from deployments.chat.thinking import ThinkingFields
from deployments.chat.tools import MAX_TOOLS, Tool, ToolChoice, allowed_tools, check_tools
from deployments.chat.wire_model import Items, NoEffect, RequestBody, Unsupported, WireModel
from llm.config import MAX_TOP_LOGPROBS
from llm.serving.schemas import INT64_MAX

MAX_N = 128
MAX_BEST_OF = 20
MAX_STOP_STRINGS = 64
MAX_COMPLETION_LOGPROBS = 5
MAX_STOP_TOKEN_IDS = 128
MAX_MESSAGES = 4096
MAX_SESSION_CHARS = 512

Priority = Annotated[int, Field(ge=MIN_PRIORITY, le=MAX_PRIORITY)]
SessionKey = Annotated[str, Field(max_length=MAX_SESSION_CHARS)]


def _check_stop(value: Any) -> Any:
    """A string, or a list of strings."""
    if value is None or (isinstance(value, str) and value):
        return value
    if isinstance(value, str):
        raise invalid("stop: a stop string is empty", "stop")
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise invalid("stop: must be a string or a list of strings", "stop")
    if len(value) > MAX_STOP_STRINGS:
        raise invalid(f"stop: at most {MAX_STOP_STRINGS} strings", "stop")
    if not all(value):
        raise invalid("stop: a stop string is empty", "stop")
    return value


def _check_logit_bias(value: Any) -> Any:
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) > 1024:
        raise invalid("logit_bias: must be an object with at most 1024 token ids", "logit_bias")
    bias: dict[int, float] = {}
    for key, weight in value.items():
        text = str(key)
        if not (text.isascii() and text.isdigit() and len(text) <= 9):
            raise invalid("logit_bias: keys must be token ids", "logit_bias")
        if weight is None:
            continue
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not -100 <= weight <= 100:
            raise invalid("logit_bias: values must be numbers from -100 to 100", "logit_bias")
        bias[int(key)] = float(weight)
    return bias


def _check_allowed(value: Any) -> Any:
    if value is None:
        return None
    if not isinstance(value, list) or not value:
        raise invalid("allowed_token_ids: must be an array of at least one token id", "allowed_token_ids")
    check_token_ids(value, "allowed_token_ids")
    return value


class StreamOptions(WireModel):
    """Options of a streamed answer."""

    include_usage: bool | None = None
    """Send token counts in a last chunk without choices."""
    include_obfuscation: NoEffect = None


class DrawFields(RequestBody):
    """How tokens are drawn, and where an answer ends: the same for chats, completions and responses."""

    seed: Annotated[int, Field(ge=-INT64_MAX - 1, le=INT64_MAX)] | None = None
    stop: Annotated[str | Items[str] | None, BeforeValidator(_check_stop)] = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """0 to always take the likeliest token, as with `temperature: 0`."""

    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[int, float] | None, BeforeValidator(_check_logit_bias)] = None
    allowed_token_ids: Annotated[Items[int] | None, BeforeValidator(_check_allowed)] = None
    """Extension. The only token ids that may be drawn."""

    top_k: Annotated[int, Field(ge=-1)] | None = None
    """Extension. 0 or -1 for all tokens."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Extension."""
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    """Extension."""
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    """Extension. No stop of any kind before this many tokens."""
    ignore_eos: bool | None = None
    """Extension. Continue past the end of the answer."""
    stop_token_ids: Annotated[Items[Annotated[int, Field(ge=0)]], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    """Extension."""
    priority: Priority | None = None
    """Extension. Waiting requests with lower values go first; 0 by default. The API key limits how low it may be."""

    cache_salt: Annotated[str, Field(max_length=128)] | None = None
    """Extension. Share cached prompts only with requests that have the same salt."""

    prompt_cache_key: SessionKey | None = None
    """Name of the session: where replicas cost the same, its requests go to the replica that served it last. The header
    `X-Session-Id` says the same, and counts first."""

    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class SamplingFields(StructuredFields, DrawFields):
    """What chat and plain completions have in common."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    """No effect on an answer that is not streamed."""
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    """Number of answers to each prompt; the i-th uses seed + i."""
    user: NoEffect = None
    metadata: NoEffect = None
    store: NoEffect = None
    service_tier: NoEffect = None
    safety_identifier: NoEffect = None
    prompt_cache_retention: NoEffect = None

    chat_template: Any = Field(default=None, json_schema_extra={"deprecated": True})
    """Refused: the model's own template is used."""

    @model_validator(mode="after")
    def _check_common(self) -> Self:
        if self.chat_template is not None:
            raise invalid("chat_template: a request cannot bring its own chat template", "chat_template")
        return self

    @property
    def takes_long(self) -> bool:
        """See `RequestBody`."""
        free_formats = (None, "text")
        response_format = self.response_format.type if self.response_format is not None else None
        guides = (self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar, self.structured_outputs)
        return response_format not in free_formats or any(guide is not None for guide in guides)

    @property
    def num_prompt_logprobs(self) -> int | None:
        """How many of the likeliest tokens are requested at each position of the prompt; None for none."""
        return None


class ChatRequest(ThinkingFields, SamplingFields):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[Items[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """Most tokens to generate; by default as many as fit in the context."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Older name of `max_completion_tokens`."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """Extension. Variables for the model's chat template, such as `enable_thinking`."""
    add_generation_prompt: bool | None = None
    """Extension. False to leave out the text that opens the assistant's answer."""
    continue_final_message: bool | None = None
    """Extension. The answer continues the last message, which must be an assistant's, where it ends."""

    tools: Annotated[Items[Tool], Field(max_length=MAX_TOOLS)] | None = None
    """Functions that the model may call."""
    tool_choice: ToolChoice | None = None
    """`auto` if there are tools: the model decides. `required` or a name forces a call by a grammar."""
    parallel_tool_calls: bool | None = None
    """False for at most one call if calls are forced."""
    functions: Annotated[Any, Unsupported()] = None
    """Not supported: use `tools`."""
    function_call: Annotated[Any, Unsupported("none", "auto")] = None
    """Not supported: use `tool_choice`."""
    modalities: Annotated[Any, Unsupported(["text"])] = None
    """`["text"]` only."""
    audio: Annotated[Any, Unsupported()] = None
    """Not supported."""
    prediction: Annotated[Any, Unsupported()] = None
    """Not supported."""
    verbosity: NoEffect = None
    """Ignored: the model decides how much it writes."""
    web_search_options: Annotated[Any, Unsupported()] = None
    """Not supported."""

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise invalid("max_tokens and max_completion_tokens differ; give one of them", "max_completion_tokens")
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs: only with logprobs set to true", "top_logprobs")
        if self.messages[-1].role == "assistant" and self.messages[-1].prefix:
            self.continue_final_message = True
        if self.continue_final_message:
            check_continued(self.messages, self.add_generation_prompt)
        self.thinking_variables()
        check_tools(self.tools, self.tool_choice)
        self.tools, self.tool_choice = allowed_tools(self.tools, self.tool_choice)
        check_messages(self.messages)
        return self

    @property
    def takes_long(self) -> bool:
        """See `SamplingFields`; templates may do a lot of work with tools and variables."""
        return super().takes_long or bool(self.tools or self.chat_template_kwargs) or self.has_thinking_fields

    @property
    def most_tokens(self) -> int | None:
        """The limit on output tokens under either name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


Prompt = str | list[str] | list[int] | list[list[int]]


def check_prompt(value: Any, param: str = "prompt") -> Any:
    """A text, texts, ids or lists of ids; distinguished here because a union's errors would name every form.

    Raises:
        APIError: it is none of these.
    """
    if isinstance(value, str):
        if not value:
            raise invalid(f"{param}: is empty", param)
        return value
    if not isinstance(value, list) or (value and isinstance(value[0], dict)):
        raise invalid(f"{param}: must be a string, a list of strings, a list of token ids or a list of such", param)
    if not value:
        raise invalid(f"{param}: is empty", param)
    first = value[0]
    if isinstance(first, str):
        if not all(isinstance(item, str) and item for item in value):
            raise invalid(f"{param}: each must be a string that is not empty", param)
    elif isinstance(first, list):
        for item in value:
            if not isinstance(item, list) or not item:
                raise invalid(f"{param}: each must be a list of token ids that is not empty", param)
            check_token_ids(item, param)
    else:
        check_token_ids(value, param)
    return value


def check_token_ids(ids: list[Any], param: str) -> None:
    """Check that each is a whole number of at least 0; booleans and fractions are not.

    Raises:
        APIError: one is not.
    """
    for token_id in ids:
        if type(token_id) is not int or token_id < 0:
            raise invalid(f"{param}: token ids must be whole numbers of 0 or more", param)


class CompletionRequest(SamplingFields):
    """Body of `POST /v1/completions`."""

    prompt: Annotated[Any, BeforeValidator(check_prompt, json_schema_input_type=Prompt)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    """Most tokens to generate; 16 by default. 0 to only process the prompt."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_COMPLETION_LOGPROBS)] | None = None
    """Log probabilities of the generated tokens, and with `echo` of the prompt's tokens."""
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """Extension. Log probabilities of the prompt's tokens, and of this many likeliest tokens at each position."""
    best_of: Annotated[int, Field(ge=1, le=MAX_BEST_OF)] | None = None
    """Answers to generate for each prompt; the `n` with the highest mean log probability per token are returned."""
    echo: bool | None = None
    """Begin each answer with its prompt."""
    suffix: Annotated[Any, Unsupported()] = None
    """Not supported."""

    @model_validator(mode="after")
    def _check_completion(self) -> Self:
        n = self.n or 1
        if self.best_of is not None and self.best_of < n:
            raise invalid("best_of: must be at least n", "best_of")
        if self.best_of is not None and self.best_of > n and self.stream:
            raise invalid("best_of: the best answers are known only at the end; leave out stream", "best_of")
        if self.max_tokens == 0 and (self.stream or self.num_answers > 1):
            raise invalid("max_tokens: 0 gives nothing to stream or to choose from; leave out stream, n and best_of",
                          "max_tokens")  # fmt: skip
        if self.num_prompt_logprobs is not None and self.stream:
            raise invalid("stream: log probabilities of the prompt come only at the end; leave out stream", "stream")
        return self

    @property
    def num_prompt_logprobs(self) -> int | None:
        """How many of the likeliest tokens are requested at each position of the prompt; None for none."""
        asked = [self.prompt_logprobs] if self.prompt_logprobs is not None else []
        asked += [self.logprobs] if self.echo and self.logprobs is not None else []
        return max(asked, default=None)

    @property
    def num_answers(self) -> int:
        """Number of answers to generate for each prompt."""
        return max(self.n or 1, self.best_of or 1)


class TokenizeRequest(ThinkingFields, RequestBody):
    """Body of `POST /tokenize`: a prompt or messages."""

    prompt: str | None = None
    messages: Annotated[Items[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    """With a prompt: add the special tokens that the model's tokenizer adds. True by default."""
    add_generation_prompt: bool | None = None
    """With messages: end with the text that opens the assistant's answer. True by default."""
    continue_final_message: bool | None = None
    """With messages: as in a chat."""
    tools: Annotated[Items[Tool], Field(max_length=MAX_TOOLS)] | None = None
    """With messages: as in a chat, as are the next two and those about thinking."""
    tool_choice: ToolChoice | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None
    """Return each token's text too."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise invalid("give exactly one of prompt and messages", "prompt")
        for name in _OF_CHATS:
            if self.messages is None and getattr(self, name) is not None:
                raise invalid(f"{name}: only with messages", name)
        return self

    @property
    def takes_long(self) -> bool:
        """See `RequestBody`; as in `ChatRequest`."""
        return bool(self.tools or self.chat_template_kwargs) or self.has_thinking_fields

    def to_chat(self) -> ChatRequest:
        """The chat whose prompt is requested; only with messages.

        Raises:
            APIError: a 400 with the field at fault.
        """
        fields = {name: getattr(self, name) for name in ("messages", "add_generation_prompt", *_OF_CHATS)}
        try:
            return ChatRequest.model_validate({"model": self.model or "", **fields})
        except ValidationError as error:
            raise of_validation(error, ChatRequest) from None


_OF_CHATS = (
    "continue_final_message", "tools", "tool_choice", "chat_template_kwargs", *ThinkingFields.model_fields
)  # fmt: skip


def _check_tokens(value: Any) -> Any:
    if not isinstance(value, list):
        raise invalid("tokens: must be a list of token ids", "tokens")
    check_token_ids(value, "tokens")
    return value


class DetokenizeRequest(RequestBody):
    """Body of `POST /detokenize`."""

    tokens: Annotated[Any, BeforeValidator(_check_tokens, json_schema_input_type=list[int])]
