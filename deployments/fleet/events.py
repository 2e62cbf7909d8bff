"""What happened in the fleet recently, for people to read."""

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from deployments.fleet.departure import Departure

_KEPT = 100
_KEPT_S = 900.0
_SAME_S = 5.0
_LEFT = {True: "was lost", False: "left"}


class EventLog:
    """The events of the last 15 minutes, newest first, the last 100 at most.

    Args:
        clock: Unix time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._items: deque[dict[str, Any]] = deque(maxlen=_KEPT)

    def add(self, text: str, *, is_bad: bool = False) -> None:
        """Note something that happened now."""
        self._items.appendleft({"at": self._clock(), "text": text, "is_bad": is_bad})

    def count(self, once: str, often: str) -> None:
        """Note something that may happen many times in a few seconds: it makes one item with a count.

        Args:
            once: text for the first time.
            often: text for more, with `{}` for the number.
        """
        now = self._clock()
        for item in self._items:
            if item.get("often") == often and now - item["at"] < _SAME_S:
                item["num"] += 1
                item["text"] = often.format(item["num"])
                return
        self._items.appendleft({"at": now, "text": once, "is_bad": False, "often": often, "num": 1})

    def items(self) -> list[dict[str, Any]]:
        """The events: when (Unix time), what, and whether it is bad."""
        oldest = self._clock() - _KEPT_S
        return [{name: item[name] for name in ("at", "text", "is_bad")} for item in self._items if item["at"] >= oldest]


class FleetRecord:
    """What the fleet page shows of the last 15 minutes: events, and the replicas that left.

    Args:
        clock: Unix time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._departures: deque[dict[str, Any]] = deque(maxlen=_KEPT)
        self.events = EventLog(clock)

    def note_departure(self, replica_id: str, departure: Departure, node: str | None, lived_s: float) -> None:
        """Note that a replica has just left.

        Args:
            replica_id: the replica.
            departure: how and why.
            node: where it ran; None if not known.
            lived_s: seconds since the router first saw it.
        """
        is_failure = departure.cause.is_failure
        self.events.add(f"Replica {replica_id} {_LEFT[is_failure]}: {departure.why}", is_bad=is_failure)
        self._departures.appendleft(
            {
                "at": self._clock(),
                "replica_id": replica_id,
                "node": node,
                "lived_s": round(lived_s, 1),
                "cause": str(departure.cause),
                "is_failure": is_failure,
                "why": departure.why,
            }
        )

    def departures(self) -> list[dict[str, Any]]:
        """Replicas that left, newest first: when (Unix time), which, where it ran, how and why."""
        oldest = self._clock() - _KEPT_S
        return [item for item in self._departures if item["at"] >= oldest]
