"""A router's end of the token channel: a ZeroMQ ROUTER socket that only its replicas can talk to.

CURVE encrypts everything and refuses strangers during the handshake, in ZeroMQ's I/O thread, before any of their frames
is read. Anyone who connects must know the router's public key. It reaches the replicas only through Ray Serve, and a
handshake does not reveal it to eavesdroppers.
"""

import asyncio
import struct
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import zmq

from deployments.channel.connection_events import ConnectionEvents
from deployments.channel.frames import (
    HEADER_BYTES,
    MAX_FRAME_BYTES,
    Acknowledgement,
    FrameHeader,
    decode_frame,
)
from deployments.channel.link import WINDOW_FRAMES
from deployments.channel.messages import ChannelAddress, Report, StepFrame, TokenItem, encode

_RECEIVE_QUEUE = 10_000
_HANDSHAKE_TIMEOUT_MS = 2_000
"""A connection that has not completed the handshake by then is closed, which bounds how many can be pending."""
_LONGEST_TURN_S = 0.005
"""How long reading frames may hold the event loop at a time."""
_ACKNOWLEDGE_EVERY = 16
_ASK_AGAIN_S = 0.3
_MOST_EARLY_FRAMES = 4 * WINDOW_FRAMES
_MAX_LINKS = 4096
_EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED


@dataclass(slots=True)
class ChannelCounters:
    """What a listener has seen since it was opened."""

    num_frames: int = 0
    num_malformed: int = 0
    num_missed: int = 0
    """How often a frame was missing and was requested again."""
    num_refused: int = 0
    """Connections not proven to be a replica's, including those whose handshake is still in progress."""


@dataclass(slots=True)
class _Link:
    """How far the frames of one replica have been received."""

    peer: bytes
    """The connection on which the latest frame arrived."""
    heard_at: float
    num_received: int = 0
    num_acknowledged: int = 0
    early: dict[int, bytes] = field(default_factory=dict)
    """Frames that arrived before their turn, by number."""
    asked_for: int = 0
    asked_at: float = 0.0


