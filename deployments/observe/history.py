"""The last 15 minutes of a fleet, as its routers saw them: what the fleet page shows again after a reload.

Time is cut into intervals of 5 s at the same moments for every router, so that intervals of several routers add up.
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deployments.observe.latencies import Latencies, sum_of

INTERVAL_S = 5
HISTORY_S = 900
_NUM_INTERVALS = HISTORY_S // INTERVAL_S
RECENT_S = 60
_PERCENTS = (50, 90, 99)


@dataclass(slots=True)
class Interval:
    """What happened in one interval.

    Attributes:
        number: Unix time by `INTERVAL_S`, rounded down.
        ttft: of requests whose first token came in it.
        gaps: between one arrival of tokens and the next of the same stream, which ended in it.
        num_generated_tokens: by all replicas, whichever router's requests they ran, within `sampled_s`.
        sampled_s: how long the samples that were taken in it reach back.
        num_live: most requests of the router that ran or waited at a time.
        num_waiting: most of these that waited for a replica.
        num_serving: fewest replicas that got requests.
    """

    number: int
    ttft: Latencies = field(default_factory=Latencies)
    gaps: Latencies = field(default_factory=Latencies)
    num_generated_tokens: int = 0
    sampled_s: float = 0.0
    num_live: int = 0
    num_waiting: int = 0
    num_serving: int | None = None


@dataclass(frozen=True, slots=True)
class RouterHistory:
    """One router's part of the history; travels between routers.

    Attributes:
        router_id: id of the router.
        intervals: by time, the latest last.
        totals: the router's own counts, see `Router.counts`.
        model: key of the model whose requests and replicas it is about.
    """

    router_id: str
    intervals: tuple[Interval, ...]
    totals: Mapping[str, int] = field(default_factory=dict)
    model: str = ""


class History:
    """Keeps a router's intervals. Lives on the router's event loop. It takes 0.7 MB.

    Args:
        clock: Unix time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._intervals: deque[Interval] = deque(maxlen=_NUM_INTERVALS)
        self._generated: dict[str, int] = {}
        self._sampled_at: float | None = None

    def note_first_token(self, ttft_s: float) -> None:
        """Note that a request has its first token, `ttft_s` after it arrived."""
        self._interval().ttft.add(ttft_s)

    def note_gaps(self, *gaps_s: float) -> None:
        """Note the times since the previous tokens of streams that have just got more."""
        self._interval().gaps.add(*gaps_s)

    def sample(self, *, num_live: int, num_waiting: int, num_serving: int, generated: Mapping[str, int]) -> None:
        """Note the current state; call this about once a second.

        Args:
            num_live: requests of this router that run or wait.
            num_waiting: of these, those that wait for a replica.
            num_serving: replicas that get requests.
            generated: tokens that each replica has generated since it started, by its id.
        """
        interval, now = self._interval(), self._clock()
        if self._sampled_at is not None:
            interval.sampled_s += max(0.0, now - self._sampled_at)
        self._sampled_at = now
        interval.num_live = max(interval.num_live, num_live)
        interval.num_waiting = max(interval.num_waiting, num_waiting)
        interval.num_serving = num_serving if interval.num_serving is None else min(interval.num_serving, num_serving)
        for replica_id, total in generated.items():
            # A replica that is new to this router may have worked for hours: only what it adds from now on counts.
            interval.num_generated_tokens += max(0, total - self._generated.get(replica_id, total))
        self._generated = dict(generated)

    def intervals(self) -> tuple[Interval, ...]:
        """The intervals of the last 15 minutes in which anything was noted, the present one included."""
        oldest = int(self._clock()) // INTERVAL_S - _NUM_INTERVALS
        return tuple(interval for interval in self._intervals if interval.number > oldest)

    def _interval(self) -> Interval:
        number = int(self._clock()) // INTERVAL_S
        # A clock that was set back goes on in the interval that is there, until it has caught up.
        if not self._intervals or self._intervals[-1].number < number:
            self._intervals.append(Interval(number))
        return self._intervals[-1]


def describe(parts: Sequence[RouterHistory], now: float) -> dict[str, Any]:
    """The history of several routers together, as the fleet page gets it. Takes milliseconds; may run in a thread.

    Args:
        parts: one for each router and model.
        now: Unix time in seconds.
    """
    by_number: dict[int, dict[str, list[Interval]]] = {}
    for part in parts:
        for interval in part.intervals:
            by_number.setdefault(interval.number, {}).setdefault(part.model, []).append(interval)
    points = [_point(number, by_number[number].values()) for number in sorted(by_number)]
    intervals = [interval for part in parts for interval in part.intervals]
    latest = int(now) // INTERVAL_S
    recent = [interval for interval in intervals if interval.number > latest - RECENT_S // INTERVAL_S]
    names = {name for part in parts for name in part.totals}
    return {
        "num_routers": len({part.router_id for part in parts}),
        "span_s": HISTORY_S,
        "totals": {name: sum(part.totals.get(name, 0) for part in parts) for name in sorted(names)},
        "points": points,
        "latency": {f"{RECENT_S}": _latency(recent), f"{HISTORY_S}": _latency(intervals)},
    }


def _point(number: int, models: Collection[Sequence[Interval]]) -> dict[str, Any]:
    """One interval of all routers, by model. Each router hears of all replicas of a model, so what these generated is
    taken from the router that sampled longest."""
    intervals = [interval for own in models for interval in own]
    sampled = [max(own, key=lambda interval: interval.sampled_s) for own in models]
    paces = [interval.num_generated_tokens / interval.sampled_s for interval in sampled if interval.sampled_s]
    serving = [interval.num_serving for interval in sampled if interval.num_serving is not None]
    return {
        "at": number * INTERVAL_S,
        "tokens_per_s": round(sum(paces), 1) if paces else None,
        "num_live": sum(interval.num_live for interval in intervals),
        "num_waiting": sum(interval.num_waiting for interval in intervals),
        "num_serving": sum(serving) if serving else None,
        "ttft_p50_s": _rounded(sum_of(interval.ttft for interval in intervals).percentile(50)),
    }


def _latency(intervals: Iterable[Interval]) -> dict[str, Any]:
    """Percentiles of time to first token and of gaps, in seconds, and how many of each they are of."""
    intervals = list(intervals)
    kinds = {
        "ttft": sum_of(interval.ttft for interval in intervals),
        "gap": sum_of(interval.gaps for interval in intervals),
    }
    return {
        name: {
            "num": latencies.num,
            **{f"p{percent}_s": _rounded(latencies.percentile(percent)) for percent in _PERCENTS},
        }
        for name, latencies in kinds.items()
    }


def _rounded(duration_s: float | None) -> float | None:
    return None if duration_s is None else round(duration_s, 6)
