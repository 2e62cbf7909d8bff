"""Errors in the words of the API that was asked."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from deployments.api.anthropic.errors import error_response
from deployments.api.errors import APIError

_MESSAGES_PATH = "/v1/messages"


def answer_to(scope: Mapping[str, Any], error: APIError) -> Response:
    """The HTTP answer that tells the client of this request what is wrong."""
    return error_response(error) if _MESSAGES_PATH in scope["path"] else error.response()
