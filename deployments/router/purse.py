"""`Purse`: how much of one rate of one API key a router holds."""

import math

from deployments.router.bucket import MINUTE_S, Bucket
from deployments.router.leases import Holding, Lease

_PACE_WINDOW_S, _PACE_HALF_LIFE_S = 0.1, 1.0
_HAND_FOR_S = 0.5
"""A router wants to have in hand what it uses in this time, which is twice the time between two exchanges."""
_FRESH_FOR_S = 0.2
"""How long a router believes that nothing is left of a rate before it asks again."""


class Pace:
    """Units per second, as an exponential moving average."""

    def __init__(self, now: float) -> None:
        self._per_s = 0.0
        self._num_units = 0
        self._at = now

    def note(self, num_units: int, now: float) -> None:
        """Note the units since the last call."""
        self._num_units += num_units
        elapsed_s = now - self._at
        if elapsed_s < _PACE_WINDOW_S:
            return
        weight: float = 0.5 ** (elapsed_s / _PACE_HALF_LIFE_S)
        self._per_s = weight * self._per_s + (1 - weight) * self._num_units / elapsed_s
        self._num_units, self._at = 0, now

    def num_ahead(self) -> int:
        """Units worth having in hand."""
        return math.floor(self._per_s * _HAND_FOR_S + 0.5)


class Purse:
    """How much of one rate of one key this router holds.

    Attributes:
        in_hand: units leased and not spent; below zero if units were spent without a lease.
        alone: what would be left if this router were the only one.
    """

    def __init__(self, per_min: int, now: float) -> None:
        self.in_hand = 0
        self.alone = Bucket(per_min, now)
        self._num_spent = 0
        self._num_claimed = 0
        self._pace = Pace(now)
        self._lease: Lease | None = None
        self._heard_at = now
        self._spent_when_heard = 0

    def resize(self, per_min: int, now: float) -> None:
        """Change the limit; what was used still counts."""
        change = per_min - self.alone.capacity
        self.alone.resize(per_min, now)
        if self._lease is not None:
            self._lease = Lease(0, self._lease.level + change, self._lease.remaining + change)

    def spend(self, num_units: int, now: float) -> None:
        """Count units as used."""
        self.in_hand -= num_units
        self._num_spent += num_units
        self.alone.take(num_units, now)

    def holding(self, now: float, *, with_level: bool) -> Holding:
        """Release what is not worth holding, and return what to state."""
        self._pace.note(self._num_spent - self._num_claimed, now)
        self._num_claimed = self._num_spent
        num_spare = self._pace.num_ahead()
        self.in_hand = min(self.in_hand, num_spare)
        level = self._extrapolated(self._lease.level, now) if with_level and self._lease is not None else None
        return Holding(self.in_hand, self._num_spent, num_spare, level)

    def take(self, lease: Lease, now: float) -> None:
        """Add what the accountant has granted in answer to the last `holding`."""
        self.in_hand += lease.num_units
        self._lease = lease
        self._heard_at = now
        self._spent_when_heard = self._num_claimed

    def wait_s(self, now: float) -> float:
        """Seconds until this router can have a unit, as far as it knows."""
        if self._lease is None or self.in_hand >= 1:
            return 0.0
        num_missing = 1 - self.in_hand - self._extrapolated(self._lease.level, now)
        return max(0.0, num_missing) * MINUTE_S / self.alone.capacity

    def is_fresh(self, now: float) -> bool:
        """Whether the accountant has just answered."""
        return self._lease is not None and now - self._heard_at < _FRESH_FOR_S

    def is_low(self) -> bool:
        """Whether it is time to ask for more."""
        return self.in_hand < 0 or self.in_hand < self._pace.num_ahead() // 2

    def remaining(self, now: float) -> float:
        """What all routers together have left, as far as this one knows."""
        if self._lease is None:
            return self.alone.level(now)
        spent = self._num_spent - self._spent_when_heard
        return self._extrapolated(self._lease.remaining, now) - spent

    def _extrapolated(self, level: float, now: float) -> float:
        return min(self.alone.capacity, level + (now - self._heard_at) * self.alone.capacity / MINUTE_S)


def resized(purse: Purse | None, per_min: int | None, now: float) -> Purse | None:
    """The purse for a limit that may have changed; None if there is no limit."""
    if per_min is None:
        return None
    if purse is None:
        return Purse(per_min, now)
    if purse.alone.capacity != per_min:
        purse.resize(per_min, now)
    return purse
