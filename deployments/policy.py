"""Which replica a request goes to. Plain values in, an order out: no Ray, no sockets, no clock.

`docs/decisions/0007-routing-by-cost.md` says where the weights come from and what `benchmarks/routing_sim.py` measured.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from deployments.config import PolicyName

ROW_TOKENS = 64
"""Prefill tokens that one more row counts for."""


@dataclass(slots=True)
class ReplicaLoad:
    """How busy one replica is, as one router knows it. Written by `Fleet` alone; everybody else reads."""

    replica_id: str
    num_rows: int = 0
    """Requests that the replica has or that are on the way there, with a row or without."""
    max_rows: int = 0
    """Requests that run there at once."""
    num_prefill_tokens: int = 0
    """Tokens that it must prefill before a new request's first."""
    num_kv_tokens: int = 0
    """Tokens of context that its requests hold in memory, or will once their prompts have run."""
    num_slots: int = 0
    """Tokens of context that its memory holds."""


class Policy(Protocol):
    """Puts replicas in order for one request. One object serves one router; it may remember whom it chose."""

    def rank(self, loads: Sequence[ReplicaLoad], num_tokens: int, num_cached_tokens: Sequence[int]) -> list[str]:
        """Ids of all replicas, best first.

        Args:
            loads: the replicas.
            num_tokens: tokens of the request's prompt, and of what an earlier replica generated.
            num_cached_tokens: for each of `loads`, how many of these its prefix cache holds.
        """
        ...


class CostPolicy:
    """Least cost first: the tokens to prefill until this request's first token, and what its decodes will cost.

    Equal costs go to fewest rows, and equal rows by turns, so that an idle fleet fills evenly.

    Args:
        row_tokens: prefill tokens that one more row counts for.
    """

    def __init__(self, row_tokens: float = ROW_TOKENS, kv_weight: float = 0.0, own_weight: float = 1.0,
                 shortage_weight: float=0.0) -> None:
        self._row_tokens = row_tokens
        self._kv_weight = kv_weight
        self._own = own_weight
        self._short = shortage_weight
        self._turn = random.randrange(1 << 16)

    def rank(self, loads: Sequence[ReplicaLoad], num_tokens: int, num_cached_tokens: Sequence[int]) -> list[str]:
        """See `Policy.rank`."""
        self._turn += 1
        num = len(loads)
        turn = self._turn
        row_tokens, kv_weight, own, short = self._row_tokens, self._kv_weight, self._own, self._short
        keyed = []
        for i, (load, num_cached) in enumerate(zip(loads, num_cached_tokens, strict=True)):
            cost = load.num_prefill_tokens + own*(num_tokens - num_cached) + row_tokens * load.num_rows
            if kv_weight:
                cost += kv_weight * load.num_kv_tokens
            if short:
                cost += short*max(0, load.num_kv_tokens + num_tokens - num_cached - load.num_slots)
            keyed.append((cost, load.num_rows, (i + turn) % num, load.replica_id))
        keyed.sort()
        return [key[3] for key in keyed]


class RoundRobin:
    """In turn."""

    def __init__(self) -> None:
        self._turn = random.randrange(1 << 16)

    def rank(self, loads: Sequence[ReplicaLoad], num_tokens: int, num_cached_tokens: Sequence[int]) -> list[str]:
        """See `Policy.rank`."""
        ids = [load.replica_id for load in loads]
        self._turn += 1
        first = self._turn % len(ids) if ids else 0
        return ids[first:] + ids[:first]


class PowerOfTwoChoices:
    """The one with fewer rows of two drawn at random (Mitzenmacher 2001), then the others as drawn."""

    def __init__(self, seed: int | None = None) -> None:
        self._random = random.Random(seed)

    def rank(self, loads: Sequence[ReplicaLoad], num_tokens: int, num_cached_tokens: Sequence[int]) -> list[str]:
        """See `Policy.rank`."""
        drawn = self._random.sample(loads, len(loads))
        drawn[:2] = sorted(drawn[:2], key=lambda load: load.num_rows)
        return [load.replica_id for load in drawn]


def make_policy(name: PolicyName) -> Policy:
    """The policy that a configuration names."""
    policies: dict[PolicyName, type[Policy]] = {
        PolicyName.COST: CostPolicy,
        PolicyName.POWER_OF_TWO: PowerOfTwoChoices,
        PolicyName.ROUND_ROBIN: RoundRobin,
    }
    return policies[name]()
