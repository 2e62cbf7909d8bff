"""The lines of a batch's file: what each asks for, and what is wrong with them.

A line is `{"custom_id": "…", "method": "POST", "url": "/v1/chat/completions", "body": {…}}`.
"""

from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from deployments.batches.records import LineFault

MAX_FAULTS = 100
"""Most faults that are listed."""
MAX_CUSTOM_ID_CHARS = 512
_CHUNK_BYTES = 1 << 20
_LINE_OVERHEAD_BYTES = 4096
"""What a line may hold besides its body."""


class _Line(msgspec.Struct):
    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class _Body(msgspec.Struct):
    model: str | None = None
    stream: bool | None = None


class _Anything(msgspec.Struct):
    """A line with any fields, to find out which are missing or of the wrong type."""

    custom_id: Any = msgspec.UNSET
    method: Any = msgspec.UNSET
    url: Any = msgspec.UNSET
    body: Any = msgspec.UNSET


_decode_line = msgspec.json.Decoder(_Line).decode
_decode_body = msgspec.json.Decoder(_Body).decode
_decode_anything = msgspec.json.Decoder(_Anything).decode


@dataclass(frozen=True, slots=True)
class InputLine:
    """Where a line is in its file; `end` is past its last byte."""

    custom_id: str
    start: int
    end: int


@dataclass(slots=True)
class InputLines:
    """All lines of a file in their order, or what is wrong with them."""

    lines: list[InputLine] = field(default_factory=list)
    faults: list[LineFault] = field(default_factory=list)
    models: set[str | None] = field(default_factory=set)
    """The models that lines name; None stands for no name."""

    @property
    def only_model(self) -> str | None:
        """The model that all lines name; None if they name several, or none."""
        return next(iter(self.models)) if len(self.models) == 1 else None


@dataclass(frozen=True, slots=True)
class LineRequest:
    """What a line asks for."""

    model: str | None
    body: bytes


def request_of(line: bytes) -> LineRequest:
    """What a line that has been checked asks for."""
    body = bytes(_decode_line(line).body)
    return LineRequest(_decode_body(body).model, body)


def scan(
    read: Callable[[int, int], bytes], num_bytes: int, *, url: str, max_lines: int, max_body_bytes: int
) -> InputLines:
    """Read and check a whole file. Blocks.

    Args:
        read: gives the bytes from one position up to another.
        num_bytes: size of the file.
        url: what each line's `url` must be.
        max_lines: most lines.
        max_body_bytes: most bytes of a line's body, as for other requests.
    """
    found = InputLines()
    known: dict[str, int] = {}
    max_bytes = max_body_bytes + _LINE_OVERHEAD_BYTES
    for number, (start, line) in enumerate(_split(read, num_bytes, max_bytes), 1):
        if line is not None and not line.strip():
            continue
        if len(found.lines) >= max_lines:
            found.faults.append(
                LineFault("too_many_lines", f"The file has more than {max_lines} lines; split it", number)
            )
            break
        custom_id, model, fault = _check(line, number, url) if line is not None else _too_long(max_bytes, number)
        if fault is None:
            first = known.setdefault(custom_id, number)
            if first != number:
                fault = LineFault("duplicate_custom_id", f"The custom_id is that of line {first}; give each line its "
                                  "own", number, "custom_id")  # fmt: skip
        if fault is None and line is not None:
            found.lines.append(InputLine(custom_id, start, start + len(line)))
            found.models.add(model)
        elif fault is not None:
            found.faults.append(fault)
            if len(found.faults) == MAX_FAULTS:
                break
    if not found.lines and not found.faults:
        found.faults.append(LineFault("empty_file", "The file has no lines; give one request a line"))
    return found


_Checked = tuple[str, str | None, LineFault | None]
"""A line's `custom_id`, the model that it names, and what is wrong with it."""


def _wrong(fault: LineFault) -> _Checked:
    return "", None, fault


def _too_long(max_bytes: int, number: int) -> _Checked:
    return _wrong(LineFault("line_too_long", f"The line is longer than {max_bytes} bytes", number))


def _split(read: Callable[[int, int], bytes], num_bytes: int, max_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """Start and content of each line, without the line break; None for the content of a line that is too long."""
    rest, start, is_skipping = b"", 0, False
    for position in range(0, num_bytes, _CHUNK_BYTES):
        chunk = read(position, min(position + _CHUNK_BYTES, num_bytes))
        if position == 0 and chunk.startswith(BOM_UTF8):
            chunk, start = chunk[len(BOM_UTF8) :], len(BOM_UTF8)
        *lines, tail = (rest + chunk).split(b"\n")
        for line in lines:
            if not is_skipping:
                yield start, line if len(line) <= max_bytes else None
            is_skipping = False
            start += len(line) + 1
        if len(tail) > max_bytes and not is_skipping:
            yield start, None
            is_skipping = True
        if is_skipping:
            start, tail = start + len(tail), b""
        rest = tail
    if rest and not is_skipping:
        yield start, rest


def _check(line: bytes, number: int, url: str) -> _Checked:
    """What a line says of itself, or what is wrong with it."""
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return _wrong(LineFault("invalid_encoding", f"Byte {error.start + 1} of the line is not UTF-8", number))
    try:
        parsed = _decode_line(line)
        body = _decode_body(parsed.body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return _wrong(_describe(line, number))
    if not 1 <= len(parsed.custom_id) <= MAX_CUSTOM_ID_CHARS:
        message = f"custom_id: must have 1 to {MAX_CUSTOM_ID_CHARS} characters"
        return _wrong(LineFault("invalid_custom_id", message, number, "custom_id"))
    if parsed.method != "POST":
        return _wrong(LineFault("invalid_method", "method: must be POST", number, "method"))
    if parsed.url != url:
        return _wrong(LineFault("invalid_url", f"url: must be the batch's endpoint, {url}", number, "url"))
    if body.stream:
        message = "body.stream: must be false; batches are not streamed"
        return _wrong(LineFault("invalid_request", message, number, "body.stream"))
    return parsed.custom_id, body.model, None


def _describe(line: bytes, number: int) -> LineFault:
    """What is wrong with a line that is not as it should be, without repeating it."""
    try:
        found = _decode_anything(line)
    except msgspec.ValidationError:
        return LineFault("invalid_json_line", "The line must be a JSON object", number)
    except (msgspec.DecodeError, RecursionError):
        return LineFault("invalid_json_line", "The line is not valid JSON", number)
    for name in ("custom_id", "method", "url", "body"):
        value = getattr(found, name)
        if value is msgspec.UNSET:
            return LineFault("missing_required_parameter", f"Missing required field {name!r}", number, name)
        wanted, kind = (dict, "an object") if name == "body" else (str, "a string")
        if not isinstance(value, wanted):
            return LineFault("invalid_type", f"{name}: must be {kind}", number, name)
    return LineFault("invalid_type", "body: model must be a string and stream true or false", number, "body")
