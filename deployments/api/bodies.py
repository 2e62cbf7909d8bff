"""Bodies of requests: read up to a size, bounded in how many values they hold, parsed and checked.

The parser holds Python's interpreter lock for its whole call, so that nothing else runs beside it, on whatever thread
it is called. How long it takes depends on the number of values, far more than on their size; that is why it is bounded.
"""

import asyncio
from typing import Any, TypeVar

import numpy as np
from pydantic import ValidationError
from pydantic_core import from_json
from starlette.requests import Request

from deployments.chat.errors import APIError, invalid, of_validation
from deployments.chat.wire_model import RequestBody
from deployments.config import LimitsConfig

Body = TypeVar("Body", bound=RequestBody)

MAX_VALUES = 300_000
"""Numbers, strings and so on in one body; enough for two prompts of 128,000 token ids."""
MAX_STRUCTURE = 65_536
"""Objects, arrays and keys in one body."""
MAX_KEYS = 2_048
"""Keys of one object."""
_SLICE_BYTES = 1 << 18


async def read_body(request: Request, limits: LimitsConfig) -> bytes:
    """The request's body, which must be JSON by its content type.

    Raises:
        APIError: 415 for another type or an encoded body, 413 for too many bytes, without reading on, 408 if the client
            takes too long to send it.
    """
    max_bytes = limits.max_body_bytes
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise APIError(415, "The body must be JSON, sent with Content-Type: application/json", code="unsupported_type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise APIError(415, "Encoded bodies are not supported", code="unsupported_type")
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and (len(declared) > 18 or int(declared) > max_bytes):
        raise _too_large(max_bytes)
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            return await _read_up_to(request, max_bytes)
    except TimeoutError:
        raise APIError(408, f"The body was not sent within {limits.body_timeout_s:g} s", code="body_timeout",
                       headers={"Connection": "close"}) from None  # fmt: skip


async def _read_up_to(request: Request, max_bytes: int) -> bytes:
    parts: list[bytes] = []
    num_bytes = 0
    async for part in request.stream():
        num_bytes += len(part)
        if num_bytes > max_bytes:
            raise _too_large(max_bytes)
        parts.append(part)
    return b"".join(parts)


def parse(model: type[Body], data: bytes) -> Body:
    """Check a body that has been read.

    Raises:
        APIError: a 400 that names the field at fault, or says that the body holds too much.
    """
    num_structure = _check_size(data)
    try:
        value = from_json(data)
    except ValueError as error:
        raise invalid(f"The body is not valid JSON: {error}") from None
    if num_structure > MAX_KEYS:
        _check_keys(value)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise of_validation(error, model) from None


def _check_size(data: bytes) -> int:
    """Refuse a body of too many values; returns an upper bound on its objects, arrays and keys."""
    # What stands in strings counts here, which is quick. Few bodies come near the bounds even so.
    num_values, num_structure = data.count(b","), sum(map(data.count, (b"[", b"{", b":")))
    if num_values > MAX_VALUES or num_structure > MAX_STRUCTURE:
        num_values, num_structure = _count_outside_strings(data)
    if num_values > MAX_VALUES or num_structure > MAX_STRUCTURE:
        raise invalid(
            f"The body holds too much: at most {MAX_VALUES} values, and {MAX_STRUCTURE} objects, arrays and keys",
            code="body_too_complex",
        )
    return num_structure


def _count_outside_strings(data: bytes) -> tuple[int, int]:
    """Commas, and opening brackets and colons together, that belong to the JSON's structure."""
    num_values = num_structure = 0
    is_inside = False
    start = 0
    while start < len(data):
        end = min(start + _SLICE_BYTES, len(data))
        while end < len(data) and data[end - 1] == ord("\\"):  # an escape is not cut in two
            end += 1
        slice_ = np.frombuffer(data, np.uint8, end - start, start)
        quotes = (slice_ == ord('"')) & ~_is_escaped(slice_)
        outside = ~(np.logical_xor.accumulate(quotes) ^ is_inside)
        is_inside ^= bool(np.count_nonzero(quotes) % 2)
        num_values += int(np.count_nonzero((slice_ == ord(",")) & outside))
        opens = (slice_ == ord("[")) | (slice_ == ord("{")) | (slice_ == ord(":"))
        num_structure += int(np.count_nonzero(opens & outside))
        start = end
    return num_values, num_structure


def _is_escaped(slice_: "np.ndarray[Any, np.dtype[np.uint8]]") -> "np.ndarray[Any, np.dtype[np.bool_]]":
    """For each byte whether an odd number of backslashes stands right before it."""
    is_backslash = slice_ == ord("\\")
    places = np.arange(len(slice_))
    last_other = np.maximum.accumulate(np.where(is_backslash, -1, places))
    is_escaped = np.zeros(len(slice_), np.bool_)
    is_escaped[1:] = ((places - last_other) % 2 == 1)[:-1]
    return is_escaped


def _check_keys(value: Any) -> None:
    """Refuse objects of too many keys: each key that no field has costs an error message."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            if len(item) > MAX_KEYS:
                raise invalid(f"The body holds too much: at most {MAX_KEYS} keys an object", code="body_too_complex")
            left.extend(item.values())
        elif isinstance(item, list):
            left.extend(inner for inner in item if isinstance(inner, (dict, list)))


def _too_large(max_bytes: int) -> APIError:
    # The rest of the body is still on its way: the connection cannot be used again.
    return APIError(413, f"The body is larger than {max_bytes} bytes", code="body_too_large",
                    headers={"Connection": "close"})  # fmt: skip
