"""The fleet's verdict on a replica: may it get new requests, may it keep what it has, must it be replaced?

Plain values in, a value out: no clock, no socket, no Ray. `FleetWatch` gathers the evidence and does what is decided.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from deployments.channel.messages import Condition

_PROOF_S = 0.3
"""A replica that failed a call is trusted again once it sends a good report at least this much later; what it sent
before does not count."""
_GONE_AFTER_S = 1.0


class Standing(StrEnum):
    """What a replica is to a router."""

    SERVING = "serving"
    """It gets new requests."""
    STARTING = "starting"
    """It has not yet told this router what it holds."""
    DOUBTFUL = "doubtful"
    """It has just failed a step or a call and has not proven itself since."""
    SILENT = "silent"
    """It has not reported for a while."""
    STALLED = "stalled"
    """It has been silent for so long that its requests continue elsewhere."""
    BROKEN = "broken"
    """Its engine will never step again."""
    OTHER_VERSION = "other version"
    """It runs a version of the model other than the one this router was made for."""
    LEAVING = "leaving"
    """It is being taken away, and finishes what it has."""
    STAYING = "staying"
    """It is being taken away, but it is the last of the router's version: it is asked to stay."""
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a router knows about a replica.

    Attributes:
        is_listed: Ray Serve lists it as running.
        has_joined: it has told this router everything that its prefix cache holds.
        is_same_version: it runs the version of the model that this router was made for; None if not yet known.
        silence_s: seconds since its last report, or since the router began to listen if there has been none.
        has_reported: whether there has been any report.
        condition: what it says about itself.
        call_failed_s: seconds since a call to it failed; None for never.
        delisted_s: seconds since Ray Serve took it off its list; None while it is listed.
        is_last: it is not listed, and all listed replicas run, or may run, a version other than the router's.
    """

    is_listed: bool
    has_joined: bool
    is_same_version: bool | None
    silence_s: float
    has_reported: bool = True
    condition: Condition = field(default_factory=Condition)
    call_failed_s: float | None = None
    delisted_s: float | None = None
    is_last: bool = False


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a replica may behave badly, in seconds; see `RouterConfig`."""

    silence_timeout_s: float
    stall_timeout_s: float
    drain_after_s: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a router does with a replica.

    Attributes:
        standing: the replica's standing in a word.
        why: the reason in a sentence, for people.
        may_get_new: whether new requests go there.
        may_keep: whether the requests that it has stay there; otherwise they continue elsewhere.
        must_be_replaced: whether it will never serve again, so Ray Serve has to start another one.
        is_failure: whether requests that may not stay leave because it failed, not because it is taken away.
    """

    standing: Standing
    why: str
    may_get_new: bool = False
    may_keep: bool = True
    must_be_replaced: bool = False
    is_failure: bool = False


def judge(evidence: Evidence, limits: Limits) -> Verdict:
    """Decide. The most serious evidence counts."""
    condition, silence_s = evidence.condition, evidence.silence_s
    if condition.failure is not None and evidence.is_listed:
        return _failed(Standing.BROKEN, f"its engine broke down: {condition.failure}")
    if silence_s > limits.stall_timeout_s:
        standing = Standing.STALLED if evidence.is_listed else Standing.GONE
        return _failed(standing, f"it has been silent for {silence_s:.0f} s")
    if evidence.delisted_s is not None:
        return _judge_leaving(evidence, evidence.delisted_s, limits)
    if not evidence.has_reported:
        return Verdict(Standing.STARTING, "it has not reported yet")
    if evidence.is_same_version is False:
        return Verdict(Standing.OTHER_VERSION, "it runs a different version of the model from this router's")
    if silence_s > limits.silence_timeout_s:
        return Verdict(Standing.SILENT, f"it has been silent for {silence_s:.1f} s")
    if condition.num_failed_steps:
        return Verdict(Standing.DOUBTFUL, f"its last {condition.num_failed_steps} steps failed")
    if _has_just_failed(evidence):
        return Verdict(Standing.DOUBTFUL, "a call to it has just failed")
    if not evidence.has_joined or evidence.is_same_version is None:
        return Verdict(Standing.STARTING, "it has not yet reported what its prefix cache holds")
    return Verdict(Standing.SERVING, "", may_get_new=True)


def _failed(standing: Standing, why: str) -> Verdict:
    return Verdict(standing, why, may_keep=False, must_be_replaced=True, is_failure=True)


def _has_just_failed(evidence: Evidence) -> bool:
    """Whether a call to the replica has failed, and it has not proven itself since."""
    return evidence.call_failed_s is not None and evidence.call_failed_s - evidence.silence_s < _PROOF_S


def _judge_leaving(evidence: Evidence, delisted_s: float, limits: Limits) -> Verdict:
    """Judge a replica that Ray Serve is taking away."""
    may_keep, condition = delisted_s <= limits.drain_after_s, evidence.condition
    if evidence.silence_s > _GONE_AFTER_S:
        return Verdict(Standing.GONE, "Ray Serve removed it", may_keep=may_keep)
    if evidence.is_last and evidence.is_same_version and condition.failure is None:
        is_well = not condition.num_failed_steps and not _has_just_failed(evidence)
        why = "Ray Serve is removing it; it stays while this router has no other replica of its version"
        return Verdict(Standing.STAYING, why, may_get_new=is_well and evidence.has_joined)
    return Verdict(Standing.LEAVING, "Ray Serve is removing it; it finishes the requests it has", may_keep=may_keep)
