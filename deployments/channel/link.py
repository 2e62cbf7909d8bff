"""A replica's end of its link to one router. Each frame arrives once and in order, or the router counts as lost.

A link outlives its connections. The replica keeps every frame until the router has acknowledged it, and sends missing
frames again. At most one window of frames is ever in flight, so a router that does not read costs its replicas a
bounded amount of memory. ZeroMQ's own queues never fill either, so heartbeats always get through; its I/O thread
answers them whatever Python is doing.
"""

import contextlib
import logging
import secrets
import time
from collections import deque
from collections.abc import Iterator

import msgspec
import zmq

from deployments.channel.connection_events import ConnectionEvents
from deployments.channel.frames import (
    MAX_ACKNOWLEDGEMENT_BYTES,
    MAX_FRAME_BYTES,
    FrameHeader,
    decode_acknowledgement,
)
from deployments.channel.messages import ChannelAddress

logger = logging.getLogger(__name__)

WINDOW_FRAMES = 64
WINDOW_BYTES = 4 << 20
LOST_AFTER_S = 2.0
"""How long a router may be unreachable before it counts as dead. Noticing this takes up to `_HEARTBEAT_TIMEOUT_MS` if
its node has vanished, and no time if only its process has."""
_NEVER_REACHED_AFTER_S = 10.0
_HEARTBEAT_MS, _HEARTBEAT_TIMEOUT_MS, _HEARTBEAT_TTL_MS = 500, 1_500, 6_000
_HANDSHAKE_TIMEOUT_MS, _CONNECT_TIMEOUT_MS, _RECONNECT_MS = 2_000, 1_000, 100
_FIRST_RETRY_S, _LAST_RETRY_S = 1.0, 8.0
_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED

Socket = zmq.Socket[bytes]


class RouterLink:
    """Sends frames to one router, over one connection at a time. Lives on the engine's thread.

    Args:
        context: the replica's ZeroMQ context.
        channel: where the router listens.
    """

    def __init__(self, context: zmq.Context[Socket], channel: ChannelAddress) -> None:
        self.link_id = secrets.randbits(63)
        self._context = context
        self._connection = _Connection(context, channel)
        self._successor: _Connection | None = None
        self._unacknowledged: deque[bytes] = deque()
        self._num_unacknowledged_bytes = 0
        self._num_sent = 0
        self._progress_at = time.monotonic()
        self._retry_s = _FIRST_RETRY_S

    @property
    def num_unacknowledged(self) -> int:
        """Number of frames sent and not yet acknowledged."""
        return len(self._unacknowledged)

    @property
    def has_room(self) -> bool:
        """Whether the window has room for a step's tokens."""
        return len(self._unacknowledged) < WINDOW_FRAMES and self._num_unacknowledged_bytes < WINDOW_BYTES

    @property
    def has_room_for_report(self) -> bool:
        """Whether the window has room for a report. Reports get twice the window, so that they still reach a slow
        router."""
        return len(self._unacknowledged) < 2 * WINDOW_FRAMES and self._num_unacknowledged_bytes < 2 * WINDOW_BYTES

    @property
    def endpoint(self) -> str:
        """The address that frames are sent to now."""
        return self._connection.channel.endpoint

    def move_to(self, channel: ChannelAddress) -> None:
        """Switch to another address of the same router once it is connected. Older addresses are ignored."""
        if channel.version > max(c.channel.version for c in self._connections()):
            if self._successor is not None:
                self._successor.close()
            self._successor = _Connection(self._context, channel)

    def send(self, frame: bytes) -> None:
        """Send a frame, whether there is room or not."""
        if len(frame) > MAX_FRAME_BYTES:
            logger.error("a frame of %d bytes is too long for the token channel and was left out", len(frame))
            return
        if not self._unacknowledged:
            self._progress_at = time.monotonic()
        self._num_sent += 1
        self._unacknowledged.append(frame)
        self._num_unacknowledged_bytes += len(frame)
        self._transmit(self._num_sent, frame)

    def poll(self) -> None:
        """Read acknowledgements, resend missing frames, and check whether the router is still there."""
        now = time.monotonic()
        for connection in self._connections():
            connection.poll(now)
        if self._successor is not None:
            if self._successor.is_up:
                self._connection.close()
                self._connection, self._successor = self._successor, None
            elif self._successor.is_lost(now) and not self._connection.is_lost(now):
                self._successor.close()
                self._successor = None
        for data in self._connection.received():
            self._take(data, now)
        if self._unacknowledged and now - self._progress_at > self._retry_s:
            self._progress_at, self._retry_s = now, min(2 * self._retry_s, _LAST_RETRY_S)
            self._transmit(self._oldest, self._unacknowledged[0])

    def is_lost(self) -> bool:
        """Whether the router has been out of reach for so long that it counts as dead."""
        now = time.monotonic()
        return all(connection.is_lost(now) for connection in self._connections())

    def close(self, linger_ms: int = 0) -> None:
        """Close the connection. Frames that have not left within `linger_ms` milliseconds are dropped."""
        for connection in self._connections():
            connection.close(linger_ms)

    @property
    def _oldest(self) -> int:
        """Number of the first frame that has not been acknowledged."""
        return self._num_sent - len(self._unacknowledged) + 1

    def _connections(self) -> list["_Connection"]:
        return [self._connection] if self._successor is None else [self._connection, self._successor]

    def _transmit(self, number: int, frame: bytes) -> None:
        self._connection.send(FrameHeader(self.link_id, number, self._oldest).pack() + frame)

    def _take(self, data: bytes, now: float) -> None:
        try:
            told = decode_acknowledgement(data)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            logger.warning("a router sent an acknowledgment that cannot be read")
            return
        if told.link_id != self.link_id or told.num_received > self._num_sent:
            return
        while self._unacknowledged and self._oldest <= told.num_received:
            self._num_unacknowledged_bytes -= len(self._unacknowledged.popleft())
            self._progress_at, self._retry_s = now, _FIRST_RETRY_S
        if told.is_missing_next:
            for number, frame in enumerate(self._unacknowledged, self._oldest):
                self._transmit(number, frame)


