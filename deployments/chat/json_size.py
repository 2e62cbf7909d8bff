"""Counts how many values a JSON text holds before it is parsed.

A parser holds Python's interpreter lock for its whole call, so nothing else runs meanwhile, whatever thread it is
called on. The time it takes depends on the number of values far more than on the text's length. The values of
everything that clients send are therefore counted first.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from deployments.chat.errors import APIError, invalid

MAX_VALUES = 300_000
"""Most numbers, strings and so on in one request; enough for two prompts of 128,000 token ids."""
MAX_STRUCTURE = 65_536
"""Most objects, arrays and keys in one request."""
_SLICE_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class JSONSize:
    """How much a JSON text holds; neither number is lower than the true one.

    Attributes:
        num_values: number of commas, which is about the number of values.
        num_structure: number of objects, arrays and keys.
    """

    num_values: int
    num_structure: int

    @property
    def is_too_much(self) -> bool:
        """Whether this is more than a request may hold."""
        return self.num_values > MAX_VALUES or self.num_structure > MAX_STRUCTURE


def json_size(*texts: bytes) -> JSONSize:
    """Count what JSON texts hold in total; the count is exact only if it may be too much."""
    size = _sum(map(_count_roughly, texts))
    return _sum(map(_count_outside_strings, texts)) if size.is_too_much else size


def too_complex(what: str, param: str | None = None) -> APIError:
    """The error for a request with too many values.

    Args:
        what: the part of the request that holds them, with its verb.
        param: the field at fault.
    """
    limits = f"at most {MAX_VALUES} values, and {MAX_STRUCTURE} objects, arrays and keys"
    return invalid(f"{what} too much: {limits}", param, "body_too_complex")


def _sum(sizes: Iterable[JSONSize]) -> JSONSize:
    sizes = list(sizes)
    return JSONSize(sum(size.num_values for size in sizes), sum(size.num_structure for size in sizes))


def _count_roughly(data: bytes) -> JSONSize:
    """Count quickly, including the contents of strings. Even so, few texts come near the bounds."""
    return JSONSize(data.count(b","), sum(map(data.count, (b"[", b"{", b":"))))


def _count_outside_strings(data: bytes) -> JSONSize:
    """Count commas, and opening brackets plus colons, that belong to the JSON's structure."""
    num_values = num_structure = 0
    is_inside = False
    start = 0
    while start < len(data):
        end = min(start + _SLICE_BYTES, len(data))
        while end < len(data) and data[end - 1] == ord("\\"):  # do not cut an escape in two
            end += 1
        slice_ = np.frombuffer(data, np.uint8, end - start, start)
        quotes = (slice_ == ord('"')) & ~_is_escaped(slice_)
        outside = ~(np.logical_xor.accumulate(quotes) ^ is_inside)
        is_inside ^= bool(np.count_nonzero(quotes) % 2)
        num_values += int(np.count_nonzero((slice_ == ord(",")) & outside))
        opens = (slice_ == ord("[")) | (slice_ == ord("{")) | (slice_ == ord(":"))
        num_structure += int(np.count_nonzero(opens & outside))
        start = end
    return JSONSize(num_values, num_structure)


def _is_escaped(slice_: "np.ndarray[Any, np.dtype[np.uint8]]") -> "np.ndarray[Any, np.dtype[np.bool_]]":
    """For each byte, whether an odd number of backslashes comes right before it."""
    is_backslash = slice_ == ord("\\")
    places = np.arange(len(slice_))
    last_other = np.maximum.accumulate(np.where(is_backslash, -1, places))
    is_escaped = np.zeros(len(slice_), np.bool_)
    is_escaped[1:] = ((places - last_other) % 2 == 1)[:-1]
    return is_escaped
