"""`Fleet`: what one router knows about its replicas' loads and caches, kept up to date between their reports too."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from deployments.fleet.policy import ADAPTER_TOKENS, Policy, ReplicaLoad, RoutedRequest
from deployments.fleet.sessions import SessionHomes
from llm.serving.schemas import EngineStats


@dataclass(frozen=True, slots=True)
class RoutingKey:
    """Everything about a request that decides where it should go.

    Attributes:
        num_tokens: tokens to prefill if nothing is cached; at least 1.
        block_hashes: hashes of its full pages, first page first; each covers everything up to its page's end. They are
            kept, not copied.
        session: its session, as in `session_key`; empty for none.
        adapter: digest of its adapter; "" for none.
    """

    num_tokens: int
    block_hashes: Sequence[int] = ()
    session: bytes = b""
    adapter: str = ""


@dataclass(slots=True, eq=False)
class _Replica:
    """One replica.

    Attributes:
        load: its load by its last report, and what this router has seen since.
        blocks: what its prefix cache holds according to its last report.
        unreported: streams that its last report does not count.
        coming: streams whose prompts are or will be cached, although its last report does not say so.
        coming_blocks: the blocks of these streams.
        adapters: digests of the adapters that it holds according to its last report.
        coming_adapters: those of the streams in `coming`.
    """

    load: ReplicaLoad
    blocks: set[int] = field(default_factory=set)
    unreported: dict[int, "_Stream"] = field(default_factory=dict)
    coming: dict[int, "_Stream"] = field(default_factory=dict)
    coming_blocks: set[int] = field(default_factory=set)
    adapters: frozenset[str] = frozenset()
    coming_adapters: set[str] = field(default_factory=set)

    def holds(self, adapter: str) -> bool:
        """Whether a request with this adapter, sent now, finds it there or being read for another request."""
        return adapter in self.adapters or adapter in self.coming_adapters

    def lacks(self, block: int) -> bool:
        """Whether a prompt with this block, sent now, would not find it cached."""
        return block not in self.blocks and block not in self.coming_blocks

    def drop_known_blocks(self) -> None:
        """Drop what a new report already covers: the cached blocks and the adapters of prompts that are prefilled."""
        if any(stream.is_prefilled for stream in self.coming.values()):
            self.coming = {i: stream for i, stream in self.coming.items() if not stream.is_prefilled}
            self.coming_blocks = set().union(*(stream.key.block_hashes for stream in self.coming.values()))
            self.coming_adapters = {stream.key.adapter for stream in self.coming.values()}


@dataclass(slots=True, eq=False)
class _Stream:
    """A request of this router that a replica has, or that is on its way to one.

    Attributes:
        replica: the replica that it belongs to.
        num_new_tokens: tokens that the replica had to prefill for it, as known when it was sent.
        key: what it was routed by.
        is_prefilled: it has its first token, or has ended.
    """

    replica: _Replica
    num_new_tokens: int
    key: RoutingKey
    is_prefilled: bool = False


class Fleet:
    """One router's view of its replicas. Lives on the router's event loop.

    A report says what the replica had when the report was made. Requests of this router that it does not count are
    added. Each report names the streams that arrived since the previous one, so nothing is counted twice or left out,
    however old the report is and however many routers there are. First tokens and ends come through the same channel,
    in order: those seen before a report are in it, and those seen after it are subtracted. If something goes
    differently than expected (another replica took the request, a message was lost), the next report, first token or
    end corrects it.

    Args:
        policy: ranks the replicas.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._replicas: dict[str, _Replica] = {}
        self._streams: dict[int, _Stream] = {}
        self._sessions = SessionHomes()
        self._page_size = 1

    @property
    def replica_ids(self) -> Sequence[str]:
        """Replicas that have reported and have not been removed."""
        return tuple(self._replicas)

    def adapters(self, replica_id: str) -> frozenset[str]:
        """Digests of the adapters that a replica holds according to its last report.

        Raises:
            KeyError: there is no such replica.
        """
        return self._replicas[replica_id].adapters

    def load(self, replica_id: str) -> ReplicaLoad:
        """How busy a replica is. Do not change it; it changes with the fleet.

        Raises:
            KeyError: there is no such replica.
        """
        return self._replicas[replica_id].load

    def report(
        self,
        replica_id: str,
        stats: EngineStats,
        added: Iterable[int],
        removed: Iterable[int],
        is_snapshot: bool,
        received: Iterable[int] = (),
    ) -> None:
        """Take in a replica's state; an unknown replica joins the fleet.

        Args:
            replica_id: the replica.
            stats: statistics of its engine, taken between two steps.
            added: blocks that its prefix cache has gained since its last report.
            removed: blocks that it has evicted.
            is_snapshot: `added` is all that it holds.
            received: streams of this router that have arrived there since its last report.
        """
        replica = self._replicas.get(replica_id)
        if replica is None:
            replica = self._replicas[replica_id] = _Replica(ReplicaLoad(replica_id))
        if is_snapshot:
            replica.blocks.clear()
        replica.blocks.difference_update(removed)
        replica.blocks.update(added)
        replica.drop_known_blocks()
        for stream_id in received:
            self._note_arrival(stream_id, replica)
        replica.adapters = frozenset(stats.adapters)
        self._page_size = stats.page_size
        load, unreported = replica.load, replica.unreported.values()
        load.max_rows = stats.max_rows
        load.num_rows = stats.num_running + stats.num_waiting + len(unreported)
        load.num_prefill_tokens = stats.num_waiting_tokens + sum(stream.num_new_tokens for stream in unreported)

    def remove(self, replica_id: str) -> None:
        """Remove a replica that is gone or shall get nothing more. No effect if it is unknown."""
        self._replicas.pop(replica_id, None)
        self._sessions.forget(replica_id)

    def rank(self, key: RoutingKey) -> list[str]:
        """Ids of the replicas for a request, best first."""
        replicas = list(self._replicas.values())
        num_blocks = _num_cached_blocks(replicas, key.block_hashes)
        num_saved = [self._num_tokens(num_blocks[replica.load.replica_id], key.num_tokens) for replica in replicas]
        if key.adapter:
            for index, replica in enumerate(replicas):
                num_saved[index] -= 0 if replica.holds(key.adapter) else ADAPTER_TOKENS
        request = RoutedRequest(key.num_tokens, num_saved, self._sessions.home(key.session, self._replicas))
        return self._policy.rank([replica.load for replica in replicas], request)

    def sent(self, replica_id: str, stream_id: int, key: RoutingKey) -> None:
        """Note that a request goes to a replica, and counts there until `ended`. No effect if the replica is unknown.

        Args:
            replica_id: where it goes.
            stream_id: the router's number for it, not in use.
            key: as for `rank`.
        """
        replica = self._replicas.get(replica_id)
        if replica is None:
            return
        num_blocks = _num_cached_blocks([replica], key.block_hashes)[replica_id]
        stream = _Stream(replica, key.num_tokens - self._num_tokens(num_blocks, key.num_tokens), key)
        self._streams[stream_id] = replica.unreported[stream_id] = replica.coming[stream_id] = stream
        replica.coming_blocks.update(key.block_hashes)
        replica.coming_adapters.add(key.adapter)
        replica.load.num_rows += 1
        replica.load.num_own_rows += 1
        replica.load.num_prefill_tokens += stream.num_new_tokens
        self._sessions.note(key.session, replica_id)

    def prefilled(self, stream_id: int) -> None:
        """Note that a request has its first token. No effect if it is unknown, or a second time."""
        stream = self._streams.get(stream_id)
        if stream is None or stream.is_prefilled:
            return
        stream.is_prefilled = True
        stream.replica.unreported.pop(stream_id, None)
        load = stream.replica.load
        load.num_prefill_tokens = max(load.num_prefill_tokens - stream.num_new_tokens, 0)

    def ended(self, stream_id: int) -> None:
        """Note that a request has left its replica, done or not. No effect if it is unknown, or a second time."""
        self.prefilled(stream_id)
        stream = self._streams.pop(stream_id, None)
        if stream is not None:
            load = stream.replica.load
            load.num_rows = max(load.num_rows - 1, 0)
            load.num_own_rows -= 1

    def _note_arrival(self, stream_id: int, replica: _Replica) -> None:
        """Reports count this stream from now on; it may have arrived at a replica other than the one it was sent to."""
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        was_unreported = stream.replica.unreported.pop(stream_id, None) is not None
        if stream.replica is replica:
            return
        load = stream.replica.load
        load.num_own_rows -= 1
        if was_unreported:
            load.num_rows -= 1
            load.num_prefill_tokens -= stream.num_new_tokens
        stream.replica = replica
        replica.load.num_own_rows += 1
        self._sessions.note(stream.key.session, replica.load.replica_id)

    def _num_tokens(self, num_blocks: int, num_tokens: int) -> int:
        """Tokens that this many cached blocks save; never a prompt's last token, which must run to draw the next."""
        return min(num_blocks * self._page_size, num_tokens - 1)


def _num_cached_blocks(replicas: Sequence[_Replica], blocks: Sequence[int]) -> dict[str, int]:
    """How many of a prompt's leading blocks each replica holds, by its id.

    A cache that holds a block nearly always holds those before it, so bisection finds the first missing block. Most
    replicas hold as much as some other replica, so one is searched, and then only the replicas that differ from it.
    """
    num_blocks: dict[str, int] = {}
    groups = [(replicas, 0, len(blocks))]  # each replica of a group holds at least the second and at most the third
    while groups:
        group, low, high = groups.pop()
        if not group:
            continue
        found = bisect_left(blocks, True, low, high, key=group[0].lacks)
        fewer = [r for r in group if r.lacks(blocks[found - 1])] if found > low else []
        more = [r for r in group if not r.lacks(blocks[found])] if found < high else []
        num_blocks |= dict.fromkeys([replica.load.replica_id for replica in group], found)
        groups += (fewer, low, found - 1), (more, found + 1, high)
    return num_blocks
