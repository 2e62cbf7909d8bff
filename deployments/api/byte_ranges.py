"""Parts of a file that a request asks for, after RFC 9110, section 14."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from deployments.chat.errors import APIError

_ONE_RANGE = re.compile(r"bytes\s*=\s*([0-9]{0,18})\s*-\s*([0-9]{0,18})", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class BytePart:
    """Bytes of a file.

    Attributes:
        start: the first byte.
        end: the byte after the last.
        num_bytes: how many the file has.
    """

    start: int
    end: int
    num_bytes: int

    def headers(self) -> dict[str, str]:
        """The headers of an answer that holds this part and nothing else."""
        return {
            "Content-Length": str(self.end - self.start),
            "Content-Range": f"bytes {self.start}-{self.end - 1}/{self.num_bytes}",
        }


def part_of(headers: Mapping[str, str], num_bytes: int, tag: str) -> BytePart | None:
    """The part of a file that a request asks for by its `Range`; None for the whole.

    A header that cannot be read, and one that asks for several parts, asks for the whole.

    Args:
        headers: those of the request.
        num_bytes: how many the file has.
        tag: the file's `ETag`; a request with another one in `If-Range` wants the whole.

    Raises:
        APIError: a 416; the file has no such bytes.
    """
    found = _ONE_RANGE.fullmatch(headers.get("range", "").strip())
    if found is None or not any(found.groups()) or headers.get("if-range", tag) != tag:
        return None
    first, last = found.groups()
    if not first:
        start, end = max(num_bytes - int(last), 0), num_bytes
    else:
        start, end = int(first), min(int(last) + 1, num_bytes) if last else num_bytes
        if last and int(last) < start:
            return None
    if start >= num_bytes:
        raise APIError(
            416, f"The file has {num_bytes} bytes; ask for a part of these", code="range_not_satisfiable",
            headers={"Content-Range": f"bytes */{num_bytes}"},
        )  # fmt: skip
    return BytePart(start, end, num_bytes)
