"""The last 15 minutes of a fleet, as its routers saw them: what the fleet page shows again after a reload.

Time is cut into slots of 5 s at the same moments for every router, so that slots of several routers add up.
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deployments.observe.latencies import Latencies, sum_of

SLOT_S = 5
HISTORY_S = 900
_NUM_SLOTS = HISTORY_S // SLOT_S
RECENT_S = 60
_PERCENTS = (50, 90, 99)


@dataclass(slots=True)
class Slot:
    """What happened in one slot.

    Attributes:
        number: Unix time by `SLOT_S`, rounded down.
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
        router_id: whose.
        slots: by time, the latest last.
        totals: the router's own counts, see `Router.counts`.
        model: of which model's requests and replicas.
    """

    router_id: str
    slots: tuple[Slot, ...]
    totals: Mapping[str, int] = field(default_factory=dict)
    model: str = ""


class History:
    """Keeps a router's slots. Lives on the router's event loop. It takes 0.7 MB.

    Args:
        clock: Unix time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._slots: deque[Slot] = deque(maxlen=_NUM_SLOTS)
        self._generated: dict[str, int] = {}
        self._sampled_at: float | None = None

    def note_first_token(self, ttft_s: float) -> None:
        """A request has its first token, so long after it came."""
        self._slot().ttft.add(ttft_s)

    def note_gaps(self, *gaps_s: float) -> None:
        """Streams have more tokens, each so long after the ones before."""
        self._slot().gaps.add(*gaps_s)

    def sample(self, *, num_live: int, num_waiting: int, num_serving: int, generated: Mapping[str, int]) -> None:
        """Note how things stand; to be called every second or so.

        Args:
            num_live: requests of this router that run or wait.
            num_waiting: of these, those that wait for a replica.
            num_serving: replicas that get requests.
            generated: tokens that each replica has generated since it started, by its id.
        """
        slot, now = self._slot(), self._clock()
        if self._sampled_at is not None:
            slot.sampled_s += max(0.0, now - self._sampled_at)
        self._sampled_at = now
        slot.num_live = max(slot.num_live, num_live)
        slot.num_waiting = max(slot.num_waiting, num_waiting)
        slot.num_serving = num_serving if slot.num_serving is None else min(slot.num_serving, num_serving)
        for replica_id, total in generated.items():
            # A replica that is new to this router may have worked for hours: only what it adds from now on counts.
            slot.num_generated_tokens += max(0, total - self._generated.get(replica_id, total))
        self._generated = dict(generated)

    def slots(self) -> tuple[Slot, ...]:
        """The slots of the last 15 minutes in which anything was noted, the present one included."""
        oldest = int(self._clock()) // SLOT_S - _NUM_SLOTS
        return tuple(slot for slot in self._slots if slot.number > oldest)

    def _slot(self) -> Slot:
        number = int(self._clock()) // SLOT_S
        # A clock that was set back goes on in the slot that is there, until it has caught up.
        if not self._slots or self._slots[-1].number < number:
            self._slots.append(Slot(number))
        return self._slots[-1]


def describe(parts: Sequence[RouterHistory], now: float) -> dict[str, Any]:
    """The history of several routers together, as the fleet page gets it. Takes milliseconds; may run in a thread.

    Args:
        parts: one a router and model.
        now: Unix time in seconds.
    """
    by_number: dict[int, dict[str, list[Slot]]] = {}
    for part in parts:
        for slot in part.slots:
            by_number.setdefault(slot.number, {}).setdefault(part.model, []).append(slot)
    points = [_point(number, by_number[number].values()) for number in sorted(by_number)]
    slots = [slot for part in parts for slot in part.slots]
    latest = int(now) // SLOT_S
    recent = [slot for slot in slots if slot.number > latest - RECENT_S // SLOT_S]
    names = {name for part in parts for name in part.totals}
    return {
        "num_routers": len({part.router_id for part in parts}),
        "span_s": HISTORY_S,
        "totals": {name: sum(part.totals.get(name, 0) for part in parts) for name in sorted(names)},
        "points": points,
        "latency": {f"{RECENT_S}": _latency(recent), f"{HISTORY_S}": _latency(slots)},
    }


def _point(number: int, models: Collection[Sequence[Slot]]) -> dict[str, Any]:
    """One slot of all routers, by model. Each router hears of all replicas of a model: what these made is taken from
    the router that sampled longest."""
    slots = [slot for own in models for slot in own]
    sampled = [max(own, key=lambda slot: slot.sampled_s) for own in models]
    paces = [slot.num_generated_tokens / slot.sampled_s for slot in sampled if slot.sampled_s]
    serving = [slot.num_serving for slot in sampled if slot.num_serving is not None]
    return {
        "at": number * SLOT_S,
        "tokens_per_s": round(sum(paces), 1) if paces else None,
        "num_live": sum(slot.num_live for slot in slots),
        "num_waiting": sum(slot.num_waiting for slot in slots),
        "num_serving": sum(serving) if serving else None,
        "ttft_p50_s": _rounded(sum_of(slot.ttft for slot in slots).percentile(50)),
    }


def _latency(slots: Iterable[Slot]) -> dict[str, Any]:
    """Percentiles of time to first token and of gaps, in seconds, and how many of each they are of."""
    slots = list(slots)
    kinds = {"ttft": sum_of(slot.ttft for slot in slots), "gap": sum_of(slot.gaps for slot in slots)}
    return {
        name: {
            "num": latencies.num,
            **{f"p{percent}_s": _rounded(latencies.percentile(percent)) for percent in _PERCENTS},
        }
        for name, latencies in kinds.items()
    }


def _rounded(duration_s: float | None) -> float | None:
    return None if duration_s is None else round(duration_s, 6)
