"""Cuts off clients that do not read their answers. Whatever is in front of the router, the data that waits for such a
client is bounded, and its generation ends.

Two processes use this. A router does if it talks directly to the client, or to HAProxy, which passes backpressure on.
Behind Ray Serve's own proxy a router's `send` never waits, because the proxy buffers the answer for the client. The
proxy therefore does the same as the router; set `PROXY_VARIABLES` in the environment in which Ray is started.
"""

import asyncio
import logging
import os
import socket
from contextlib import suppress

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.api.upgrades import decline_upgrades

logger = logging.getLogger("ray.serve")

TIMEOUT_VARIABLE = "RAYLINE_PROXY_SEND_TIMEOUT_S"
_DEFAULT_TIMEOUT_S = 25.0
_SWEEPS = 5
"""How many checks a client may fail to read through before it is cut off."""
SEND_BUFFER_BYTES = 128 << 10
"""The most that the kernel buffers for a client that does not read. By default it is megabytes: minutes of a stream."""


class SendTimeout:
    """ASGI middleware that ends a request whose client does not read its answer.

    A periodic sweep checks all requests, because a timer for each event of a stream would cost as much as the event.

    Args:
        app: everything inside. It is cancelled when the client is cut off.
        timeout_s: how long a client may go without reading; noticing it may take up to a fifth longer.
    """

    def __init__(self, app: ASGIApp, timeout_s: float) -> None:
        self._app = app
        self._timeout_s = timeout_s
        self._open: set[_Sender] = set()
        self._sweeper: asyncio.TimerHandle | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and end it if its client is stuck."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        _bound_send_buffer(send)
        sender = _Sender(send)
        self._open.add(sender)
        if self._sweeper is None:
            self._sweep()
        try:
            await self._app(scope, receive, sender)
        except asyncio.CancelledError:
            if not sender.was_cut_off:
                raise
            sender.task.uncancel()
        finally:
            self._open.discard(sender)
            if sender.was_cut_off:
                logger.warning("a client of %s took nothing for %g s and was cut off", scope["path"], self._timeout_s)

    def _sweep(self) -> None:
        """While there are requests, cut off the clients that read nothing during the last sweeps."""
        for sender in self._open:
            sender.cut_off_if_stuck()
        loop = asyncio.get_running_loop()
        self._sweeper = loop.call_later(self._timeout_s / _SWEEPS, self._sweep) if self._open else None


def _bound_send_buffer(send: Send) -> None:
    """Have the kernel buffer little for this client. ASGI has no connections, but uvicorn's `send` belongs to one."""
    transport = getattr(getattr(send, "__self__", None), "transport", None)
    connection = transport.get_extra_info("socket") if transport is not None else None
    if connection is None:
        return
    with suppress(OSError):  # it has already gone
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)


class _Sender:
    """Sends one answer and knows whether its client reads it."""

    def __init__(self, send: Send) -> None:
        self.was_cut_off = False
        self._send = send
        self._num_started = 0
        self._num_sent = 0
        self._num_sent_last = -1
        self._num_sweeps_stuck = 0
        task = asyncio.current_task()
        assert task is not None, "ASGI applications run in tasks"
        self.task = task

    async def __call__(self, message: Message) -> None:
        """Send a message; this waits while the connection's buffer is full."""
        self._num_started += 1
        await self._send(message)
        self._num_sent += 1

    def cut_off_if_stuck(self) -> None:
        """Cancel the request if it has been sending the same message for `_SWEEPS` calls after the first."""
        is_sending = self._num_started > self._num_sent
        if is_sending and self._num_sent == self._num_sent_last:
            self._num_sweeps_stuck += 1
        else:
            self._num_sweeps_stuck = 0
        self._num_sent_last = self._num_sent if is_sending else -1
        if self._num_sweeps_stuck == _SWEEPS:
            self.was_cut_off = True
            self.task.cancel()


def proxy_middlewares() -> list[Middleware]:
    """The middleware that Ray Serve's proxy puts around every request; Serve calls this before its HTTP server
    starts."""
    decline_upgrades()
    timeout_s = float(os.environ.get(TIMEOUT_VARIABLE, _DEFAULT_TIMEOUT_S))
    return [Middleware(SendTimeout, timeout_s=timeout_s)]


PROXY_VARIABLES = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{proxy_middlewares.__module__}:{proxy_middlewares.__name__}",
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "30",
}
"""Set these where Ray is started, so that Serve's proxy, or HAProxy, cuts off clients too. For HAProxy see also
`deployments.serve.haproxy`: by default the kernel buffers megabytes for a client before HAProxy notices anything."""
