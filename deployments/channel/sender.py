"""A replica's end of the token channel: each step's tokens go straight to the routers, bypassing Ray Serve.

Each replica has one link to each router (`RouterLink`), which carries one msgpack frame per step, and a report ten
times a second. Tokens that cannot be sent because a router does not keep up stay unencoded in their stream, and are
encoded once when there is room.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator

import zmq

from deployments.channel.link import WINDOW_FRAMES, RouterLink
from deployments.channel.messages import (
    ChannelAddress,
    Condition,
    End,
    EngineTiming,
    Report,
    StepFrame,
    TokenItem,
    block_hash,
    encode,
)
from llm.scheduling.slot_pool import ContentChanges
from llm.serving.schemas import EngineStats, TokenLogprobs

MAX_BLOCKS_A_REPORT = 8_192
FRAME_BYTES = 64 << 10
"""Approximate length at which a frame of tokens is closed and the next one begins."""
_UNKNOWN = Condition()
_FAREWELL_MS = 200
_CATCH_UP_PACE = 3
"""A stream's backlog leaves at this multiple of the pace at which its tokens come, so no step pays for all of it."""
_POLL_FROM_FRAMES = WINDOW_FRAMES // 2
_ITEM_BYTES, _TOKEN_BYTES, _LOGPROB_BYTES, _TOP_BYTES = 24, 5, 20, 15


class TokenSender:
    """Sends tokens and reports to every router that has asked for them. Lives on the engine's thread.

    Args:
        replica_id: id of this replica, sent with every frame.
    """

    def __init__(self, replica_id: str) -> None:
        self._replica_id = replica_id
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._routers: dict[str, _Router] = {}

    @property
    def num_routers(self) -> int:
        """Routers that this replica sends to."""
        return len(self._routers)

    def attach(self, channel: ChannelAddress) -> None:
        """Report to this router from now on, beginning with everything."""
        self._router(channel).has_missed_report = True

    def open(
        self,
        stream_id: int,
        channel: ChannelAddress,
        num_output_tokens: int,
        on_lost: Callable[[], None] = lambda: None,
    ) -> "OutgoingStream":
        """Begin a stream.

        Args:
            num_output_tokens: tokens that an earlier engine generated.
            on_lost: called by `report` once the router counts as dead.
        """
        return OutgoingStream(self._router(channel), stream_id, num_output_tokens, on_lost)

    def flush(self) -> None:
        """Send what the last step produced."""
        for router in self._routers.values():
            if router.dirty:
                router.flush(self._replica_id)

    def report(
        self, stats: EngineStats, changes: ContentChanges, content: Iterable[int], condition: Condition = _UNKNOWN
    ) -> None:
        """Tell every router this replica's state, resend what was lost, and give up routers that are gone.

        Args:
            changes: changes to the prefix cache since the last report.
            content: everything in the prefix cache, for routers that missed a report or never had one.
            condition: what the replica says about itself.
        """
        for router_id, router in list(self._routers.items()):
            router.link.poll()
            if router.link.is_lost():
                del self._routers[router_id]
                router.give_up()
                continue
            if not router.link.has_room_for_report:
                router.has_missed_report = True
                continue
            added, removed = (content, ()) if router.has_missed_report else (changes.added, changes.removed)
            for report in _reports(self._replica_id, stats, added, removed):
                report.condition = condition
                report.is_snapshot, router.has_missed_report = router.has_missed_report, False
                report.received, router.received = router.received, []
                router.link.send(encode(report))

    def close(self) -> None:
        """Close the links. Frames just sent may still leave: the last report says why the replica is ending."""
        for router in self._routers.values():
            router.link.close(_FAREWELL_MS)
        self._routers.clear()

    def _router(self, channel: ChannelAddress) -> "_Router":
        router = self._routers.get(channel.router_id)
        if router is None:
            router = self._routers[channel.router_id] = _Router(RouterLink(self._context, channel))
        else:
            router.link.move_to(channel)
        return router


