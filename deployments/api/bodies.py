"""Request bodies: read up to a size limit, bounded in how many values they hold, parsed and checked.

The parser holds Python's interpreter lock for its whole call, so nothing else runs meanwhile, whatever thread it is
called on. The time it takes depends on the number of values far more than on their size, so that number is bounded.
"""

import asyncio
from codecs import BOM_UTF8
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import from_json
from starlette.requests import Request

from deployments.api.half_characters import with_whole_characters
from deployments.api.inflate import ENCODINGS, InflateError, TooLargeError, inflate
from deployments.chat.errors import APIError, invalid, of_validation
from deployments.chat.ignored import IgnoredFields
from deployments.chat.json_size import json_size, too_complex
from deployments.chat.wire_model import RequestBody
from deployments.config import LimitsConfig

Body = TypeVar("Body", bound=RequestBody)

MAX_KEYS = 2_048
"""Most keys in one object."""


async def read_body(request: Request, limits: LimitsConfig) -> bytes:
    """Read the request's body, which must be JSON according to its content type.

    Raises:
        APIError: 415 for another type or an unknown encoding; 413 for too many bytes, as sent or once inflated, at
            which point it stops reading; 408 if the client takes too long to send it; 400 if it cannot be inflated.
    """
    max_bytes = limits.max_body_bytes
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise APIError(415, "The body must be JSON, sent with Content-Type: application/json", code="unsupported_type")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", *ENCODINGS):
        raise APIError(415, "The body's Content-Encoding is not supported; send gzip, deflate or none",
                       code="unsupported_type", headers={"Accept-Encoding": "gzip, deflate"})  # fmt: skip
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and (len(declared) > 18 or int(declared) > max_bytes):
        raise _too_large(max_bytes)
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            data = await _read_up_to(request, max_bytes)
    except TimeoutError:
        raise APIError(408, f"The body was not sent within {limits.body_timeout_s:g} s", code="body_timeout",
                       headers={"Connection": "close"}) from None  # fmt: skip
    if not data and "upgrade" in request.headers:
        raise _body_lost()
    if encoding == "identity":
        return data
    try:
        return await asyncio.to_thread(inflate, data, encoding, max_bytes)
    except InflateError:
        raise invalid(f"The body is not valid {encoding}") from None
    except TooLargeError:
        raise _too_large(max_bytes) from None


async def _read_up_to(request: Request, max_bytes: int) -> bytes:
    parts: list[bytes] = []
    num_bytes = 0
    async for part in request.stream():
        num_bytes += len(part)
        if num_bytes > max_bytes:
            raise _too_large(max_bytes)
        parts.append(part)
    return b"".join(parts)


def parse(model: type[Body], data: bytes, *, is_strict: bool = False) -> tuple[Body, list[str]]:
    """Check a body that has been read.

    Args:
        is_strict: refuse unknown fields.

    Returns:
        The body, and the paths of its fields that were ignored.

    Raises:
        APIError: a 400 that names the field at fault, or says that the body holds too much.
    """
    data = data.removeprefix(BOM_UTF8)
    num_structure = _check_size(data)
    value = _value_of(data)
    if num_structure > MAX_KEYS:
        _check_keys(value)
    ignored = IgnoredFields(is_strict=is_strict)
    try:
        body = model.model_validate(value, context=ignored)
    except ValidationError as error:
        raise of_validation(error, model) from None
    return body, ignored.paths(value)


def _value_of(data: bytes) -> Any:
    """The JSON value in a body.

    Raises:
        APIError: a 400.
    """
    try:
        return from_json(data)
    except ValueError as error:
        value = with_whole_characters(data)
        if value is None:
            raise invalid(f"The body is not valid JSON: {error}") from None
        return value


def _check_size(data: bytes) -> int:
    """Refuse a body with too many values; returns an upper bound on its objects, arrays and keys."""
    size = json_size(data)
    if size.is_too_much:
        raise too_complex("The body holds")
    return size.num_structure


def _check_keys(value: Any) -> None:
    """Refuse objects with too many keys: each unknown key costs an error message."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            if len(item) > MAX_KEYS:
                raise invalid(f"The body holds too much: at most {MAX_KEYS} keys an object", code="body_too_complex")
            left.extend(item.values())
        elif isinstance(item, list):
            left.extend(inner for inner in item if isinstance(inner, (dict, list)))


def _body_lost() -> APIError:
    """The error for a body that a front end dropped because the request offers another protocol; see
    `deployments.api.upgrades`."""
    message = "The body is missing: the request offers another protocol, so send it without an Upgrade header"
    return APIError(400, message, code="body_missing", headers={"Connection": "close"})


def _too_large(max_bytes: int) -> APIError:
    # The rest of the body is still arriving, so the connection cannot be reused.
    return APIError(413, f"The body is larger than {max_bytes} bytes", code="body_too_large",
                    headers={"Connection": "close"})  # fmt: skip
