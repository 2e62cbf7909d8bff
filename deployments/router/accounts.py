"""What each API key has used of its limits, as one router counts it."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from deployments.config import KeyLimits
from deployments.router.keys import ApiKey

_MINUTE_S = 60.0


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a key may not ask now.

    Attributes:
        limit: `requests`, `tokens` or `concurrency`.
        message: for people.
        retry_after_s: when it may again, as far as is known.
    """

    limit: str
    message: str
    retry_after_s: float


class Bucket:
    """A token bucket (Turner 1986): it fills evenly over a minute, and what is taken out is gone until then.

    Args:
        capacity: most that it holds, which is what a minute allows.
        now: the time, in seconds.
    """

    def __init__(self, capacity: float, now: float) -> None:
        self.capacity = capacity
        self._level = capacity
        self._at = now

    def level(self, now: float) -> float:
        """What is in it; below zero after more was taken than there was."""
        self._level = min(self.capacity, self._level + (now - self._at) * self.capacity / _MINUTE_S)
        self._at = now
        return self._level

    def take(self, amount: float, now: float) -> None:
        """Take out `amount`, into debt if need be."""
        self._level = self.level(now) - amount

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until it holds `amount`."""
        return max(0.0, amount - self.level(now)) * _MINUTE_S / self.capacity


class Account:
    """One key's use of one router.

    Tokens are counted as they are used: those of the prompt when the request starts, those of the answer when it ends.
    A request may start while there are any left, so one that is larger than a minute's allowance is possible too; it
    leaves a debt that later requests wait for.

    Args:
        limits: this router's share of them.
    """

    def __init__(self, limits: KeyLimits) -> None:
        now = time.monotonic()
        self._requests = Bucket(limits.requests_per_min, now) if limits.requests_per_min else None
        self._tokens = Bucket(limits.tokens_per_min, now) if limits.tokens_per_min else None
        self._max_concurrent = limits.max_concurrent_requests
        self._num_open = 0

    def enter(self) -> Refusal | None:
        """Open a request, which must `leave`; or say why not."""
        now = time.monotonic()
        if self._max_concurrent is not None and self._num_open >= self._max_concurrent:
            return Refusal("concurrency", f"This API key may have {self._max_concurrent} requests open at once", 1.0)
        if self._requests is not None and (wait_s := self._requests.wait_s(1, now)):
            return Refusal("requests", f"Rate limit of {self._requests.capacity:.0f} requests a minute reached", wait_s)
        if self._tokens is not None and (wait_s := self._tokens.wait_s(1, now)):
            return Refusal("tokens", f"Rate limit of {self._tokens.capacity:.0f} tokens a minute reached", wait_s)
        self._num_open += 1
        if self._requests is not None:
            self._requests.take(1, now)
        return None

    def leave(self) -> None:
        """The request is over."""
        self._num_open -= 1

    def charge(self, num_tokens: int) -> None:
        """Count tokens of a prompt or an answer."""
        if self._tokens is not None:
            self._tokens.take(num_tokens, time.monotonic())

    def headers(self) -> dict[str, str]:
        """What is left, in OpenAI's headers (https://platform.openai.com/docs/guides/rate-limits)."""
        now = time.monotonic()
        headers = {}
        for name, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                headers[f"x-ratelimit-limit-{name}"] = f"{bucket.capacity:.0f}"
                headers[f"x-ratelimit-remaining-{name}"] = f"{max(0, math.floor(bucket.level(now)))}"
                headers[f"x-ratelimit-reset-{name}"] = f"{bucket.wait_s(bucket.capacity, now):.3f}s"
        return headers


def open_accounts(keys: Sequence[ApiKey], num_routers: int) -> dict[str, Account]:
    """An account for each key, by its name. Each of several routers has an even share of what the key may do."""
    return {key.name: Account(share(key.limits, num_routers)) for key in keys}


def share(limits: KeyLimits, num_routers: int) -> KeyLimits:
    """One router's part; at least 1 of everything."""
    parts = {name: value and math.ceil(value / num_routers) for name, value in limits.model_dump().items()}
    return KeyLimits(**parts)
