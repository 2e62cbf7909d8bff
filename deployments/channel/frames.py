"""What goes over a link between a replica and a router: numbered frames one way, acknowledgements the other."""

import struct
from typing import NamedTuple

import msgspec

from deployments.channel.messages import Frame

MAX_FRAME_BYTES = 256 << 10
"""A router reads no longer frame, and closes the connection that one begins on."""
MAX_ACKNOWLEDGEMENT_BYTES = 1 << 10
"""More than any has: the messages of the handshake count too."""
_header = struct.Struct("<QQQ")
_frame_decoder: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(Frame)
HEADER_BYTES = _header.size


class FrameHeader(NamedTuple):
    """What stands before the msgpack of every frame: its place among all frames of its link."""

    link_id: int
    """Drawn at random by the replica when it first connects to a router."""
    number: int
    """Frames of a link count from 1."""
    oldest: int
    """Number of the first frame that the replica can still send again."""

    @classmethod
    def of(cls, data: bytes) -> "FrameHeader":
        """The header of a frame.

        Raises:
            struct.error: the frame is too short for one.
        """
        return cls(*_header.unpack_from(data))

    def pack(self) -> bytes:
        """Its bytes."""
        return _header.pack(*self)


class Acknowledgement(msgspec.Struct, array_like=True, frozen=True):
    """What a router tells a replica of their link."""

    link_id: int
    num_received: int
    """All frames up to this number have arrived."""
    is_missing_next: bool = False
    """The next one has not, though a later one has: everything from there on must be sent again."""


_acknowledgement_decoder = msgspec.msgpack.Decoder(Acknowledgement)


def decode_frame(data: bytes) -> Frame:
    """Read what follows a frame's header.

    Raises:
        msgspec.MsgspecError, UnicodeDecodeError: it is no frame.
    """
    return _frame_decoder.decode(memoryview(data)[HEADER_BYTES:])


def decode_acknowledgement(data: bytes) -> Acknowledgement:
    """Read a router's acknowledgement.

    Raises:
        msgspec.MsgspecError, UnicodeDecodeError: it is none.
    """
    return _acknowledgement_decoder.decode(data)
