"""`Fleet`: what one router knows of its replicas' loads and caches, up to date between their reports too."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from deployments.fleet.policy import Policy, ReplicaLoad
from llm.serving.schemas import EngineStats


@dataclass(slots=True, eq=False)
class _Replica:
    """One replica.

    Attributes:
        load: its last report, and what this router has seen since.
        blocks: what its prefix cache holds by its last report.
        unreported: streams that its last report does not count.
        coming: streams whose prompts its last report does not know as cached, though they are or will be.
        coming_blocks: the blocks of these.
    """

    load: ReplicaLoad
    blocks: set[int] = field(default_factory=set)
    unreported: dict[int, "_Stream"] = field(default_factory=dict)
    coming: dict[int, "_Stream"] = field(default_factory=dict)
    coming_blocks: set[int] = field(default_factory=set)

    def lacks(self, block: int) -> bool:
        """Whether a prompt with this block, sent now, would not find it cached."""
        return block not in self.blocks and block not in self.coming_blocks

    def drop_known_blocks(self) -> None:
        """A report has come: it knows what prompts that are through have left in the cache."""
        if any(stream.is_prefilled for stream in self.coming.values()):
            self.coming = {i: stream for i, stream in self.coming.items() if not stream.is_prefilled}
            self.coming_blocks = set().union(*(stream.block_hashes for stream in self.coming.values()))


@dataclass(slots=True, eq=False)
class _Stream:
    """A request of this router that a replica has, or that is on its way there.

    Attributes:
        replica: whose it is.
        num_new_tokens: what the replica had to prefill for it, as known when it was sent.
        block_hashes: of its full pages.
        is_prefilled: it has its first token, or has ended.
    """

    replica: _Replica
    num_new_tokens: int
    block_hashes: Sequence[int]
    is_prefilled: bool = False


class Fleet:
    """One router's view of its replicas. Lives on the router's event loop.

    A replica's report says what it had when it was made. Requests of this router that it does not count are added:
    it names the streams that have arrived since the report before, so nothing is counted twice or not at all, however
    old it is and however many routers there are. First tokens and ends come through the same channel, in order: those
    seen before a report are in it, those seen after it are taken off. Whatever goes another way than expected
    (another replica took the request, a message is lost) is put right by the next report, first token or end.

    Args:
        policy: puts the replicas in order.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._replicas: dict[str, _Replica] = {}
        self._streams: dict[int, _Stream] = {}
        self._page_size = 1

    @property
    def replica_ids(self) -> Sequence[str]:
        """Replicas that have reported and have not been removed."""
        return tuple(self._replicas)

    def load(self, replica_id: str) -> ReplicaLoad:
        """How busy a replica is. Read only; it changes as the fleet does.

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
        """Take in a replica's state; one that is unknown joins the fleet.

        Args:
            replica_id: whose.
            stats: of its engine, between two steps.
            added: blocks that its prefix cache has gained since its last report.
            removed: blocks that it has given up.
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
        self._page_size = stats.page_size
        load, unreported = replica.load, replica.unreported.values()
        load.max_rows = stats.max_rows
        load.num_rows = stats.num_running + stats.num_waiting + len(unreported)
        load.num_prefill_tokens = stats.num_waiting_tokens + sum(stream.num_new_tokens for stream in unreported)

    def remove(self, replica_id: str) -> None:
        """A replica is gone, or shall get nothing more. No effect on one that is unknown."""
        self._replicas.pop(replica_id, None)

    def rank(self, num_tokens: int, block_hashes: Sequence[int]) -> list[str]:
        """Ids of the replicas for a request, best first.

        Args:
            num_tokens: to prefill if nothing is cached; at least 1.
            block_hashes: of its full pages, first page first; each one names everything up to its page's end.
        """
        replicas = list(self._replicas.values())
        num_blocks = _num_cached_blocks(replicas, block_hashes)
        num_cached = [self._num_tokens(num_blocks[replica.load.replica_id], num_tokens) for replica in replicas]
        return self._policy.rank([replica.load for replica in replicas], num_tokens, num_cached)

    def sent(self, replica_id: str, stream_id: int, num_tokens: int, block_hashes: Sequence[int]) -> None:
        """A request goes to a replica; it counts there until `ended`. No effect where the replica is unknown.

        Args:
            replica_id: where to.
            stream_id: the router's number for it, not in use.
            num_tokens, block_hashes: as for `rank`. The hashes are kept, not copied.
        """
        replica = self._replicas.get(replica_id)
        if replica is None:
            return
        num_blocks = _num_cached_blocks([replica], block_hashes)[replica_id]
        stream = _Stream(replica, num_tokens - self._num_tokens(num_blocks, num_tokens), block_hashes)
        self._streams[stream_id] = replica.unreported[stream_id] = replica.coming[stream_id] = stream
        replica.coming_blocks.update(block_hashes)
        replica.load.num_rows += 1
        replica.load.num_own_rows += 1
        replica.load.num_prefill_tokens += stream.num_new_tokens

    def prefilled(self, stream_id: int) -> None:
        """A request has its first token. No effect on one that is unknown, nor a second time."""
        stream = self._streams.get(stream_id)
        if stream is None or stream.is_prefilled:
            return
        stream.is_prefilled = True
        stream.replica.unreported.pop(stream_id, None)
        load = stream.replica.load
        load.num_prefill_tokens = max(load.num_prefill_tokens - stream.num_new_tokens, 0)

    def ended(self, stream_id: int) -> None:
        """A request has left its replica, done or not. No effect on one that is unknown, nor a second time."""
        self.prefilled(stream_id)
        stream = self._streams.pop(stream_id, None)
        if stream is not None:
            load = stream.replica.load
            load.num_rows = max(load.num_rows - 1, 0)
            load.num_own_rows -= 1

    def _note_arrival(self, stream_id: int, replica: _Replica) -> None:
        """A report counts this stream from now on; it may be at another replica than the one it was sent to."""
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

    def _num_tokens(self, num_blocks: int, num_tokens: int) -> int:
        """Tokens that so many cached blocks save; never a prompt's last, which must run to draw the next."""
        return min(num_blocks * self._page_size, num_tokens - 1)


def _num_cached_blocks(replicas: Sequence[_Replica], blocks: Sequence[int]) -> dict[str, int]:
    """How many of a prompt's leading blocks each replica holds, by its id.

    A cache that holds a block nearly always holds those before it, so the first that is missing is found by bisection.
    Most replicas hold as much as some other, so one is searched, and of the others only those that differ from it.
    """
    num_blocks: dict[str, int] = {}
    groups = [(replicas, 0, len(blocks))]  # none of a group holds less than the second or more than the third
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
