"""`Latencies`: durations as counts in buckets, small enough to keep by the slot and to add up over routers."""

import math
from collections.abc import Iterable, Mapping

_STEPS_A_DOUBLING = 16
"""A bucket is 4.4 % wider than the one below, so that a percentile is at most 2.2 % off."""
_SHORTEST_S, _LONGEST_S = 1e-5, 3600.0
_LAST_BUCKET = math.ceil(_STEPS_A_DOUBLING * math.log2(_LONGEST_S / _SHORTEST_S))


class Latencies:
    """Durations by bucket. Only the buckets that hold any take memory, and there are fewer than 460 of them.

    Args:
        counts: number of durations by bucket, as another one's `counts` has them.
    """

    __slots__ = ("counts",)

    def __init__(self, counts: Mapping[int, int] | None = None) -> None:
        self.counts: dict[int, int] = dict(counts or {})

    @property
    def num(self) -> int:
        """Number of durations."""
        return sum(self.counts.values())

    def add(self, duration_s: float) -> None:
        """Count a duration in seconds. One outside of 10 µs to an hour counts as the nearer of the two."""
        ratio = duration_s / _SHORTEST_S
        bucket = min(int(_STEPS_A_DOUBLING * math.log2(ratio)), _LAST_BUCKET) if ratio > 1.0 else 0
        self.counts[bucket] = self.counts.get(bucket, 0) + 1

    def percentile(self, percent: float) -> float | None:
        """The duration in seconds that `percent` of all durations do not exceed; None where there are none.

        Args:
            percent: above 0, at most 100.
        """
        num_left = math.ceil(self.num * percent / 100)
        for bucket, count in sorted(self.counts.items()):
            num_left -= count
            if num_left <= 0:
                return _SHORTEST_S * math.exp2((bucket + 0.5) / _STEPS_A_DOUBLING)
        return None


def sum_of(parts: Iterable[Latencies]) -> Latencies:
    """All durations of several together."""
    total = Latencies()
    for part in parts:
        for bucket, count in part.counts.items():
            total.counts[bucket] = total.counts.get(bucket, 0) + count
    return total
