"""The token channel: engine replicas push each step's tokens straight to the routers, past Ray Serve.

A router listens on a ZeroMQ PULL socket; each replica connects a PUSH socket to it. A frame is the router's secret
followed by msgpack. Frames that do not carry the secret, do not parse or are too long are dropped and counted. Losing
a frame loses nothing: the reply to the call holds every token.
"""

import asyncio
import hmac
import logging
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec
import zmq

from deployments.channel.messages import (
    SECRET_BYTES,
    ChannelAddress,
    Condition,
    End,
    EngineTiming,
    Frame,
    Report,
    StepFrame,
    TokenItem,
    block_hash,
    encode,
)
from llm.core.slot_pool import ContentChanges
from llm.serving.schemas import EngineStats, TokenLogprobs

logger = logging.getLogger(__name__)

MAX_FRAME_BYTES = 16 << 20
_RECEIVE_QUEUE = 10_000
_SEND_QUEUE = 1_000
_FRAMES_PER_WAKE_UP = 64
_UNKNOWN = Condition()

_frame_decoder = msgspec.msgpack.Decoder(Frame)


@dataclass(slots=True)
class ChannelCounters:
    """What a listener has seen since it was opened."""

    num_frames: int = 0
    num_unauthenticated: int = 0
    num_malformed: int = 0


class TokenListener:
    """A router's end. Lives on one event loop, which also calls `on_items` and `on_report`.

    Args:
        host: address to listen on.
        port: 0 for any free one.
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
        self._secret = secrets.token_bytes(SECRET_BYTES)
        self._on_items = on_items
        self._on_report = on_report
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVHWM, _RECEIVE_QUEUE)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._port = port
        self.address = self.listen_on(host)
        self._loop = asyncio.get_running_loop()
        self._fd = int(self._socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self._drain)
        self._loop.call_soon(self._drain)

    def listen_on(self, host: str) -> ChannelAddress:
        """Listen on one more address of this node; `address` is the latest. What others connect to stays."""
        if ":" in host:
            self._socket.setsockopt(zmq.IPV6, 1)
            host = f"[{host}]"
        if self._port:
            self._socket.bind(f"tcp://{host}:{self._port}")
            port = self._port
        else:
            port = self._socket.bind_to_random_port(f"tcp://{host}")
        self.address = ChannelAddress(f"tcp://{host}:{port}", self._secret)
        return self.address

    def close(self) -> None:
        """Stop listening."""
        if not self._socket.closed:
            self._loop.remove_reader(self._fd)
            self._socket.close()

    def _drain(self) -> None:
        """Take what has arrived. ZeroMQ's descriptor signals edges: reading goes on until nothing is left."""
        if self._socket.closed:
            return
        for _ in range(_FRAMES_PER_WAKE_UP):
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._take(data)
        self._loop.call_soon(self._drain)

    def _take(self, data: bytes) -> None:
        self.counters.num_frames += 1
        if not hmac.compare_digest(data[:SECRET_BYTES], self._secret):
            self.counters.num_unauthenticated += 1
            return
        try:
            frame = _frame_decoder.decode(memoryview(data)[SECRET_BYTES:])
        except (msgspec.MsgspecError, UnicodeDecodeError):
            self.counters.num_malformed += 1
            return
        if isinstance(frame, StepFrame):
            self._on_items(frame.replica_id, frame.items)
        else:
            self._on_report(frame)


