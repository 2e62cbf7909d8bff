"""Files that clients send as `multipart/form-data`: passed on as they arrive, never held as a whole."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from deployments.chat.errors import APIError, invalid

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

_MAX_FIELDS, _MAX_FIELD_BYTES = 16, 4096
_FORM = b"multipart/form-data"


@dataclass(slots=True)
class Form:
    """What came besides the file's content.

    Attributes:
        filename: what the client calls the file; None if there was no file.
        fields: the other fields.
    """

    filename: str | None = None
    fields: dict[str, str] = field(default_factory=dict)


async def read_form(request: Request, write: Callable[[bytes], Awaitable[None]], timeout_s: float) -> Form:
    """Read a form with one file in its field `file`.

    Args:
        request: its body has not been read.
        write: takes the file's content, bit by bit.
        timeout_s: how long the client may send nothing.

    Raises:
        APIError: 415 for another content type, 408 if the client stops sending, 400 for anything wrong with the form.
    """
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != _FORM or not options.get(b"boundary"):
        raise APIError(415, "The body must be a form with a file, sent as multipart/form-data", code="unsupported_type")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise APIError(415, "A form must be sent without a Content-Encoding", code="unsupported_type")
    reader = _FormReader()
    try:
        parser = MultipartParser(options[b"boundary"], reader.callbacks())
        chunks = request.stream()
        while (chunk := await _next(anext(chunks, None), timeout_s)) is not None:
            parser.write(chunk)
            if content := reader.take_content():
                await write(content)
        parser.finalize()
    except MultipartParseError as error:
        raise invalid(f"The form is not valid: {error}") from None
    if not reader.is_complete:
        raise invalid("The form ends in the middle; send it again")
    return reader.form


async def _next(chunk: Awaitable[bytes | None], timeout_s: float) -> bytes | None:
    try:
        async with asyncio.timeout(timeout_s):
            return await chunk
    except TimeoutError:
        raise APIError(408, f"Nothing of the body was sent for {timeout_s:g} s", code="body_timeout",
                       headers={"Connection": "close"}) from None  # fmt: skip


class _FormReader:
    """Sorts what the parser finds."""

    def __init__(self) -> None:
        self.form = Form()
        self.is_complete = False
        self._content: list[bytes] = []
        self._header_name = b""
        self._header_value = b""
        self._headers: dict[bytes, bytes] = {}
        self._name = ""
        self._is_file = False
        self._value = b""

    def callbacks(self) -> "MultipartCallbacks":
        """What the parser calls."""
        return {
            "on_part_begin": self._begin, "on_header_field": self._on_header_name,
            "on_header_value": self._on_header_value, "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers, "on_part_data": self._on_data, "on_part_end": self._on_end,
            "on_end": self._on_form_end,
        }  # fmt: skip

    def take_content(self) -> bytes:
        """The file's content since the last call."""
        content, self._content = b"".join(self._content), []
        return content

    def _begin(self) -> None:
        self._headers, self._value, self._name, self._is_file = {}, b"", "", False

    def _on_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name = self._header_value = b""

    def _on_headers(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._name = options.get(b"name", b"").decode(errors="replace")
        self._is_file = self._name == "file"
        if self._is_file:
            if self.form.filename is not None:
                raise invalid("file: send one file at a time", "file")
            self.form.filename = options.get(b"filename", b"").decode(errors="replace")

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._content.append(data[start:end])
            return
        self._value += data[start:end]
        if len(self._value) > _MAX_FIELD_BYTES:
            raise invalid(f"{self._name[:80]}: at most {_MAX_FIELD_BYTES} bytes", self._name[:80])

    def _on_end(self) -> None:
        if self._is_file:
            return
        self.form.fields[self._name] = self._value.decode(errors="replace")
        if len(self.form.fields) > _MAX_FIELDS:
            raise invalid(f"The form has more than {_MAX_FIELDS} fields")

    def _on_form_end(self) -> None:
        self.is_complete = True
