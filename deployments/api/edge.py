"""The outermost layer: limits on what clients do, and an OpenAI-style answer to whatever goes wrong inside."""

import logging
import time

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.api.answer_headers import add_request_id, with_added_headers
from deployments.api.errors import answer_to, is_anthropics, too_many_open
from deployments.api.send_timeout import SendTimeout
from deployments.api.sse import ClientLeftError
from deployments.chat.errors import APIError, internal
from deployments.config import LimitsConfig

logger = logging.getLogger("ray.serve")


class Edge:
    """ASGI middleware: refuses excessive requests, normalizes paths, and answers exceptions that nothing else answered.

    Args:
        app: everything inside.
        limits: limits on headers, and on how long a client may go without reading its answer.
        max_open_requests: most requests at once; beyond that, requests that ask for work are refused.
    """

    def __init__(self, app: ASGIApp, limits: LimitsConfig, max_open_requests: int) -> None:
        self._app = SendTimeout(app, limits.send_timeout_s)
        self._limits = limits
        self._max_open_requests = max_open_requests
        self._num_open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 431 or 503, or pass the request on and answer what it raises."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = {**scope, "path": plain_path(scope)}
        if is_anthropics(scope):
            add_request_id(scope)
        max_header_bytes = self._limits.max_header_bytes
        if _header_bytes(scope) > max_header_bytes:
            error = APIError(431, f"The headers are larger than {max_header_bytes} bytes", code="headers_too_large")
            await answer_to(scope, error)(scope, receive, send)
            return
        if self._num_open >= self._max_open_requests and scope["method"] == "POST":
            await answer_to(scope, too_many_open())(scope, receive, send)
            return
        scope.setdefault("state", {})["received_at"] = time.monotonic()
        self._num_open += 1
        try:
            await self._answer(scope, receive, send)
        finally:
            self._num_open -= 1

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_started = False

        async def send_and_note(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(with_added_headers(scope, message))

        try:
            await self._app(scope, receive, send_and_note)
        except (ClientLeftError, ClientDisconnect):
            return
        except APIError as error:
            if has_started:
                raise
            await answer_to(scope, error)(scope, receive, send_and_note)
        except Exception:  # the edge of a request: logged in full here, with nothing revealed to the client
            logger.exception("request to %s failed", scope["path"])
            if has_started:
                raise
            await answer_to(scope, internal())(scope, receive, send)


def plain_path(scope: Scope) -> str:
    """The path with single slashes and none at the end. Clients join base addresses and paths carelessly.

    Everything that looks at paths is inside this layer, so all of it sees the same path.
    """
    path: str = scope["path"]
    plain = "/" + "/".join(part for part in path.split("/") if part)
    return plain + "/" if plain == scope.get("root_path") else plain


def _header_bytes(scope: Scope) -> int:
    headers = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
    return headers + len(scope.get("raw_path") or b"") + len(scope.get("query_string") or b"")
