"""`Fleet`: what one router knows of its replicas' load and caches, between reports too."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from deployments.policy import Policy, ReplicaLoad
from llm.serving.schemas import EngineStats


@dataclass(slots=True, eq=False)
class _Stream:
    """A request of this router, from the choice of its replica to its end.

    Attributes:
        replica: where it went.
        num_tokens: to prefill, were nothing cached.
        num_new_tokens: to prefill, as far as known when it was sent.
        block_hashes: of its full pages.
        is_prefilled: it has its first token.
    """

    replica: "_Replica"
    num_tokens: int
    num_new_tokens: int
    block_hashes: Sequence[int]
    is_prefilled: bool = False


@dataclass(slots=True, eq=False)
class _Replica:
    """One replica.

    Attributes:
        load: the last report and what has happened since.
        blocks: what its prefix cache holds by its last report.
        unreported: streams that the last report does not count.
        coming: streams whose prompts will be cached and are in no report yet, `coming_blocks` their blocks.
    """

    load: ReplicaLoad
    blocks: set[int] = field(default_factory=set)
    unreported: dict[int, _Stream] = field(default_factory=dict)
    coming: dict[int, _Stream] = field(default_factory=dict)
    coming_blocks: set[int] = field(default_factory=set)


class Fleet:
    """One router's view of its replicas. Lives on the router's event loop.

    A replica's report says what it has; this adds the router's own requests that the report does not count. They are
    known exactly: a report names the streams that arrived since the one before, and it comes through the same ordered
    channel as the tokens, so a stream whose first token or end has been seen is in the next report as such. Requests
    that other routers have just sent are unknown until the next report.

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
        """How busy a replica is now. Read only; it changes as the fleet does.

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
        """Take in a replica's state.

        Args:
            stats: of its engine, between two steps.
            added: hashes of pages that its prefix cache holds since its last report.
            removed: hashes of pages that it holds no more.
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
        for stream_id in received:
            self._arrived(stream_id, replica)
        self._page_size = stats.page_size
        self._forget_prefilled(replica)
        load, unreported = replica.load, replica.unreported.values()
        load.num_prefill_tokens = stats.num_waiting_tokens + sum(stream.num_new_tokens for stream in unreported)
        load.num_rows = stats.num_running + stats.num_waiting + len(unreported)
        load.max_rows = stats.max_rows
        load.num_slots = stats.num_pages * stats.page_size
        load.num_kv_tokens = stats.num_used_pages * stats.page_size + stats.num_waiting_tokens
        load.num_kv_tokens += sum(stream.num_tokens for stream in unreported)

    def remove(self, replica_id: str) -> None:
        """A replica is gone, or gets nothing more. No effect on one that is not there."""
        self._replicas.pop(replica_id, None)

    def rank(self, num_tokens: int, block_hashes: Sequence[int]) -> list[str]:
        """Ids of the replicas for a request, best first.

        Args:
            num_tokens: to prefill, were nothing cached.
            block_hashes: of its full pages, first page first; each names everything up to its page's end.
        """
        replicas = list(self._replicas.values())
        cached = self._num_cached_tokens(replicas, num_tokens, block_hashes)
        return self._policy.rank([replica.load for replica in replicas], num_tokens, cached)

    def sent(self, replica_id: str, stream_id: int, num_tokens: int, block_hashes: Sequence[int]) -> None:
        """A request goes to a replica now; it counts there until `ended`."""
        replica = self._replicas.get(replica_id)
        if replica is None:
            return
        num_new_tokens = num_tokens - self._num_cached_tokens([replica], num_tokens, block_hashes)[0]
        stream = _Stream(replica, num_tokens, num_new_tokens, block_hashes)
        self._streams[stream_id] = replica.unreported[stream_id] = replica.coming[stream_id] = stream
        replica.coming_blocks.update(block_hashes)
        replica.load.num_rows += 1
        replica.load.num_prefill_tokens += num_new_tokens
        replica.load.num_kv_tokens += num_tokens

    def prefilled(self, stream_id: int) -> None:
        """A request has its first token. No effect on one that is unknown."""
        stream = self._streams.get(stream_id)
        if stream is not None and not stream.is_prefilled:
            stream.is_prefilled = True
            stream.replica.unreported.pop(stream_id, None)
            load = stream.replica.load
            load.num_prefill_tokens = max(load.num_prefill_tokens - stream.num_new_tokens, 0)

    def ended(self, stream_id: int) -> None:
        """A request has left its replica. No effect on one that is unknown, or has ended."""
        self.prefilled(stream_id)
        stream = self._streams.pop(stream_id, None)
        if stream is not None:
            load = stream.replica.load
            load.num_rows = max(load.num_rows - 1, 0)
            load.num_kv_tokens = max(load.num_kv_tokens - stream.num_tokens, 0)

    def _arrived(self, stream_id: int, replica: _Replica) -> None:
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        stream.replica.unreported.pop(stream_id, None)
        if stream.replica is not replica:
            stream.replica.coming.pop(stream_id, None)
            stream.replica = replica

    def _forget_prefilled(self, replica: _Replica) -> None:
        """Drop blocks that a report has by now if the replica has them at all."""
        if any(stream.is_prefilled for stream in replica.coming.values()):
            replica.coming = {i: stream for i, stream in replica.coming.items() if not stream.is_prefilled}
            replica.coming_blocks = set().union(*(stream.block_hashes for stream in replica.coming.values()))

    def _num_cached_tokens(self, replicas: Sequence[_Replica], num_tokens: int, block_hashes: Sequence[int]) -> list[int]:
        """For each replica, tokens of a prompt that are cached there by the time it runs; its last one never is."""
        found: dict[int, int] = {}
        groups = [(list(replicas), 0, len(block_hashes))]
        while groups:
            group, low, high = groups.pop()
            if low == high:
                num_cached = min(low * self._page_size, num_tokens - 1)
                for replica in group:
                    found[id(replica)] = num_cached
                continue
            middle = (low + high + 1) // 2
            block = block_hashes[middle - 1]
            having = [replica for replica in group if block in replica.blocks or block in replica.coming_blocks]
            if len(having) == len(group):
                groups.append((group, middle, high))
            elif not having:
                groups.append((group, low, middle - 1))
            else:
                lacking = [r for r in group if not (block in r.blocks or block in r.coming_blocks)]
                groups.append((having, middle, high))
                groups.append((lacking, low, middle - 1))
        return [found[id(replica)] for replica in replicas]
