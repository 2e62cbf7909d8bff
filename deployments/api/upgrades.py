"""Answers requests that offer another protocol besides HTTP/1.1 over HTTP/1.1, as RFC 9110 (section 7.8) allows.

Java's own HTTP client offers `Upgrade: h2c` with its first request on each connection. httptools takes the body of such
a request for the beginning of the other protocol: uvicorn then runs the application without a body, or reads the body
as the next request. HAProxy removes the offer; this module does so if uvicorn itself talks to the client.

It also answers clients of HTTP/1.0 without chunks, which they do not know.
"""

from array import array
from typing import Any

import httptools
import uvicorn.config
from uvicorn._types import ASGISendEvent
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

_OFFER = (b"upgrade", b"http2-settings")


class PlainHttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol, but it ignores offers that nobody accepts, and sends no chunks to clients of HTTP/1.0.
    WebSockets are left to uvicorn."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.parser = _Parser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own parser

    @property
    def declines(self) -> bool:
        """Whether the request whose headers have just been read offers a protocol that is not accepted here."""
        if not self.parser.should_upgrade():
            return False
        offered = [value.lower() for name, value in self.headers if name == b"upgrade"]
        return bool(offered) and b"websocket" not in offered

    def head_without_offer(self) -> bytes:
        """The head of the request just read, as it would be without the offer."""
        lines = [self.parser.get_method() + b" " + self.url + b" HTTP/" + self.parser.get_http_version().encode()]
        for name, value in self.headers:
            if name == b"connection":
                words = [word.strip() for word in value.split(b",")]
                value = b", ".join(word for word in words if word.lower() not in _OFFER)
                if not value:
                    continue
            if name not in _OFFER:
                lines.append(name + b": " + value)
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def on_headers_complete(self) -> None:
        """Start the application, unless the head is about to be read again."""
        if self.declines:
            return
        super().on_headers_complete()
        if self.cycle is not None and self.scope["http_version"] == "1.0":
            _leave_out_chunks(self.cycle)

    def on_message_complete(self) -> None:
        """End the body, unless the head is about to be read again."""
        if not self.declines:
            super().on_message_complete()


class _Parser(httptools.HttpRequestParser):
    """If an offer is declined, reads the same head again without the offer, and then continues."""

    def __init__(self, protocol: PlainHttpProtocol) -> None:
        super().__init__(protocol)
        self._protocol = protocol

    def feed_data(self, data: "bytes | bytearray | memoryview | array[int]") -> None:
        """Read the data that has arrived.

        Raises:
            HttpParserError: it is not HTTP.
            HttpParserUpgrade: a WebSocket begins.
        """
        while True:
            try:
                super().feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                if not self._protocol.declines:
                    raise
                data = self._protocol.head_without_offer() + bytes(data)[upgrade.args[0] :]


def _leave_out_chunks(cycle: RequestResponseCycle) -> None:
    """Have an answer without a length end with the connection, as HTTP/1.0 has it; uvicorn would send it in chunks,
    which RFC 9112 (section 6.1) forbids because such a client takes their sizes for text."""
    send = cycle.send
    is_open_ended = False

    async def send_plain(message: ASGISendEvent) -> None:
        nonlocal is_open_ended
        if message["type"] == "http.response.start":
            is_open_ended = all(name.lower() != b"content-length" for name, _ in message.get("headers", ()))
            cycle.chunked_encoding = False if is_open_ended else None
        elif is_open_ended and message["type"] == "http.response.body":
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    cycle.send = send_plain  # type: ignore[method-assign]


def decline_upgrades() -> None:
    """Make uvicorn servers that this process starts from now on decline offers, unless they name a protocol
    themselves."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{PlainHttpProtocol.__name__}"
