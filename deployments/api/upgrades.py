"""Answers requests that offer another protocol besides HTTP/1.1 over HTTP/1.1, as RFC 9110 (section 7.8) allows.

Java's own HTTP client offers `Upgrade: h2c` with its first request on each connection. httptools takes the body of such
a request for the beginning of the other protocol: uvicorn then runs the application without a body, or reads the body
as the next request. HAProxy removes the offer; this module does so if uvicorn itself talks to the client.
"""

from array import array
from typing import Any

import httptools
import uvicorn.config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_OFFER = (b"upgrade", b"http2-settings")


class PlainHttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol, but it ignores offers that nobody accepts. WebSockets are left to uvicorn."""

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
        if not self.declines:
            super().on_headers_complete()

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


def decline_upgrades() -> None:
    """Make uvicorn servers that this process starts from now on decline offers, unless they name a protocol
    themselves."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{PlainHttpProtocol.__name__}"
