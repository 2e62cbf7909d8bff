"""Which replica a request goes to. Plain values in, an order out: no Ray, no sockets, no clock.

`docs/decisions/0007-routing-by-cost.md` has the reasons and the numbers; `benchmarks/routing_sim.py` measures them.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from deployments.config import PolicyName

ROW_TOKENS = 512
"""Prefill tokens that one more row counts for.

On an H200, a row with 1,024 tokens of context lengthens a step by as much as one prefill token, and a request shares
some 250 steps with it. The request slows that row as much as the row slows the request, hence twice that number.
"""
ADAPTER_TOKENS = 4096
"""Prefill tokens that it counts for if a replica must first load the request's adapter.

An estimate: reading 80 MB of adapter and copying them to the device takes about 0.1 s, in which an H200 prefills some
4,000 tokens of an 8B model. A replica that holds the adapter is therefore preferred until it has 8 rows more.
"""
_HOME_ADVANTAGE = 0.5
"""Share of a row's cost by which the home of a request's session may be dearer than the cheapest replica."""
_MEMORY = 0.98
_MAX_FOREIGN_SHARE = 0.9


@dataclass(slots=True)
class ReplicaLoad:
    """How busy one replica is, as far as one router knows. Only `Fleet` writes it; everything else reads it."""

    replica_id: str
    num_rows: int = 0
    """Requests that it runs or queues, or that are on their way to it."""
    num_own_rows: int = 0
    """How many of those requests this router sent."""
    max_rows: int = 0
    """Most requests that it runs at once."""
    num_prefill_tokens: int = 0
    """Tokens that it must prefill before the first token of a new request."""


@dataclass(frozen=True, slots=True)
class RoutedRequest:
    """What a policy knows of the request for which it ranks replicas."""

    num_tokens: int
    """Tokens of its prompt and of what an earlier replica generated."""
    num_saved_tokens: Sequence[int]
    """For each replica, how many of these tokens its prefix cache holds, less `ADAPTER_TOKENS` if it must load the
    request's adapter."""
    home_id: str | None = None
    """The replica that the request's session belongs to, which wins ties; None without a session."""


class Policy(Protocol):
    """Ranks replicas for one request. One object serves one router; it may remember what it chose."""

    def rank(self, loads: Sequence[ReplicaLoad], request: RoutedRequest) -> list[str]:
        """Ids of all replicas, best first. Called once for each request.

        Args:
            loads: the replicas, in an order that changes only as they come and go.
            request: what is to be routed; its `num_saved_tokens` are in the order of `loads`.
        """
        ...


class CostPolicy:
    """Least cost first. The cost is the tokens to prefill before this request's first token, plus the decode load in
    tokens.

    A cached prefix makes a replica cheaper by its tokens, and a queue makes it more expensive by its tokens. A popular
    prefix therefore spreads as soon as waiting for it costs more than computing it again. The same holds for a popular
    adapter, which costs `ADAPTER_TOKENS` where it is not. Ties go to the replica with the fewest rows, then in turn.

    A session's home goes first if its cost is within half a row's of the least, so never if that means one row more.

    What other routers have sent since the last report is unknown, and routers that know the same and choose the best
    would all choose the same replica. Costs are therefore blurred by up to the cost of a typical request for each other
    router. The share of rows that this router did not send shows how many routers there are. A single router blurs
    nothing.

    Args:
        row_tokens: prefill tokens that one more row counts for.
        seed: seed of the blur and of whose turn is first; None for any.
    """

    def __init__(self, row_tokens: float = ROW_TOKENS, seed: int | None = None) -> None:
        self._row_tokens = row_tokens
        self._random = random.Random(seed)
        self._turn = self._random.randrange(1 << 16)
        self._foreign_share = 0.0
        self._typical_cost = row_tokens

    def rank(self, loads: Sequence[ReplicaLoad], request: RoutedRequest) -> list[str]:
        """See `Policy.rank`."""
        if not loads:
            return []
        num_tokens, num_saved_tokens = request.num_tokens, request.num_saved_tokens
        num_loads, row_tokens, draw = len(loads), self._row_tokens, self._random.random
        blur = self._blur(loads)
        self._turn += 1
        costs = [
            load.num_prefill_tokens + num_tokens - num_saved + row_tokens * load.num_rows
            for load, num_saved in zip(loads, num_saved_tokens, strict=True)
        ]
        turn = self._turn
        order = sorted(
            range(num_loads),
            key=lambda index: (costs[index] + blur * draw(), loads[index].num_rows, (index - turn) % num_loads),
        )
        dearest = min(costs) + _HOME_ADVANTAGE * row_tokens
        order.sort(key=lambda index: loads[index].replica_id != request.home_id or costs[index] > dearest)
        self._typical_cost = _moved(self._typical_cost, num_tokens - num_saved_tokens[order[0]] + row_tokens)
        return [loads[index].replica_id for index in order]

    def _blur(self, loads: Sequence[ReplicaLoad]) -> float:
        """Tokens by which a cost may be off because other routers have sent requests too."""
        num_rows = num_own_rows = 0
        for load in loads:
            num_rows += load.num_rows
            num_own_rows += load.num_own_rows
        if num_rows:
            self._foreign_share = _moved(self._foreign_share, max(1 - num_own_rows / num_rows, 0.0))
        share = min(self._foreign_share, _MAX_FOREIGN_SHARE)
        return self._typical_cost * share / (1 - share)


class RoundRobin:
    """Ranks replicas in turn, whatever the request's session.

    Args:
        seed: seed of whose turn is first; None for any.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._turn = random.Random(seed).randrange(1 << 16)

    def rank(self, loads: Sequence[ReplicaLoad], request: RoutedRequest) -> list[str]:
        """See `Policy.rank`."""
        del request
        replica_ids = [load.replica_id for load in loads]
        self._turn += 1
        first = self._turn % max(len(replica_ids), 1)
        return replica_ids[first:] + replica_ids[:first]


class PowerOfTwoChoices:
    """Of two replicas drawn at random, the one with fewer rows first (Mitzenmacher 2001); then the others as drawn.
    If both have as many, the home of the request's session goes first.

    Args:
        seed: seed of the draws; None for any.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._random = random.Random(seed)

    def rank(self, loads: Sequence[ReplicaLoad], request: RoutedRequest) -> list[str]:
        """See `Policy.rank`."""
        drawn = self._random.sample(loads, len(loads))
        drawn[:2] = sorted(drawn[:2], key=lambda load: (load.num_rows, load.replica_id != request.home_id))
        return [load.replica_id for load in drawn]


def make_policy(name: PolicyName, seed: int | None = None) -> Policy:
    """The policy that a configuration names, for one router."""
    match name:
        case PolicyName.COST:
            return CostPolicy(seed=seed)
        case PolicyName.POWER_OF_TWO:
            return PowerOfTwoChoices(seed)
        case PolicyName.ROUND_ROBIN:
            return RoundRobin(seed)


def _moved(mean: float, value: float) -> float:
    """An exponential moving average after one more value."""
    return _MEMORY * mean + (1 - _MEMORY) * value
