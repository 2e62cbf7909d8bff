"""Requests that the server makes to its own API on behalf of an API key, such as the lines of a batch.

They take the whole way of a request that came through a socket, with the same limits, checks and errors.
"""

import asyncio
import logging
import os
import secrets
import socket

from starlette.types import ASGIApp, Message, Scope

from deployments.api.callers import REQUEST_ID_HEADER
from deployments.api.errors import error_body
from deployments.api.on_behalf import OnBehalf, mark
from deployments.batches.calls import LineAnswer
from deployments.batches.desk import BatchDesk
from deployments.batches.idle import IdleCapacity
from deployments.batches.runner import BatchRunner
from deployments.chat.errors import internal
from deployments.router.directory import ModelDirectory

logger = logging.getLogger("ray.serve")


class InProcessCalls:
    """`LineCalls` into an ASGI application of this process.

    Args:
        app: the whole application, with everything around its routes.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def call(self, owner: str, url: str, body: bytes, request_id: str) -> LineAnswer:
        """See `LineCalls.call`."""
        scope = _scope(url, len(body), request_id)
        mark(scope, OnBehalf(owner))
        answer = _Answer(body)
        try:
            await self._app(scope, answer.receive, answer.send)
        except Exception:  # the edge of a request: other lines go on
            logger.exception("a line of a batch failed")
            return LineAnswer(500, error_body(internal()))
        return LineAnswer(answer.status, b"".join(answer.parts), answer.retry_after_s)


class _Answer:
    """Both ends of one request."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self.status = 500
        self.parts: list[bytes] = []
        self.retry_after_s: float | None = None
        self._was_sent = False

    async def receive(self) -> Message:
        """The body, and then nothing: this client stays until it is cancelled."""
        if self._was_sent:
            await asyncio.Event().wait()
        self._was_sent = True
        return {"type": "http.request", "body": self._body, "more_body": False}

    async def send(self, message: Message) -> None:
        """Take a part of the answer."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = {name.lower(): value for name, value in message.get("headers", ())}
            given = headers.get(b"retry-after", b"").decode("latin-1")
            self.retry_after_s = float(given) if given.isascii() and given.isdigit() else None
        else:
            self.parts.append(message.get("body", b""))


def create_runner(desk: BatchDesk, app: ASGIApp, directory: ModelDirectory) -> BatchRunner:
    """What runs batches on a router, through its own HTTP application.

    Args:
        desk: the store.
        app: the whole application.
        directory: the models.
    """
    name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"  # for people; the last part makes it unique
    max_body_bytes = directory.platform.limits.max_body_bytes
    runner = BatchRunner(desk, InProcessCalls(app), IdleCapacity(directory), name, max_body_bytes)
    directory.batches = runner
    return runner


def _scope(url: str, num_bytes: int, request_id: str) -> Scope:
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(num_bytes).encode()),
        (REQUEST_ID_HEADER.lower().encode(), request_id.encode()),
    ]
    return {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": url, "raw_path": url.encode(), "root_path": "", "query_string": b"",
        "headers": headers, "client": None, "server": None, "state": {},
    }  # fmt: skip
