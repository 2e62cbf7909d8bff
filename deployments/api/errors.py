"""Errors on the wire: OpenAI's `{"error": {"message", "type", "param", "code"}}`, or Anthropic's form on its paths."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from pydantic import BaseModel, Field
from starlette.responses import Response

from deployments.chat.errors import INVALID_REQUEST, SERVER_ERROR, APIError, PromptTooLongError

_MESSAGES_PATH = "/v1/messages"
_VERSION_HEADER = b"anthropic-version"
_NO_THREADS = "thread_unsupported_request"
"""From this code Anthropic's clients know that the server keeps no conversation for them, and try again without one."""
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    """The error message, for people."""
    type: str = Field(examples=[INVALID_REQUEST])
    param: str | None = None
    """The request field at fault."""
    code: str | None = Field(default=None, examples=["model_not_found"])
    """The kind of error, for programs."""


class ErrorResponse(BaseModel):
    """Body of every answer that is not a success."""

    error: ErrorDetail


def error_body(error: APIError) -> bytes:
    """The JSON object that OpenAI's clients expect."""
    detail = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    return msgspec.json.encode({"error": detail})


def anthropic_error_body(error: APIError) -> bytes:
    """The JSON object that Anthropic's clients expect: `{"type": "error", "error": {"type", "message"}}`."""
    default = "invalid_request_error" if error.status < 500 else "api_error"
    # There is no field for the name of the field at fault.
    is_named = error.param is None or error.param in error.message
    message = error.message if is_named else f"{error.param}: {error.message}"
    if isinstance(error, PromptTooLongError):
        message = error.anthropic_message
    detail: dict[str, Any] = {"type": _ANTHROPIC_TYPES.get(error.status, default), "message": message}
    if error.param == "thread":
        detail["details"] = {"error_code": _NO_THREADS}
    return msgspec.json.encode({"type": "error", "error": detail})


def is_anthropics(scope: Mapping[str, Any]) -> bool:
    """Whether a request belongs to Anthropic's API: by its path, or by the header that all its clients send."""
    return _MESSAGES_PATH in scope["path"] or any(name == _VERSION_HEADER for name, _ in scope["headers"])


def answer_to(scope: Mapping[str, Any], error: APIError) -> Response:
    """The HTTP answer that tells the client of this request what is wrong, in the format of the API that it uses."""
    note_reason(scope, error)
    body = anthropic_error_body(error) if is_anthropics(scope) else error_body(error)
    return Response(body, error.status, error.headers, media_type="application/json")


_MOST_NAMES = 20
"""Names of models that an error gives."""


def note_reason(scope: Mapping[str, Any], error: APIError) -> None:
    """Note the kind of error, for the audit."""
    if "state" in scope:
        scope["state"]["reason"] = error.code or error.type


def model_not_found(name: str, names: Sequence[str] = ()) -> APIError:
    """The error for a request that names another model than those that there are for its API key.

    Args:
        name: what it names.
        names: the models' names, as far as this client may know them.
    """
    there = ", ".join(names[:_MOST_NAMES]) + (", …" if len(names) > _MOST_NAMES else "")
    known = f"; there is {there}" if names else ""
    message = f"The model {name[:100]!r} does not exist or you do not have access to it{known}"
    return APIError(404, message, param="model", code="model_not_found")


def adapters_loading(name: str) -> APIError:
    """The error for an unknown name while adapters are still being read, one of which may have it."""
    return APIError(
        503, f"There is no model {name[:100]!r} yet, and adapters are still being read; try again in a few seconds",
        type=SERVER_ERROR, param="model", code="adapters_loading", headers={"Retry-After": "3"},
    )  # fmt: skip


def too_many_open() -> APIError:
    """The error for a router that has reached its limit of open requests."""
    return APIError(
        503, "The server has too many open requests; try again in a second", type=SERVER_ERROR, code="overloaded",
        headers={"Retry-After": "1"},
    )  # fmt: skip


def unknown_route(path: str, meant: str | None) -> APIError:
    """The error for a path at which nothing is served.

    Args:
        path: the path.
        meant: the path that the client probably meant; None if it cannot be told.
    """
    hint = f"; did you mean {meant!r}? Check the client's base URL" if meant else "; /docs lists those that there are"
    return APIError(404, f"There is no route {path!r}{hint}", code="unknown_route")


def wrong_method(allowed: str) -> APIError:
    """The error for a method that the path does not support.

    Args:
        allowed: those that it supports.
    """
    message = f"This route does not take this method; it takes {allowed}"
    return APIError(405, message, code="method_not_allowed", headers={"Allow": allowed})
