"""Frames between rank 0 and the other ranks, over a pair of connected sockets on one machine.

A frame is a byte for its kind, the length of its payload (uint32), and the payload: JSON, or for a step arrays of
int32, each preceded by its length.
"""

import socket
import struct
import threading
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
_HEADER = struct.Struct("<BI")


class FrameKind(IntEnum):
    """What a frame is."""

    STEP = 1
    """From rank 0: arrays, a step to run."""
    CALL = 2
    """From rank 0: JSON, another command, which is answered."""
    REPLY = 3
    """To rank 0: JSON, the result of a call."""
    FAILURE = 4
    """To rank 0: text, the reason why the rank ends."""
    BEAT = 5
    """To rank 0: empty; the process is alive."""
    TASK = 6
    """From rank 0: JSON, a `Task`, which the rank begins and does beside the steps that follow."""
    TASK_REPLY = 7
    """To rank 0: JSON, a `TaskReply`."""


class Channel:
    """One end of the connection. Any thread may send; only one receives."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._sending = threading.Lock()

    def send(self, kind: FrameKind, payload: bytes = b"") -> None:
        """Send a frame, or raise OSError."""
        with self._sending:
            self.socket.sendall(_HEADER.pack(kind, len(payload)) + payload)

    def receive(self) -> tuple[FrameKind, bytearray]:
        """Receive the next frame.

        Raises:
            EOFError: the other end is closed, or its process is gone.
        """
        kind, length = _HEADER.unpack(self._exactly(_HEADER.size))
        return FrameKind(kind), self._exactly(length)

    def _exactly(self, length: int) -> bytearray:
        data = bytearray(length)
        view = memoryview(data)
        while view:
            try:
                received = self.socket.recv_into(view)
            except ConnectionError:
                received = 0
            if not received:
                raise EOFError("the other end of the channel is gone")
            view = view[received:]
        return data


def pack_arrays(arrays: Sequence[Int32Array]) -> bytes:
    """Pack arrays into the payload of a step."""
    lens = np.array([len(array) for array in arrays], dtype=np.int32)
    payload: bytes = np.concatenate([lens, *arrays]).tobytes()
    return payload


def unpack_arrays(payload: bytearray, num_arrays: int) -> list[Int32Array]:
    """The reverse of `pack_arrays`; the arrays are views of the payload."""
    numbers = np.frombuffer(payload, dtype=np.int32)
    ends = num_arrays + numbers[:num_arrays].cumsum()
    return [numbers[end - length : end] for end, length in zip(ends, numbers[:num_arrays], strict=True)]
