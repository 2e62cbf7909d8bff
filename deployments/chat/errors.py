"""What is wrong with a request, as the APIs report it: a status, a message, and the field at fault. Uses no HTTP
library."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from deployments.chat.wire_model import UNSUPPORTED
from deployments.errors import (
    AccountantAwayError,
    AdapterUnavailableError,
    CatalogAwayError,
    DeadlineError,
    KeyRevokedError,
    NoReplicaError,
    OverloadedError,
    RecordAwayError,
    ShuttingDownError,
    StoreAwayError,
)
from llm.errors import EngineError, InvalidRequestError, LLMError

INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"
CONTEXT_EXCEEDED = "context_length_exceeded"

_MAX_MESSAGE_CHARS = 500


class APIError(Exception):
    """An error with its HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID_REQUEST,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message if len(message) <= _MAX_MESSAGE_CHARS else message[:_MAX_MESSAGE_CHARS] + "…"
        self.type = type
        self.param = param
        self.code = code
        self.headers = dict(headers or {})


class PromptTooLongError(APIError):
    """A prompt that leaves no room for an answer.

    Clients recognize this error by its wording, and shorten the conversation by themselves.

    Args:
        num_tokens: the prompt's length, or "at least" a number.
        most: most tokens that prompt and answer may have together.
        param: the field at fault.

    Attributes:
        anthropic_message: what clients of Anthropic's API look for.
    """

    def __init__(self, num_tokens: str, most: int, param: str) -> None:
        super().__init__(
            400,
            f"This model's maximum context length is {most} tokens, the answer included. However, your prompt has "
            f"{num_tokens} tokens. Shorten it",
            param=param,
            code=CONTEXT_EXCEEDED,
        )
        self.anthropic_message = f"prompt is too long: {num_tokens} tokens > {most} maximum"


def invalid(message: str, param: str | None = None, code: str | None = None) -> APIError:
    """The error for an invalid request."""
    return APIError(400, message, param=param, code=code)


def unsupported(param: str, what: str | None = None) -> APIError:
    """The error for a field that would change the answer and that this server does not support."""
    return APIError(400, f"{what or param} is not supported by this server", param=param, code="unsupported_parameter")


def not_ready() -> APIError:
    """The error for a request that arrives before any engine has reported."""
    return APIError(
        503, "The model is still loading; try again in a few seconds", type=SERVER_ERROR, code="model_loading",
        headers={"Retry-After": "5"},
    )  # fmt: skip


def internal() -> APIError:
    """The error for something that should not happen."""
    return APIError(500, "The server failed to answer this request", type=SERVER_ERROR, code="internal_error")