class TokenListener:
    """A router's end. Lives on one event loop, which also calls `on_items` and `on_report`.

    Each frame of a replica is passed on once and in order.

    Args:
        host: address to listen on.
        port: the port; 0 for any free one.
        on_items: gets a replica's id and the items of each of its steps.
        on_report: gets each replica's state.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        on_items: Callable[[str, list[TokenItem]], None],
        on_report: Callable[[Report], None],
    ) -> None:
        self.counters = ChannelCounters()
        self._router_id = uuid.uuid4().hex
        self._on_items = on_items
        self._on_report = on_report
        self._port = port
        self._links: dict[int, _Link] = {}
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._socket = context.socket(zmq.ROUTER)
        self._server_key, secret_key = zmq.curve_keypair()
        for option, value in (
            (zmq.CURVE_SERVER, 1),
            (zmq.CURVE_SECRETKEY, secret_key),
            (zmq.LINGER, 0),
            (zmq.RCVHWM, _RECEIVE_QUEUE),
            (zmq.MAXMSGSIZE, HEADER_BYTES + MAX_FRAME_BYTES),
            (zmq.HANDSHAKE_IVL, _HANDSHAKE_TIMEOUT_MS),
        ):
            self._socket.setsockopt(option, value)
        self._connections = ConnectionEvents(context, self._socket, _EVENTS)
        self._version = 0
        self.address = self.listen_on(host)
        self._loop = asyncio.get_running_loop()
        self._fds: list[int] = []
        self._on_readable(int(self._socket.getsockopt(zmq.FD)), self._drain)
        self._on_readable(self._connections.fileno(), self._count_connections)

    def listen_on(self, host: str) -> ChannelAddress:
        """Listen on one more address of this node; `address` is then the latest one, and replicas move to it."""
        if ":" in host:
            self._socket.setsockopt(zmq.IPV6, 1)
            host = f"[{host}]"
        if self._port:
            self._socket.bind(f"tcp://{host}:{self._port}")
            port = self._port
        else:
            port = self._socket.bind_to_random_port(f"tcp://{host}")
        self._version += 1
        self.address = ChannelAddress(self._router_id, f"tcp://{host}:{port}", self._server_key, self._version)
        return self.address

    def close(self) -> None:
        """Stop listening."""
        if not self._socket.closed:
            for fd in self._fds:
                self._loop.remove_reader(fd)
            self._connections.close()
            self._socket.close()

    def _on_readable(self, fd: int, callback: Callable[[], None]) -> None:
        """Call back when ZeroMQ's descriptor `fd` signals, and once now for what arrived earlier."""
        self._fds.append(fd)
        self._loop.add_reader(fd, callback)
        self._loop.call_soon(callback)

    def _drain(self) -> None:
        """Take what has arrived. ZeroMQ's descriptor is edge-triggered, so read until nothing is left."""
        until = time.monotonic() + _LONGEST_TURN_S
        while not self._socket.closed:
            try:
                peer, data = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            except ValueError:  # not two parts
                self.counters.num_malformed += 1
                continue
            self._take(peer, data)
            if time.monotonic() > until:
                self._loop.call_soon(self._drain)
                return

    def _count_connections(self) -> None:
        """Count accepted connections, and stop counting those that prove to be a replica's."""
        until = time.monotonic() + _LONGEST_TURN_S
        for event in self._connections.read():
            self.counters.num_refused += 1 if event == zmq.EVENT_ACCEPTED else -1
            if time.monotonic() > until:
                self._loop.call_soon(self._count_connections)
                return

    def _take(self, peer: bytes, data: bytes) -> None:
        self.counters.num_frames += 1
        try:
            header = FrameHeader.of(data)
        except struct.error:
            self.counters.num_malformed += 1
            return
        link = self._link(header.link_id, peer)
        link.num_received = max(link.num_received, header.oldest - 1)
        expected = link.num_received + 1
        if header.number > expected:
            if len(link.early) < _MOST_EARLY_FRAMES:
                link.early[header.number] = data
            self._ask_for(expected, header.link_id, link)
        elif header.number < expected:  # a needless resend; the replica does not know yet
            self._acknowledge(header.link_id, link)
        else:
            self._hand_on(header.link_id, link, data)
            while (early := link.early.pop(link.num_received + 1, None)) is not None:
                self._hand_on(header.link_id, link, early)

    def _hand_on(self, link_id: int, link: _Link, data: bytes) -> None:
        """Pass on the frame whose turn it is."""
        link.num_received += 1
        try:
            frame = decode_frame(data)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            self.counters.num_malformed += 1
            return
        if isinstance(frame, StepFrame):
            self._on_items(frame.replica_id, frame.items)
        else:
            self._on_report(frame)
        if isinstance(frame, Report) or link.num_received - link.num_acknowledged >= _ACKNOWLEDGE_EVERY:
            self._acknowledge(link_id, link)

    def _link(self, link_id: int, peer: bytes) -> _Link:
        link = self._links.get(link_id)
        if link is None:
            if len(self._links) >= _MAX_LINKS:
                del self._links[min(self._links, key=lambda other: self._links[other].heard_at)]
            link = self._links[link_id] = _Link(peer, 0.0)
        link.peer, link.heard_at = peer, time.monotonic()
        return link

    def _ask_for(self, number: int, link_id: int, link: _Link) -> None:
        """Have the replica resend a frame and all after it. The request is repeated only when it does not help."""
        if link.asked_for != number or link.heard_at - link.asked_at > _ASK_AGAIN_S:
            link.asked_for, link.asked_at = number, link.heard_at
            self.counters.num_missed += 1
            self._acknowledge(link_id, link, is_missing_next=True)

    def _acknowledge(self, link_id: int, link: _Link, *, is_missing_next: bool = False) -> None:
        link.num_acknowledged = link.num_received
        told = Acknowledgement(link_id, link.num_received, is_missing_next)
        self._socket.send_multipart((link.peer, encode(told)), zmq.NOBLOCK)
