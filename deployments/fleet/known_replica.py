"""`KnownReplica`: what a router knows about one replica."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import msgspec

from deployments.channel.messages import Condition, Machine
from deployments.fleet.departure import Departure, Traces
from deployments.fleet.verdict import Standing, Verdict
from llm.serving.schemas import EngineStats

_TOLD_BY_CALL_S = 30.0
"""A call that failed at most this long before a replica's end may tell why it ended."""


@dataclass(slots=True)
class KnownReplica:
    """What is known about one replica. `FleetWatch` writes it, and times are on its clock; None means never."""

    joined_at: float
    since: float
    delisted_at: float | None = None
    """When it was taken off the list."""
    was_serving: bool = False
    """Whether it got new requests when it was delisted."""
    silence_then_s: float = 0.0
    """How long it had been silent when it was delisted."""
    heard_at: float | None = None
    stats: EngineStats | None = None
    condition: Condition = field(default_factory=Condition)
    call_failed_at: float | None = None
    call_error: str = ""
    """Why the last failed call failed."""
    departure: Departure | None = None
    """Set once it has left."""
    asked_to_stay_at: float = -math.inf
    standing: Standing = Standing.STARTING
    """The standing that the event log last showed."""

    def silence_s(self, now: float) -> float:
        """Seconds since its last report, or since the router began to listen if there has been none."""
        return now - (self.since if self.heard_at is None else self.heard_at)

    def forgive(self, absence_s: float, now: float) -> None:
        """Discount `absence_s` seconds in which the listener itself was not running."""
        self.since = min(self.since + absence_s, now)
        if self.heard_at is not None:
            self.heard_at = min(self.heard_at + absence_s, now)

    def traces(self, now: float, silence_timeout_s: float, *, is_updating: bool, is_autoscaled: bool) -> Traces:
        """The evidence of how it ended."""
        is_call_recent = self.call_failed_at is not None and now - self.call_failed_at < _TOLD_BY_CALL_S
        return Traces(
            self.condition,
            self.call_error if is_call_recent else None,
            self.silence_then_s,
            silence_timeout_s,
            is_updating,
            is_autoscaled,
        )

    def describe(self, verdict: Verdict, now: float) -> dict[str, Any]:
        """Its last report and the verdict on it, for people and for metrics. There must have been a report."""
        assert self.stats is not None, "only what has reported is shown"
        return {
            **asdict(self.stats),
            "age_s": round(self.silence_s(now), 3),
            "is_serving": verdict.may_get_new,
            "state": str(verdict.standing),
            "why": verdict.why if self.departure is None else self.departure.why,
            "machine": _described(self.condition.machine),
        }


def _described(machine: Machine | None) -> dict[str, Any] | None:
    if machine is None:
        return None
    return {**msgspec.structs.asdict(machine), "gpus": [msgspec.structs.asdict(gpu) for gpu in machine.gpus]}
