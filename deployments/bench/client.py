"""An HTTP client for streamed answers of OpenAI-compatible servers that adds next to nothing to what it measures.

Bytes are stamped in the transport's callback, before any task is woken, and parsed with `httptools` (Node's llhttp) and
typed `msgspec` decoders. Why not with aiohttp or httpx: docs/benchmarking.md has the numbers.
"""

import asyncio
import socket
import ssl
import time
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

import httptools
import msgspec

from deployments.bench.records import RequestRecord
from deployments.bench.stream import AnswerReader

_MAX_ERROR_BODY = 65_536
_MAX_EXAMPLE_CHARS = 300


class TargetError(ValueError):
    """The server cannot be reached as asked; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go.

    Attributes:
        url: the API's base, such as `http://127.0.0.1:8000/v1`.
        path: path below the base, such as `/completions`.
        api_key: sent as a bearer token if given; left out of `repr`.
    """

    url: str
    path: str
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise TargetError(f"--url {self.url!r}: give the API's base, such as http://127.0.0.1:8000/v1")

    @property
    def host(self) -> str:
        """Name or address of the server."""
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        """The URL's port, or its scheme's."""
        return urlsplit(self.url).port or (443 if self.is_tls else 80)

    @property
    def is_tls(self) -> bool:
        """Whether the connection is encrypted."""
        return urlsplit(self.url).scheme == "https"

    def request_head(self) -> bytes:
        """Request line and headers but for the content's length."""
        path = urlsplit(self.url).path.rstrip("/") + self.path
        key = f"Authorization: Bearer {self.api_key}\r\n" if self.api_key else ""
        return (
            f"POST {path} HTTP/1.1\r\nHost: {urlsplit(self.url).netloc.rpartition('@')[2]}\r\n{key}"
            "Content-Type: application/json\r\nAccept: text/event-stream\r\nUser-Agent: rayline-bench\r\n"
        ).encode("latin-1")

    def resolve(self) -> str:
        """An address of the server that takes connections, so that names are looked up once and not in the measurement.

        Raises:
            TargetError: there is none.
        """
        reasons = []
        try:
            addresses = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise TargetError(f"--url {self.url}: {self.host!r} is not a known host ({error})") from error
        for *_, address in addresses:
            try:
                with socket.create_connection((str(address[0]), self.port), timeout=10):
                    return str(address[0])
            except OSError as error:
                reasons.append(str(error))
        raise TargetError(f"--url {self.url}: nothing answers there ({'; '.join(reasons)}); is the server running?")


class StreamCutError(ConnectionError):
    """The connection ended in the middle of a streamed answer."""


class _ErrorDetail(msgspec.Struct, gc=False):
    message: str = ""


class _ErrorBody(msgspec.Struct, gc=False):
    error: _ErrorDetail | str = ""
    message: str = ""


_decode_error = msgspec.json.Decoder(_ErrorBody).decode