def of_engine(error: LLMError) -> APIError:
    """The error that a client gets for an engine's or tokenizer's error."""
    if isinstance(error, InvalidRequestError):
        return invalid(str(error), error.param, error.code)
    if isinstance(error, OverloadedError):
        return APIError(
            429, str(error), type="rate_limit_error", code="rate_limit_exceeded",
            headers={"Retry-After": str(math.ceil(error.retry_after_s))},
        )  # fmt: skip
    if isinstance(error, NoReplicaError):
        return APIError(503, str(error), type=SERVER_ERROR, code="no_replica", headers={"Retry-After": "10"})
    if isinstance(error, ShuttingDownError):
        return APIError(503, str(error), type=SERVER_ERROR, code="shutting_down", headers={"Retry-After": "10"})
    if isinstance(error, AccountantAwayError):
        return APIError(503, str(error), type=SERVER_ERROR, code="limits_unavailable", headers={"Retry-After": "2"})
    if isinstance(error, AdapterUnavailableError):
        return APIError(
            503, str(error), type=SERVER_ERROR, param="model", code=error.code, headers={"Retry-After": "3"}
        )
    if isinstance(error, CatalogAwayError):
        message = f"The list of adapters cannot be reached at the moment: {error}"
        return APIError(503, message, type=SERVER_ERROR, code="adapters_unavailable", headers={"Retry-After": "2"})
    if isinstance(error, StoreAwayError):
        message = f"Stored responses cannot be reached at the moment: {error}"
        return APIError(503, message, type=SERVER_ERROR, code="store_unavailable", headers={"Retry-After": "2"})
    if isinstance(error, RecordAwayError):
        message = f"The record of usage cannot be reached at the moment: {error}"
        return APIError(503, message, type=SERVER_ERROR, code="usage_unavailable", headers={"Retry-After": "2"})
    if isinstance(error, KeyRevokedError):
        return APIError(401, str(error), code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
    if isinstance(error, DeadlineError):
        return APIError(504, str(error), type=SERVER_ERROR, code="deadline_exceeded")
    if isinstance(error, EngineError):
        return APIError(500, str(error), type=SERVER_ERROR, code="engine_error")
    return APIError(500, "The server failed to answer this request", type=SERVER_ERROR)


@contextmanager
def in_words_of(fields: Mapping[str, str]) -> Iterator[None]:
    """Report what is wrong with a chat made from another API's request, with that API's field names.

    Args:
        fields: maps patterns of a chat's field, such as `messages.*`, to the other API's field.

    Raises:
        APIError: the body of the `with` raised it, or an `InvalidRequestError`.
    """
    try:
        yield
    except (APIError, InvalidRequestError) as raised:
        error = of_engine(raised) if isinstance(raised, InvalidRequestError) else raised
        old = error.param
        for pattern, replacement in fields.items():
            if old is not None and re.fullmatch(pattern, old):
                error.param = re.sub(f"^{pattern}$", replacement, old)
                error.message = error.message.replace(old, error.param)
                break
        raise error from None


def of_validation(error: ValidationError, model: type[BaseModel]) -> APIError:
    """The first thing that is wrong with a body, without repeating the body."""
    first = _first_of(error.errors(include_url=False, include_input=False, include_context=True))
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, APIError):
        return cause
    if first["type"] == "json_invalid":
        return invalid(f"The body is not valid JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
    param = _param(first["loc"])
    if first["type"] == "model_type":
        return invalid(f"{param}: must be an object" if param else "The body must be a JSON object", param)
    if first["type"] == UNSUPPORTED and param is not None:
        return unsupported(param)
    if first["type"] == "extra_forbidden":
        key = str(first["loc"][-1])[:80]
        hint = _nearest(key, model, first["loc"])
        return invalid(f"Unknown field {key!r}{hint}", param[:80] if param else None, "unknown_parameter")
    if first["type"] == "missing":
        return invalid(f"Missing required field {param!r}", param, "missing_required_parameter")
    message = first["msg"].removeprefix("Value error, ")
    return invalid(f"{param}: {message}" if param else message, param)


def _first_of(found: list[ErrorDetails]) -> ErrorDetails:
    """The first error; if a value may have several forms, the first of the form that fits it best: whose errors lie
    deepest, or are not about the value's type."""
    *place, form = found[0]["loc"] or ("",)
    if form not in _TYPE_NAMES:
        return found[0]
    same = [error for error in found if error["loc"][: len(place)] == tuple(place)]
    return max(same, key=lambda error: (len(error["loc"]), not error["type"].endswith("_type")))


def _nearest(key: str, model: type[BaseModel], loc: Sequence[int | str]) -> str:
    near = get_close_matches(key, model.model_fields, n=1) if len(loc) == 1 else []
    return f"; did you mean {near[0]!r}?" if near else ""


def _param(loc: Sequence[int | str]) -> str | None:
    """`messages[0].content` for pydantic's `("messages", 0, "content", "str")`."""
    name = ""
    for part in loc:
        if isinstance(part, int):
            name += f"[{part}]"
        elif part in _TYPE_NAMES or "[" in part or "(" in part:
            continue
        else:
            name += f".{part}" if name else part
    return name or None


_TYPE_NAMES = frozenset({"str", "int", "float", "bool", "none", "dict", "list", "[key]"})
