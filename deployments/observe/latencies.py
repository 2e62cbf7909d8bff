"""`Latencies`: durations as counts in buckets, small enough to keep by the interval and to add up over routers."""

import math
from array import array
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

_STEPS_A_DOUBLING = 16
"""A bucket is 4.4 % wider than the one below, so that a percentile is at most 2.2 % off."""
_SHORTEST_S, _LONGEST_S = 1e-5, 3600.0
_NUM_BUCKETS = math.ceil(_STEPS_A_DOUBLING * math.log2(_LONGEST_S / _SHORTEST_S)) + 1
_EMPTY = bytes(array("I").itemsize * _NUM_BUCKETS)


class Latencies:
    """Durations by bucket, in 1.8 kB of memory. On its way to another process it is smaller: empty buckets stay."""

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        self._counts = array("I", _EMPTY)

    def __reduce__(self) -> "tuple[Callable[[bytes, bytes], Latencies], tuple[bytes, bytes]]":
        counts = self._view()
        (buckets,) = counts.nonzero()
        return _of_buckets, (buckets.astype(np.uint16).tobytes(), counts[buckets].tobytes())

    @property
    def num(self) -> int:
        """Number of durations."""
        return int(self._view().sum())

    def add(self, *durations_s: float) -> None:
        """Count durations in seconds. One outside of 10 µs to an hour counts as the nearer of the two."""
        counts, log2 = self._counts, math.log2
        for duration_s in durations_s:
            ratio = duration_s / _SHORTEST_S
            counts[min(int(_STEPS_A_DOUBLING * log2(ratio)), _NUM_BUCKETS - 1) if ratio > 1.0 else 0] += 1

    def percentile(self, percent: float) -> float | None:
        """The duration in seconds that `percent` of all durations do not exceed; None where there are none.

        Args:
            percent: above 0, at most 100.
        """
        up_to = self._view().cumsum()
        if not up_to[-1]:
            return None
        bucket = int(up_to.searchsorted(math.ceil(int(up_to[-1]) * percent / 100)))
        return _SHORTEST_S * math.exp2((bucket + 0.5) / _STEPS_A_DOUBLING)

    def _view(self) -> npt.NDArray[np.uint32]:
        return np.frombuffer(self._counts, np.uint32)


def sum_of(parts: Iterable[Latencies]) -> Latencies:
    """All durations of several together."""
    total = Latencies()
    counts = total._view()
    for part in parts:
        counts += part._view()
    return total


def _of_buckets(buckets: bytes, counts: bytes) -> Latencies:
    """What `Latencies.__reduce__` took apart."""
    latencies = Latencies()
    latencies._view()[np.frombuffer(buckets, np.uint16)] = np.frombuffer(counts, np.uint32)
    return latencies
