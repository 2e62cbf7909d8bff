"""`Accountant`: what each API key may still do, counted in one place for all routers.

A router leases units of a key's rates and permits for its open requests, and spends them without asking. Each exchange
states what the router holds, in absolute figures, and the reply adds to that. An exchange that is lost, late or
repeated therefore changes nothing: the next one corrects both sides. All routers together hold at most `MAX_IDLE_SHARE`
of a limit idle; a router that needs more at once asks for it by its number of waiting requests.

An accountant that restarts learns from the routers what they hold and how much of each limit was left. It grants
nothing until it has heard from all of them, or `RECOVERY_S` has passed.
"""

import math
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from deployments.router.bucket import Bucket
from deployments.router.leases import Ask, Claim, Grant, Holding, Lease, Quota, Reply

MAX_IDLE_SHARE = 0.05
"""Share of a limit that all routers together may hold without using it."""
LEASE_S = 10.0
"""A router that is silent for this long no longer holds anything."""
RECOVERY_S = 3.0

_TIDY_INTERVAL_S = 1.0
_ROUNDING = 1e-6


@dataclass(slots=True)
class _Purse:
    in_hand: int
    num_spent: int
    num_entering: int = 0
    """How much of `in_hand` the router spends at once."""

    @property
    def num_idle(self) -> int:
        return max(0, self.in_hand - self.num_entering)