class OutgoingStream:
    """Tokens of one request on their way to its router."""

    __slots__ = ("_end", "_logprobs", "_num_pushed", "_num_sent", "_router", "_timing", "_token_ids", "on_lost",
                 "stream_id")  # fmt: skip

    def __init__(self, router: "_Router", stream_id: int, num_output_tokens: int, on_lost: Callable[[], None]) -> None:
        self.stream_id = stream_id
        self.on_lost = on_lost
        self._router = router
        self._num_sent = num_output_tokens
        self._num_pushed = 0
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._end: End | None = None
        self._timing: EngineTiming | None = None
        router.streams[stream_id] = self
        router.received.append(stream_id)

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
            self._logprobs.extend(logprobs)
        self._num_pushed = len(token_ids)
        self._end = end
        self._timing = timing or self._timing
        self._router.dirty[self.stream_id] = self

    def close(self) -> None:
        """End the stream with its request; call once. Tokens its router is too slow to take come only with the
        reply."""
        self._router.streams.pop(self.stream_id, None)
        if self._end is None or not self._router.link.has_room:
            self._router.dirty.pop(self.stream_id, None)

    def take(self) -> tuple[TokenItem, int]:
        """What the next frame carries of this stream, and roughly how many bytes that takes."""
        most = _CATCH_UP_PACE * max(self._num_pushed, 1)
        token_ids, logprobs = self._token_ids[:most], self._logprobs[:most]
        # In place: copying the rest would cost each step time in proportion to the backlog's length.
        del self._token_ids[:most], self._logprobs[:most]
        end = None if self._token_ids else self._end
        item = TokenItem(self.stream_id, self._num_sent, token_ids, logprobs or None, end, self._timing)
        self._num_sent += len(token_ids)
        self._timing = None
        num_bytes = _ITEM_BYTES + _TOKEN_BYTES * len(token_ids)
        if logprobs:
            num_bytes += sum(_LOGPROB_BYTES + _TOP_BYTES * len(entry.top) for entry in logprobs)
        return item, num_bytes

    @property
    def has_backlog(self) -> bool:
        """Whether tokens wait for the frame of a later step, and will get one."""
        return bool(self._token_ids) and self._end is None


class _Router:
    """What a replica keeps for one router."""

    def __init__(self, link: RouterLink) -> None:
        self.link = link
        self.streams: dict[int, OutgoingStream] = {}
        self.dirty: dict[int, OutgoingStream] = {}
        self.received: list[int] = []
        self.has_missed_report = True

    def flush(self, replica_id: str) -> None:
        """Send what the streams have, as far as there is room; streams left out come first next time."""
        if self.link.num_unacknowledged >= _POLL_FROM_FRAMES:
            self.link.poll()
        if not self.link.has_room:
            return
        streams, backlog = deque(self.dirty.values()), []
        while streams and self.link.has_room:
            items: list[TokenItem] = []
            num_bytes = 0
            while streams and num_bytes < FRAME_BYTES:
                stream = streams.popleft()
                item, item_bytes = stream.take()
                items.append(item)
                num_bytes += item_bytes
                if stream.has_backlog:
                    backlog.append(stream)
            self.link.send(encode(StepFrame(replica_id, items)))
        self.dirty = {stream.stream_id: stream for stream in (*streams, *backlog)}

    def give_up(self) -> None:
        """The router is gone: close the link and tell its streams."""
        self.link.close()
        for stream in list(self.streams.values()):
            stream.on_lost()


def _reports(replica_id: str, stats: EngineStats, added: Iterable[int], removed: Iterable[int]) -> Iterator[Report]:
    """One report, and as many more as it takes to list all blocks."""
    added_blocks, removed_blocks = _blocks(added), _blocks(removed)
    for start in range(0, max(len(added_blocks), len(removed_blocks), 1), MAX_BLOCKS_A_REPORT):
        part = slice(start, start + MAX_BLOCKS_A_REPORT)
        yield Report(replica_id, stats, added_blocks[part], removed_blocks[part])


def _blocks(content: Iterable[int]) -> list[int]:
    return [block_hash(page_hash) for page_hash in content]