class _Connection(asyncio.Protocol):
    """One connection; one request at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self.num_exchanges = 0
        self.is_reusable = True
        self._loop = asyncio.get_running_loop()
        self._reset()

    def _reset(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._reader: AnswerReader | None = None
        self._end: asyncio.Future[None] | None = None
        self._received_at = 0.0
        self.has_answer = False
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.error_body = b""

    async def exchange(self, request: bytes, reader: AnswerReader) -> None:
        """Send a request and feed its answer to `reader`; where the status is not 200, the body is in `error_body`.

        Raises:
            ConnectionError: the connection ended before the answer did.
        """
        self._reset()
        self.num_exchanges += 1
        self.is_reusable = False
        self._reader = reader
        self._end = self._loop.create_future()
        self.transport.write(request)
        await self._end

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._received_at = time.monotonic()
        self.has_answer = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.transport.abort()
            self._finish(ConnectionError(f"not HTTP: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_reusable = False
        if self._end is None or self._end.done():
            return
        has_length = b"content-length" in self.headers or b"transfer-encoding" in self.headers
        if (self.status and not has_length) or (self._reader is not None and self._reader.is_done):
            self._finish(None)
            return
        kind = StreamCutError if self.status == 200 else ConnectionError
        self._finish(kind(f"the connection ended before the answer did: {exc or 'closed by the server'}"))

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self.status == 200:
            assert self._reader is not None
            self._reader.feed(body, self._received_at)
        elif len(self.error_body) < _MAX_ERROR_BODY:
            self.error_body += body

    def on_message_complete(self) -> None:
        self.is_reusable = self._parser.should_keep_alive()
        self._finish(None)

    def _finish(self, error: Exception | None) -> None:
        if self._end is None or self._end.done():
            return
        if error is None:
            self._end.set_result(None)
        else:
            self._end.set_exception(error)


class Client:
    """Sends requests and times their answers; connections are kept and used again, as the OpenAI libraries do.

    Use it within one event loop.

    Args:
        target: the server.
        address: what `Target.resolve` returned.
        timeout_s: longest time for one answer.
    """

    def __init__(self, target: Target, address: str, timeout_s: float) -> None:
        self._target = target
        self._address = address
        self._timeout_s = timeout_s
        self._head = target.request_head()
        self._ssl = ssl.create_default_context() if target.is_tls else None
        self._idle: list[_Connection] = []

    async def send(self, index: int, body: bytes, num_input_tokens: int) -> RequestRecord:
        """Send a request and read its answer to the end. Whatever goes wrong is in the record; nothing is raised.

        The record's points in time are on the monotonic clock.

        Args:
            index: kept in the record.
            body: JSON of the request.
            num_input_tokens: kept in the record unless the server counts.
        """
        record = RequestRecord(index=index, sent_s=time.monotonic(), num_input_tokens=num_input_tokens)
        reader = AnswerReader()
        request = self._head + b"Content-Length: %d\r\n\r\n" % len(body) + body
        connection = None
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = await self._exchange(request, reader)
        except TimeoutError:
            record.error_kind, record.error_example = "timeout", f"no whole answer within {self._timeout_s:g} s"
        except OSError as error:
            record.error_kind = "stream cut" if isinstance(error, StreamCutError) else type(error).__name__
            record.error_example = str(error)[:_MAX_EXAMPLE_CHARS]
        else:
            if connection.status != 200:
                _refuse(record, connection)
        record.ended_s = time.monotonic()
        reader.complete(record)
        return record

    def close(self) -> None:
        """Close the connections that are idle."""
        for connection in self._idle:
            connection.transport.abort()
        self._idle.clear()

    async def _exchange(self, request: bytes, reader: AnswerReader) -> _Connection:
        while True:
            connection = await self._connect()
            try:
                await connection.exchange(request, reader)
            except ConnectionError:
                # A server may close a kept connection just as it is used again: then the request has not been read.
                if connection.has_answer or connection.num_exchanges == 1:
                    raise
                continue
            finally:
                if connection.is_reusable:
                    self._idle.append(connection)
                else:
                    connection.transport.abort()
            return connection

    async def _connect(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_reusable and not connection.transport.is_closing():
                return connection
        loop = asyncio.get_running_loop()
        name = self._target.host if self._ssl is not None else None
        _, connection = await loop.create_connection(
            _Connection, self._address, self._target.port, ssl=self._ssl, server_hostname=name
        )
        return connection


def _refuse(record: RequestRecord, connection: _Connection) -> None:
    """Write an answer that is an error into the record."""
    record.error_kind = f"HTTP {connection.status}"
    try:
        body = _decode_error(connection.error_body)
        detail = body.error.message if isinstance(body.error, _ErrorDetail) else body.error
        message = detail or body.message
    except msgspec.DecodeError:
        message = ""
    text = message or connection.error_body.decode(errors="replace").strip() or "no body"
    record.error_example = text[:_MAX_EXAMPLE_CHARS]
    if connection.status == 429 and b"retry-after" in connection.headers:
        record.retry_after_s = _seconds(connection.headers[b"retry-after"])


def _seconds(retry_after: bytes) -> float:
    """The header's number; one second where it is a date, which nobody sends for a queue."""
    try:
        return max(float(retry_after), 0.0)
    except ValueError:
        return 1.0
