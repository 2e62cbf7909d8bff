"""The outermost layer: limits on what clients do, and an OpenAI-shaped answer to whatever goes wrong inside."""

import asyncio
import logging
import time

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.api.errors import answer_to, too_many_open
from deployments.api.sse import ClientLeftError
from deployments.chat.errors import APIError, internal
from deployments.config import LimitsConfig

logger = logging.getLogger("ray.serve")


class Edge:
    """ASGI middleware: refuses what is too much, and answers exceptions that nothing else answered.

    Args:
        app: everything inside.
        limits: on headers, and on how long a client may take nothing of its answer.
        max_open_requests: requests at once; of the rest, those that want work done are refused.
    """

    def __init__(self, app: ASGIApp, limits: LimitsConfig, max_open_requests: int) -> None:
        self._app = app
        self._limits = limits
        self._max_open_requests = max_open_requests
        self._open: set[_Sender] = set()
        self._sweeper: asyncio.TimerHandle | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 431 or 503, or pass the request on and answer what it raises."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        max_header_bytes = self._limits.max_header_bytes
        if _header_bytes(scope) > max_header_bytes:
            error = APIError(431, f"The headers are larger than {max_header_bytes} bytes", code="headers_too_large")
            await answer_to(scope, error)(scope, receive, send)
            return
        if len(self._open) >= self._max_open_requests and scope["method"] == "POST":
            await answer_to(scope, too_many_open())(scope, receive, send)
            return
        scope.setdefault("state", {})["received_at"] = time.monotonic()
        sender = _Sender(send)
        self._open.add(sender)
        if self._sweeper is None:
            self._sweep()
        try:
            await self._answer(scope, receive, sender)
        except asyncio.CancelledError:
            if not sender.was_cut_off:
                raise
            sender.task.uncancel()
            logger.warning("a client of %s took nothing for %g s and was cut off",
                           scope["path"], self._limits.send_timeout_s)  # fmt: skip
        finally:
            self._open.discard(sender)

    async def _answer(self, scope: Scope, receive: Receive, sender: "_Sender") -> None:
        try:
            await self._app(scope, receive, sender)
        except (ClientLeftError, ClientDisconnect):
            return
        except APIError as error:
            if sender.num_started:
                raise
            await answer_to(scope, error)(scope, receive, sender)
        except Exception:  # the edge of a request: logged in full here, not a word of it to the client
            logger.exception("request to %s failed", scope["path"])
            if sender.num_started:
                raise
            await answer_to(scope, internal())(scope, receive, sender)

    def _sweep(self) -> None:
        """Cut off the clients that took nothing since the last sweep, as long as there are requests."""
        for sender in self._open:
            sender.cut_off_if_stuck()
        loop = asyncio.get_running_loop()
        self._sweeper = loop.call_later(self._limits.send_timeout_s, self._sweep) if self._open else None


class _Sender:
    """Sends one answer; knows whether its client takes it.

    One sweep now and then looks at all of them, because a timer for each event of a stream would cost as much as the
    event.
    """

    def __init__(self, send: Send) -> None:
        self.num_started = 0
        self.was_cut_off = False
        self._send = send
        self._num_sent = 0
        self._num_sent_last = -1
        task = asyncio.current_task()
        assert task is not None, "ASGI applications run in tasks"
        self.task = task

    async def __call__(self, message: Message) -> None:
        """Send; this waits while the connection's buffer is full."""
        self.num_started += 1
        await self._send(message)
        self._num_sent += 1

    def cut_off_if_stuck(self) -> None:
        """Cancel the request if it has been sending the same message since the last call."""
        is_sending = self.num_started > self._num_sent
        if is_sending and self._num_sent == self._num_sent_last:
            self.was_cut_off = True
            self.task.cancel()
        self._num_sent_last = self._num_sent if is_sending else -1


def _header_bytes(scope: Scope) -> int:
    headers = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
    return headers + len(scope.get("raw_path") or b"") + len(scope.get("query_string") or b"")
