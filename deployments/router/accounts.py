"""How much of each API key's limits one router holds, and how much its requests use."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakSet

from deployments.router.bucket import MINUTE_S
from deployments.router.keys import ApiKey
from deployments.router.leases import Claim, Grant, Holding, Quota
from deployments.router.purse import Pace, Purse, resized

LIMIT_HEADERS = tuple(
    f"x-ratelimit-{what}-{name}" for name in ("requests", "tokens") for what in ("limit", "remaining", "reset")
)
_ROUNDING = 1e-6
REVOKED = "The API key of this request has been revoked"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a key may not make a request now.

    Attributes:
        limit: `requests`, `tokens`, `concurrency` or `insufficient_quota`.
        message: the reason, for people.
        retry_after_s: seconds until it may again, as far as is known.
        code: kind of error.
    """

    limit: str
    message: str
    retry_after_s: float
    code: str = "rate_limit_exceeded"


class Revocable(Protocol):
    """Work that ends when its key is revoked."""

    def revoke(self, why: str) -> None:
        """End with an error that says why. No effect once it has ended."""
        ...


class Account:
    """One key's use of one router. Only the methods here write its fields, on the router's event loop.

    Tokens are counted as they are used: the prompt's when the request starts, the answer's when it ends. A request may
        start while any tokens are left, so it may be larger than a minute's allowance; it then leaves a debt that later
        requests wait for.

    Args:
        key: whose account it is.
        clock: seconds; monotonic.
        on_need: called when the accountant should hear of this account soon.

    Attributes:
        key: the key as now configured.
        num_open: number of running requests.
    """

    def __init__(
        self, key: ApiKey, clock: Callable[[], float] = time.monotonic, on_need: Callable[[], None] = lambda: None
    ) -> None:
        self.key = key
        self.num_open = 0
        self._clock = clock
        self._on_need = on_need
        self._requests: Purse | None = None
        self._tokens: Purse | None = None
        self._num_permits = 0
        self._most_idle_permits = 0
        self._num_entered = 0
        self._num_entered_claimed = 0
        self._pace = Pace(clock())
        self._is_changed = False
        self._is_revoked = False
        self._why_revoked = REVOKED
        self._open_work: WeakSet[Revocable] = WeakSet()
        self.change_key(key)

    @property
    def is_limited(self) -> bool:
        """Whether there is anything to count."""
        return self._quota() != Quota()

    @property
    def has_news(self) -> bool:
        """Whether the accountant should hear of this account, because it holds something or has changed."""
        holds = self._num_permits > 0 or any(purse.in_hand for _, purse in self._purses())
        return self.is_limited and (self._is_changed or holds)

    def change_key(self, key: ApiKey) -> None:
        """Take another secret or other limits; what has been used still counts."""
        now = self._clock()
        self.key = key
        self._is_revoked = False
        self._requests = resized(self._requests, key.limits.requests_per_min, now)
        self._tokens = resized(self._tokens, key.limits.tokens_per_min, now)
        self._is_changed = True

    def watch(self, work: Revocable, digest: bytes) -> None:
        """Have `work` end if its key is revoked while it runs, or now if the key has already been revoked.

        Args:
            work: what runs.
            digest: digest of the secret that the work's request came with.
        """
        if self._is_revoked or digest != self.key.digest:
            work.revoke(self._why_revoked)
        else:
            self._open_work.add(work)

    def revoke(self, *, is_gone: bool, why: str) -> int:
        """End everything that runs with the present secret; returns how many requests that was.

        Args:
            is_gone: the key has no other secret for now.
            why: what to tell the clients.
        """
        self._is_revoked = is_gone
        self._why_revoked = why
        open_work = list(self._open_work)
        self._open_work.clear()
        for work in open_work:
            work.revoke(why)
        return len(open_work)

    def try_enter(self) -> bool:
        """Open a request, which must `leave` later, if what is in hand allows it."""
        if self.key.limits.max_concurrent_requests is not None and self._num_permits <= self.num_open:
            return False
        if any(purse.in_hand < 1 for _, purse in self._purses()):
            return False
        self._enter()
        return True

    def try_enter_alone(self) -> Refusal | None:
        """Open a request, which must `leave` later, if the limits would allow it to a lone router, or say why not."""
        now, limit = self._clock(), self.key.limits.max_concurrent_requests
        if limit is not None and self.num_open >= limit:
            return _too_many_open(limit)
        for name, purse in self._purses():
            if wait_s := purse.alone.wait_s(1, now):
                return _too_fast(name, purse, wait_s)
        self._enter()
        return None

    def is_half_used(self, num_entering: int = 0) -> bool:
        """Whether the key has used half of a limit or more, so that the rest is for requests that do not wait.

        Args:
            num_entering: requests that are about to be opened.
        """
        limit, now = self.key.limits.max_concurrent_requests, self._clock()
        if limit is not None and self.num_open + num_entering >= max(limit // 2, 1):
            return True
        return any(purse.remaining(now) - num_entering < purse.alone.capacity / 2 for _, purse in self._purses())

    def leave(self) -> None:
        """Close a request that has ended."""
        self.num_open -= 1
        self._is_changed = True
        num_idle = self._num_permits - self.num_open
        if self.key.limits.max_concurrent_requests is not None and num_idle > self._num_spare_permits():
            self._on_need()  # another router may be waiting for the permit

    def charge(self, num_tokens: int) -> None:
        """Count tokens of a prompt or an answer."""
        if self._tokens is not None and num_tokens:
            self._tokens.spend(num_tokens, self._clock())
            self._note_spending(self._tokens)

    def drop_idle_permits(self) -> None:
        """Hold only the permits of open requests: the accountant may take this router for gone."""
        self._num_permits = self.num_open

    def touch(self) -> None:
        """Have the accountant hear of this account with the next exchange."""
        self._is_changed = True

    def claim(self, num_waiting: int, *, with_level: bool) -> Claim:
        """Release what is not worth holding, and return what to state to the accountant."""
        now = self._clock()
        self._pace.note(self._num_entered - self._num_entered_claimed, now)
        self._num_entered_claimed = self._num_entered
        num_kept = min(self._num_permits, self.num_open + self._num_spare_permits())
        self._num_permits = max(self.num_open, num_kept)
        self._is_changed = False
        holdings = [
            purse.holding(now, with_level=with_level) if purse is not None else Holding()
            for purse in (self._requests, self._tokens)
        ]
        num_spare = self._pace.num_ahead()
        return Claim(self.key.name, self._quota(), num_waiting, self.num_open, self._num_permits, num_spare, *holdings)

    def take(self, grant: Grant) -> None:
        """Add what the accountant has granted in answer to the last `claim`."""
        now = self._clock()
        self._num_permits += grant.num_permits
        self._most_idle_permits = grant.most_idle_permits
        for purse, lease in ((self._requests, grant.requests), (self._tokens, grant.tokens)):
            if purse is not None and lease is not None:
                purse.take(lease, now)

    def refusal(self) -> Refusal:
        """Why `try_enter` does not open a request."""
        now, limit = self._clock(), self.key.limits.max_concurrent_requests
        if limit is not None and self._num_permits <= self.num_open:
            return _too_many_open(limit)
        for name, purse in self._purses():
            if wait_s := purse.wait_s(now):
                return _too_fast(name, purse, wait_s)
        return Refusal("requests", "Other requests of this API key came first; try again", 1.0)

    def fresh_refusal(self) -> Refusal | None:
        """Why a request cannot be opened, if the accountant has just said so and need not be asked again."""
        now = self._clock()
        for name, purse in self._purses():
            if purse.is_fresh(now) and (wait_s := purse.wait_s(now)):
                return _too_fast(name, purse, wait_s)
        return None

    def headers(self) -> dict[str, str]:
        """What is left, in OpenAI's headers, `LIMIT_HEADERS` (https://platform.openai.com/docs/guides/rate-limits)."""
        now, headers = self._clock(), {}
        for name, purse in self._purses():
            capacity, remaining = purse.alone.capacity, purse.remaining(now)
            headers[f"x-ratelimit-limit-{name}"] = f"{capacity:.0f}"
            headers[f"x-ratelimit-remaining-{name}"] = f"{max(0, math.floor(remaining + _ROUNDING))}"
            headers[f"x-ratelimit-reset-{name}"] = f"{max(0.0, capacity - remaining) * MINUTE_S / capacity:.3f}s"
        return headers

    def _enter(self) -> None:
        self.num_open += 1
        self._num_permits = max(self._num_permits, self.num_open)
        self._num_entered += 1
        self._is_changed = True
        if self._requests is not None:
            self._requests.spend(1, self._clock())
            self._note_spending(self._requests)

    def _num_spare_permits(self) -> int:
        """Idle permits that are worth holding, and may be held."""
        return min(self._pace.num_ahead(), self._most_idle_permits)

    def _note_spending(self, purse: Purse) -> None:
        self._is_changed = True
        if purse.is_low():
            self._on_need()

    def _quota(self) -> Quota:
        limits = self.key.limits
        return Quota(limits.requests_per_min, limits.tokens_per_min, limits.max_concurrent_requests)

    def _purses(self) -> Iterator[tuple[str, Purse]]:
        if self._requests is not None:
            yield "requests", self._requests
        if self._tokens is not None:
            yield "tokens", self._tokens


def _too_many_open(limit: int) -> Refusal:
    return Refusal("concurrency", f"This API key may have {limit} requests open at once", 1.0)


def _too_fast(name: str, purse: Purse, wait_s: float) -> Refusal:
    return Refusal(name, f"Rate limit of {purse.alone.capacity:.0f} {name} a minute reached", wait_s)