class _Connection:
    """A connection to one address of a router, which ZeroMQ opens again whenever it breaks."""

    def __init__(self, context: zmq.Context[Socket], channel: ChannelAddress) -> None:
        self.channel = channel
        self.is_up = False
        self._was_up = False
        self._down_since = time.monotonic()
        self._socket = context.socket(zmq.DEALER)
        public_key, secret_key = zmq.curve_keypair()
        for option, value in (
            (zmq.CURVE_PUBLICKEY, public_key),
            (zmq.CURVE_SECRETKEY, secret_key),
            (zmq.CURVE_SERVERKEY, channel.server_key),
            (zmq.LINGER, 0),
            (zmq.SNDHWM, 16 * WINDOW_FRAMES),
            (zmq.MAXMSGSIZE, MAX_ACKNOWLEDGEMENT_BYTES),
            (zmq.HEARTBEAT_IVL, _HEARTBEAT_MS),
            (zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS),
            (zmq.HEARTBEAT_TTL, _HEARTBEAT_TTL_MS),
            (zmq.HANDSHAKE_IVL, _HANDSHAKE_TIMEOUT_MS),
            (zmq.CONNECT_TIMEOUT, _CONNECT_TIMEOUT_MS),
            (zmq.RECONNECT_IVL, _RECONNECT_MS),
            (zmq.IPV6, int("[" in channel.endpoint)),
        ):
            self._socket.setsockopt(option, value)
        self._events = ConnectionEvents(context, self._socket, _EVENTS)
        self._socket.connect(channel.endpoint)

    def send(self, data: bytes) -> None:
        """Hand a frame to ZeroMQ. If even its queue is full, the frame counts as lost."""
        with contextlib.suppress(zmq.Again):
            self._socket.send(data, zmq.NOBLOCK)

    def received(self) -> Iterator[bytes]:
        """Every message that has arrived."""
        with contextlib.suppress(zmq.Again):
            while True:
                yield self._socket.recv(zmq.NOBLOCK)

    def poll(self, now: float) -> None:
        """Note whether the connection is up."""
        for event in self._events.read():
            was_up, self.is_up = self.is_up, event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            self._was_up |= self.is_up
            if was_up and not self.is_up:  # not when an attempt to connect again fails
                self._down_since = now

    def is_lost(self, now: float) -> bool:
        """Whether it has been down for too long."""
        longest_s = LOST_AFTER_S if self._was_up else _NEVER_REACHED_AFTER_S
        return not self.is_up and now - self._down_since > longest_s

    def close(self, linger_ms: int = 0) -> None:
        """Close it; ZeroMQ may keep sending for `linger_ms` milliseconds."""
        self._events.close()
        self._socket.close(linger_ms)
