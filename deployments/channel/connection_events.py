"""ZeroMQ's own events for a socket's connections: accepted, handshake completed, lost."""

import contextlib
import struct
import uuid
from collections.abc import Iterator

import zmq

_event = struct.Struct("=HI")


class ConnectionEvents:
    """Reads the events of one socket.

    The queue of events has no bound. With a bound, a stuck thread would block ZeroMQ's I/O thread too after a thousand
    events, and look dead to the other side.

    Args:
        context: the socket's ZeroMQ context.
        socket: the socket whose connections to watch.
        events: which events, as a sum of ZeroMQ's constants.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], socket: zmq.Socket[bytes], events: int) -> None:
        self._socket = socket
        address = f"inproc://{uuid.uuid4()}"
        socket.monitor(address, events)
        self._events = context.socket(zmq.PAIR)
        self._events.setsockopt(zmq.RCVHWM, 0)
        self._events.setsockopt(zmq.LINGER, 0)
        self._events.connect(address)

    def fileno(self) -> int:
        """A descriptor that becomes readable when there may be events; all of them must then be read."""
        return int(self._events.getsockopt(zmq.FD))

    def read(self) -> Iterator[int]:
        """The events that arrived; each is one of ZeroMQ's constants."""
        with contextlib.suppress(zmq.Again):
            while not self._events.closed:
                event, _ = _event.unpack(self._events.recv_multipart(zmq.NOBLOCK)[0])
                yield event

    def close(self) -> None:
        """Stop watching. Call it before the socket is closed."""
        self._socket.disable_monitor()
        self._events.close()
