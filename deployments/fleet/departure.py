"""Why a replica is no longer there: a sentence made of what a router saw of its end.

Plain values in, a value out, as in `verdict`. Ray Serve itself says only that a replica is no longer on its list.
"""

from dataclasses import dataclass
from enum import StrEnum

from deployments.channel.messages import Condition


class Cause(StrEnum):
    """How a replica ended."""

    DIED = "died"
    """Its process or its node ended without a word."""
    BROKE_DOWN = "broke down"
    """Its engine could not continue, and Ray Serve replaced it."""
    STALLED = "stalled"
    """It had stopped reporting, and Ray Serve replaced it."""
    REPLACED = "replaced"
    """It ended in good order, and replicas of another version are running."""
    SCALED_DOWN = "scaled down"
    """It ended in good order, as autoscaling does with replicas that are not needed."""
    SHUT_DOWN = "shut down"
    """It ended in good order."""

    @property
    def is_failure(self) -> bool:
        """Whether the end was unintended."""
        return self in (Cause.DIED, Cause.BROKE_DOWN, Cause.STALLED)


@dataclass(frozen=True, slots=True)
class Traces:
    """What a router saw of a replica that is gone.

    Attributes:
        condition: what it last said about itself.
        call_error: why the last call to it failed, if that happened shortly before its end.
        silence_s: seconds for which it had been silent when Ray Serve took it off its list.
        silence_timeout_s: how long a replica may be silent.
        is_updating: whether replicas of another version are running.
        is_autoscaled: whether the number of replicas follows the load.
    """

    condition: Condition
    call_error: str | None = None
    silence_s: float = 0.0
    silence_timeout_s: float = 2.0
    is_updating: bool = False
    is_autoscaled: bool = False


@dataclass(frozen=True, slots=True)
class Departure:
    """The end of a replica: how it happened, and why, as a sentence about the replica."""

    cause: Cause
    why: str


def explain(traces: Traces) -> Departure:
    """Find the cause. What the replica said about itself counts most, then what its callers were told."""
    condition = traces.condition
    if condition.has_shut_down:
        return _in_good_order(traces)
    if condition.failure is not None:
        return Departure(Cause.BROKE_DOWN, f"its engine broke down: {condition.failure}")
    if traces.silence_s > traces.silence_timeout_s:
        return Departure(Cause.STALLED, f"it stopped reporting {traces.silence_s:.0f} s before Ray Serve ended it")
    if traces.call_error is not None:
        return Departure(Cause.DIED, traces.call_error)
    return Departure(Cause.DIED, "its process ended without notice: it crashed, was killed, or lost its node")


def _in_good_order(traces: Traces) -> Departure:
    if traces.is_updating:
        return Departure(Cause.REPLACED, "an update replaced it")
    if traces.is_autoscaled:
        return Departure(Cause.SCALED_DOWN, "autoscaling removed it")
    return Departure(Cause.SHUT_DOWN, "Ray Serve shut it down")