class _SharedRate:
    """One rate of one key, and what each router holds of it."""

    def __init__(self, per_min: int, now: float) -> None:
        self.bucket = Bucket(per_min, now)
        self._purses: dict[str, _Purse] = {}

    def hear(self, router_id: str, holding: Holding, now: float) -> None:
        """Take in what a router holds. Units that it was granted, has not spent and does not hold go back."""
        known = self._purses.get(router_id)
        if known is not None:
            num_spent = holding.num_spent - known.num_spent
            self.bucket.take(-(known.in_hand - num_spent - holding.in_hand), now)
        if holding.level is not None:
            self.bucket.lower_to(holding.level, now)
        self._purses[router_id] = _Purse(holding.in_hand, holding.num_spent)

    def settle(self, router_id: str, now: float) -> int:
        """Take out of the bucket what a router has spent without a lease; returns how much."""
        purse = self._purses[router_id]
        debt = max(0, -purse.in_hand)
        self._move(purse, debt, now)
        return debt

    def available(self, router_id: str, now: float) -> int:
        """What a router without debts could have in hand."""
        return self._purses[router_id].in_hand + max(0, math.floor(self.bucket.level(now) + _ROUNDING))

    def lease(self, router_id: str, num_needed: int, num_spare: int, num_spent_at_once: int, now: float) -> int:
        """Lease enough to have `num_needed` in hand, and up to `num_spare` more units while no more than the allowed
        share of the limit is idle; returns how many.

        Args:
            num_needed: at most `available`.
            num_spent_at_once: how many of these are spent at once and so are not idle.
        """
        purse = self._purses[router_id]
        num_missing = max(0, num_needed - purse.in_hand)
        self._move(purse, num_missing, now)
        purse.num_entering = num_spent_at_once
        most_idle = math.floor(self.bucket.capacity * MAX_IDLE_SHARE)
        idle = purse.num_idle
        room = min(most_idle // len(self._purses), most_idle - self._num_idle_elsewhere(purse)) - idle
        level = math.floor(self.bucket.level(now) + _ROUNDING)
        extra = max(0, min(num_spare - idle, room, level))
        self._move(purse, extra, now)
        return num_missing + extra

    def report(self, router_id: str, num_units: int, now: float) -> Lease:
        """What to tell a router that has just been granted `num_units`."""
        level, purse = self.bucket.level(now), self._purses[router_id]
        return Lease(num_units, level, level + purse.in_hand + self._num_idle_elsewhere(purse))

    def forget(self, router_id: str) -> None:
        """Note that a router no longer holds anything."""
        self._purses.pop(router_id, None)

    def _num_idle_elsewhere(self, purse: _Purse) -> int:
        return sum(other.num_idle for other in self._purses.values()) - purse.num_idle

    def _move(self, purse: _Purse, num_units: int, now: float) -> None:
        self.bucket.take(num_units, now)
        purse.in_hand += num_units


class _SharedPermits:
    """How many requests of one key may be open, and what each router holds for them."""

    def __init__(self) -> None:
        self._held: dict[str, int] = {}
        self._idle: dict[str, int] = {}

    def hear(self, router_id: str, num_permits: int, num_open: int) -> None:
        """Take in what a router holds."""
        self._held[router_id] = num_permits
        self._idle[router_id] = max(0, num_permits - num_open)

    def most_idle(self, limit: int) -> int:
        """Idle permits that each router may hold."""
        return math.floor(limit * MAX_IDLE_SHARE) // max(1, len(self._held))

    def num_free(self, limit: int) -> int:
        """Permits that no router holds."""
        return max(0, limit - sum(self._held.values()))

    def lease(self, router_id: str, num_busy: int, num_spare: int, limit: int) -> int:
        """Lease enough to have `num_busy`, and up to `num_spare` idle ones while no more than the allowed share of the
        limit is idle; returns how many."""
        held = self._held[router_id]
        num_missing = max(0, num_busy - held)
        idle = held + num_missing - num_busy
        idle_elsewhere = sum(self._idle.values()) - self._idle[router_id]
        room = min(self.most_idle(limit), math.floor(limit * MAX_IDLE_SHARE) - idle_elsewhere) - idle
        extra = max(0, min(num_spare - idle, room, self.num_free(limit) - num_missing))
        self._held[router_id] = held + num_missing + extra
        self._idle[router_id] = idle + extra
        return num_missing + extra

    def forget(self, router_id: str) -> None:
        """Note that a router no longer holds anything."""
        self._held.pop(router_id, None)
        self._idle.pop(router_id, None)


class _Book:
    """Everything about one key."""

    def __init__(self) -> None:
        self.quota = Quota()
        self.router_ids: set[str] = set()
        self._requests: _SharedRate | None = None
        self._tokens: _SharedRate | None = None
        self._permits = _SharedPermits()

    def hear(self, router_id: str, claim: Claim, now: float) -> None:
        """Take in what a router holds, and the limits as the router last read them."""
        self.quota = claim.quota
        self._requests = _resized(self._requests, claim.quota.requests_per_min, now)
        self._tokens = _resized(self._tokens, claim.quota.tokens_per_min, now)
        self.router_ids.add(router_id)
        self._permits.hear(router_id, claim.num_permits, claim.num_open)
        for rate, holding in ((self._requests, claim.requests), (self._tokens, claim.tokens)):
            if rate is not None:
                rate.hear(router_id, holding, now)

    def grant(self, router_id: str, claim: Claim, now: float) -> Grant:
        """Give a router what its waiting requests need, for each request all of it or nothing, and some to spare."""
        requests, tokens, limit = self._requests, self._tokens, self.quota.max_concurrent_requests
        num_settled = [rate.settle(router_id, now) if rate is not None else 0 for rate in (requests, tokens)]
        num_entering = claim.num_waiting
        if limit is not None:
            num_entering = min(num_entering, claim.num_permits - claim.num_open + self._permits.num_free(limit))
        if requests is not None:
            num_entering = min(num_entering, requests.available(router_id, now))
        if tokens is not None and tokens.available(router_id, now) < 1:
            num_entering = 0
        num_permits, most_idle_permits, leased_requests, leased_tokens = 0, 0, None, None
        if limit is not None:
            num_permits = self._permits.lease(router_id, claim.num_open + num_entering, claim.num_spare_permits, limit)
            most_idle_permits = self._permits.most_idle(limit)
        if requests is not None:
            num_units = requests.lease(router_id, num_entering, claim.requests.num_spare, num_entering, now)
            leased_requests = requests.report(router_id, num_settled[0] + num_units, now)
        if tokens is not None:  # entering requires one unit in hand; the cost is known later
            num_units = tokens.lease(router_id, min(1, num_entering), claim.tokens.num_spare, 0, now)
            leased_tokens = tokens.report(router_id, num_settled[1] + num_units, now)
        return Grant(claim.key, num_permits, most_idle_permits, leased_requests, leased_tokens)

    def forget(self, router_id: str) -> None:
        """Note that a router no longer holds anything."""
        self.router_ids.discard(router_id)
        self._permits.forget(router_id)
        for rate in (self._requests, self._tokens):
            if rate is not None:
                rate.forget(router_id)

    def is_blank(self, now: float) -> bool:
        """Whether a new book would say the same."""
        rates = [rate for rate in (self._requests, self._tokens) if rate is not None]
        return not self.router_ids and all(rate.bucket.level(now) >= rate.bucket.capacity for rate in rates)


class Accountant:
    """Leases every key's limits to the routers. The only writer is `exchange`, which takes one call at a time.

    Args:
        num_routers: number of routers that must state their holdings before it grants anything.
        clock: seconds; monotonic.
    """

    def __init__(self, num_routers: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._incarnation = uuid.uuid4().hex
        self._num_routers = num_routers
        self._recovers_until = clock() + RECOVERY_S
        self._acquainted: set[str] = set()
        self._numbers: dict[str, int] = {}
        self._heard_at: dict[str, float] = {}
        self._books: dict[str, _Book] = {}
        self._tidied_at = clock()

    def exchange(self, ask: Ask) -> Reply:
        """Take in what a router holds and give it what it needs, as far as the limits allow."""
        now = self._clock()
        self._tidy(now)
        if ask.number <= self._numbers.get(ask.router_id, -1):
            return Reply(self._incarnation)
        self._numbers[ask.router_id] = ask.number
        self._heard_at[ask.router_id] = now
        is_acquainted = ask.incarnation == self._incarnation
        for claim in ask.claims:
            self._books.setdefault(claim.key, _Book()).hear(ask.router_id, claim, now)
        if is_acquainted:
            self._acquainted.add(ask.router_id)
        is_recovering = len(self._acquainted) < self._num_routers and now < self._recovers_until
        if is_recovering or not is_acquainted:
            return Reply(self._incarnation, is_recovering)
        grants = [self._books[claim.key].grant(ask.router_id, claim, now) for claim in ask.claims]
        self._drop_empty_claims(ask.router_id, ask.claims)
        return Reply(self._incarnation, False, grants)

    def _drop_empty_claims(self, router_id: str, claims: Iterable[Claim]) -> None:
        """Drop empty claims: a router that holds nothing of a key has no share in what may be idle."""
        for claim in claims:
            wants = claim.num_waiting or claim.num_spare_permits or claim.requests.num_spare or claim.tokens.num_spare
            if not wants and not claim.num_permits and claim.requests.in_hand <= 0 and claim.tokens.in_hand <= 0:
                self._books[claim.key].forget(router_id)

    def _tidy(self, now: float) -> None:
        """Forget silent routers, and keys that nobody has used for a minute."""
        if now - self._tidied_at < _TIDY_INTERVAL_S:
            return
        self._tidied_at = now
        for router_id in [r for r, heard_at in self._heard_at.items() if now - heard_at > LEASE_S]:
            del self._heard_at[router_id], self._numbers[router_id]
            for book in self._books.values():
                book.forget(router_id)
        for key in [key for key, book in self._books.items() if book.is_blank(now)]:
            del self._books[key]


def _resized(rate: _SharedRate | None, per_min: int | None, now: float) -> _SharedRate | None:
    if per_min is None:
        return None
    if rate is None:
        return _SharedRate(per_min, now)
    if rate.bucket.capacity != per_min:
        rate.bucket.resize(per_min, now)
    return rate
