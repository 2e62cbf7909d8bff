"""Errors as Anthropic's clients expect them."""

import msgspec

from deployments.chat.errors import APIError

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_body(error: APIError) -> bytes:
    """The JSON object: `{"type": "error", "error": {"type", "message"}}`."""
    default = "invalid_request_error" if error.status < 500 else "api_error"
    # There is no field for the name of the field at fault.
    is_named = error.param is None or error.param in error.message
    message = error.message if is_named else f"{error.param}: {error.message}"
    detail = {"type": _TYPES.get(error.status, default), "message": message}
    return msgspec.json.encode({"type": "error", "error": detail})
