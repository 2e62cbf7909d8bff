"""The outermost layer: limits on headers and bodies, and an OpenAI-shaped answer to whatever goes wrong inside."""

import asyncio
import logging
import time
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.openai.errors import APIError, internal, of_validation
from deployments.openai.sse import ClientLeftError

logger = logging.getLogger("ray.serve")

Body = TypeVar("Body", bound=BaseModel)

_INLINE_BYTES = 32 << 10
"""Bodies up to this size are parsed at once; longer ones in a thread."""


class Edge:
    """ASGI middleware: refuses too many header bytes, and answers exceptions that nothing else answered.

    Args:
        app: everything inside.
        max_header_bytes: names and values of all headers, and the path with its query.
    """

    def __init__(self, app: ASGIApp, max_header_bytes: int) -> None:
        self._app = app
        self._max_header_bytes = max_header_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 431, or pass the request on and answer what it raises."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if _header_bytes(scope) > self._max_header_bytes:
            error = APIError(
                431, f"The headers are larger than {self._max_header_bytes} bytes", code="headers_too_large"
            )
            await error.response()(scope, receive, send)
            return
        scope.setdefault("state", {})["received_at"] = time.monotonic()
        has_started = False

        async def watched_send(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        except (ClientLeftError, ClientDisconnect):
            return
        except APIError as error:
            if has_started:
                raise
            await error.response()(scope, receive, send)
        except Exception:  # the edge of a request: logged in full here, not a word of it to the client
            logger.exception("request to %s failed", scope["path"])
            if has_started:
                raise
            await internal().response()(scope, receive, send)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The request's body, which must be JSON by its content type.

    Raises:
        APIError: 415 for another type or an encoded body, 413 for too many bytes, without reading on.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise APIError(415, "The body must be JSON, sent with Content-Type: application/json", code="unsupported_type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise APIError(415, "Encoded bodies are not supported", code="unsupported_type")
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and (len(declared) > 18 or int(declared) > max_bytes):
        raise _too_large(max_bytes)
    parts: list[bytes] = []
    num_bytes = 0
    async for part in request.stream():
        num_bytes += len(part)
        if num_bytes > max_bytes:
            raise _too_large(max_bytes)
        parts.append(part)
    return b"".join(parts)


async def parse_body(request: Request, model: type[Body], max_bytes: int) -> Body:
    """Read and check a body.

    Raises:
        APIError: what is wrong with it.
    """
    data = await read_body(request, max_bytes)
    if len(data) <= _INLINE_BYTES:
        return validate(model, data)
    return await asyncio.get_running_loop().run_in_executor(None, validate, model, data)


def validate(model: type[Body], data: bytes) -> Body:
    """Check a body that has been read.

    Raises:
        APIError: a 400 that names the field at fault.
    """
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise of_validation(error, model) from None


def _header_bytes(scope: Scope) -> int:
    headers = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
    return headers + len(scope.get("raw_path") or b"") + len(scope.get("query_string") or b"")


def _too_large(max_bytes: int) -> APIError:
    # The rest of the body is still on its way: the connection cannot be used again.
    return APIError(413, f"The body is larger than {max_bytes} bytes", code="body_too_large",
                    headers={"Connection": "close"})  # fmt: skip
