"""What a link between a replica and a router carries: numbered frames one way, acknowledgements the other."""

import struct
from typing import NamedTuple

import msgspec

from deployments.channel.messages import Frame

MAX_FRAME_BYTES = 256 << 10
"""A router reads no frame longer than this, and closes a connection on which one begins."""
MAX_ACKNOWLEDGEMENT_BYTES = 1 << 10
"""More than any acknowledgement needs; the limit applies to the handshake's messages too."""
_header = struct.Struct("<QQQ")
_frame_decoder: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(Frame)
HEADER_BYTES = _header.size


class FrameHeader(NamedTuple):
    """Precedes the msgpack of every frame, and gives its place among all frames of its link."""

    link_id: int
    """Drawn at random by the replica when it first connects to a router."""
    number: int
    """Number of this frame; the frames of a link are numbered from 1."""
    oldest: int
    """Number of the first frame that the replica can still send again."""

    @classmethod
    def of(cls, data: bytes) -> "FrameHeader":
        """The header of a frame.

        Raises:
            struct.error: the frame is too short to hold a header.
        """
        return cls(*_header.unpack_from(data))

    def pack(self) -> bytes:
        """The header as bytes."""
        return _header.pack(*self)


class Acknowledgement(msgspec.Struct, array_like=True, frozen=True):
    """What a router tells a replica about their link."""

    link_id: int
    num_received: int
    """All frames up to this number have arrived."""
    is_missing_next: bool = False
    """The next frame has not arrived although a later one has: everything from there on must be sent again."""


decode_acknowledgement = msgspec.msgpack.Decoder(Acknowledgement).decode
"""Raises `msgspec.MsgspecError` or `UnicodeDecodeError` where the data is not an acknowledgement."""


def decode_frame(data: bytes) -> Frame:
    """Read what follows a frame's header.

    Raises:
        msgspec.MsgspecError, UnicodeDecodeError: the data is not a frame.
    """
    return _frame_decoder.decode(memoryview(data)[HEADER_BYTES:])