class TokenSender:
    """A replica's end. Lives on the engine's thread.

    What cannot be sent, because a router does not keep up, stays with its stream and goes with a later step.

    Args:
        replica_id: goes with every frame.
    """

    def __init__(self, replica_id: str) -> None:
        self._replica_id = replica_id
        self._context = zmq.Context()
        self._routers: dict[str, _RouterLink] = {}

    @property
    def num_routers(self) -> int:
        """Routers that this replica sends to."""
        return len(self._routers)

    def attach(self, channel: ChannelAddress) -> None:
        """Report to this router from now on, everything at first."""
        self._link(channel).has_missed_report = True

    def open(self, stream_id: int, channel: ChannelAddress, num_output_tokens: int) -> "OutgoingStream":
        """Begin a stream.

        Args:
            num_output_tokens: tokens that an earlier engine generated.
        """
        return OutgoingStream(self._link(channel), stream_id, num_output_tokens)

    def flush(self) -> None:
        """Send what the last step gave, one frame a router."""
        for link in self._routers.values():
            if link.dirty:
                link.flush(self._replica_id)

    def report(
        self, stats: EngineStats, changes: ContentChanges, content: Iterable[int], condition: Condition = _UNKNOWN
    ) -> None:
        """Tell every router this replica's state, and forget routers that are gone.

        Args:
            changes: of the prefix cache since the last report.
            content: all of the prefix cache, for routers that missed a report or never had one.
            condition: what the replica says of itself.
        """
        added, removed = _blocks(changes.added), _blocks(changes.removed)
        for endpoint, link in list(self._routers.items()):
            report = Report(self._replica_id, stats, added, removed, received=link.received, condition=condition)
            if link.has_missed_report:
                report.added_blocks, report.removed_blocks, report.is_snapshot = _blocks(content), [], True
            link.has_missed_report = not link.send(encode(report))
            if not link.has_missed_report:
                link.received = []
            elif not link.num_streams:
                link.close()
                del self._routers[endpoint]

    def close(self) -> None:
        """Drop what is queued and close the sockets."""
        for link in self._routers.values():
            link.close()
        self._routers.clear()
        self._context.destroy(linger=0)

    def _link(self, channel: ChannelAddress) -> "_RouterLink":
        link = self._routers.get(channel.endpoint)
        if link is None or link.secret != channel.secret:
            if link is not None:  # another router that got a dead one's port
                link.close()
            link = self._routers[channel.endpoint] = _RouterLink(self._context, channel)
        return link


class OutgoingStream:
    """Tokens of one request on their way to its router."""

    __slots__ = ("_end", "_link", "_logprobs", "_num_sent", "_stream_id", "_timing", "_token_ids")

    def __init__(self, link: "_RouterLink", stream_id: int, num_output_tokens: int) -> None:
        self._link = link
        self._stream_id = stream_id
        self._num_sent = num_output_tokens
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] | None = None
        self._end: End | None = None
        self._timing: EngineTiming | None = None
        link.num_streams += 1
        link.received.append(stream_id)

    def push(
        self,
        token_ids: tuple[int, ...],
        logprobs: tuple[TokenLogprobs, ...] | None = None,
        end: End | None = None,
        timing: EngineTiming | None = None,
    ) -> None:
        """Add a step's tokens; they leave with the next flush."""
        self._token_ids.extend(token_ids)
        if logprobs is not None:
            if self._logprobs is None:
                self._logprobs = []
            self._logprobs.extend(logprobs)
        self._end = end
        self._timing = timing or self._timing
        self._link.dirty[self._stream_id] = self

    def close(self) -> None:
        """The request has ended; call it once."""
        self._link.num_streams -= 1
        if self._end is None:
            self._link.dirty.pop(self._stream_id, None)

    def item(self) -> TokenItem:
        """What is still to be sent."""
        return TokenItem(self._stream_id, self._num_sent, self._token_ids, self._logprobs, self._end, self._timing)

    def mark_sent(self) -> None:
        """What `item` gave has been sent."""
        self._num_sent += len(self._token_ids)
        self._token_ids = []
        self._logprobs = None
        self._timing = None


class _RouterLink:
    """Connection to one router."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], channel: ChannelAddress) -> None:
        self.secret = channel.secret
        self.num_streams = 0
        self.has_missed_report = True
        self.received: list[int] = []
        self.dirty: dict[int, OutgoingStream] = {}
        self._socket = context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, _SEND_QUEUE)
        if "[" in channel.endpoint:
            self._socket.setsockopt(zmq.IPV6, 1)
        self._socket.connect(channel.endpoint)

    def send(self, frame: bytes) -> bool:
        """Queue a frame; False where the queue is full."""
        try:
            self._socket.send(self.secret + frame, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def flush(self, replica_id: str) -> None:
        streams = list(self.dirty.values())
        if self.send(encode(StepFrame(replica_id, [stream.item() for stream in streams]))):
            for stream in streams:
                stream.mark_sent()
            self.dirty.clear()

    def close(self) -> None:
        self._socket.close()


def _blocks(content: Iterable[int]) -> list[int]:
    return [block_hash(page_hash) for page_hash in content]
