"""Decompresses request bodies, up to a size limit."""

import zlib

ENCODINGS = ("gzip", "x-gzip", "deflate")
MAX_MEMBERS = 64
"""Most consecutive streams in gzip data; each of them copies what is left."""
_ANY_HEADER = 32 + zlib.MAX_WBITS
"""Tells zlib to detect by itself whether a stream has gzip's header or zlib's."""


class InflateError(Exception):
    """The data is not in its declared encoding, or is cut off."""


class TooLargeError(Exception):
    """The data is larger than allowed."""


def inflate(data: bytes, encoding: str, max_bytes: int) -> bytes:
    """Decompress data. Never holds much more than `max_bytes` of the result.

    Args:
        data: the compressed data, as sent.
        encoding: one of `ENCODINGS` (RFC 9110, section 8.4.1).
        max_bytes: most bytes that the result may have.

    Raises: InflateError, TooLargeError: see these classes.
    """
    # Some clients send deflate without zlib's header, which the RFC asks for.
    is_bare = encoding == "deflate" and (not data or data[0] & 0x0F != zlib.DEFLATED)
    wbits = -zlib.MAX_WBITS if is_bare else _ANY_HEADER
    parts: list[bytes] = []
    room = max_bytes
    try:
        for _ in range(MAX_MEMBERS):
            stream = zlib.decompressobj(wbits)
            part = stream.decompress(data, room + 1)
            if len(part) > room:
                raise TooLargeError
            if not stream.eof:
                raise InflateError
            parts.append(part)
            room -= len(part)
            data = stream.unused_data
            if not data:
                return b"".join(parts)
    except zlib.error:
        pass
    raise InflateError
