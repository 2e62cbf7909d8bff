"""What keeps a replica from finishing a request that another one may continue."""

from dataclasses import dataclass
from enum import Enum, auto

from deployments.channel.messages import FailureKind


class SetbackKind(Enum):
    """Why a request has to continue elsewhere."""

    FAILURE = auto()
    """The replica failed, stalled or died."""
    MOVE = auto()
    """The replica is being taken away."""
    DECLINED = auto()
    """The replica has not begun it."""


@dataclass(frozen=True, slots=True)
class Setback:
    """What keeps a replica from finishing a request that another one may continue."""

    kind: SetbackKind
    message: str


SETBACKS = {
    FailureKind.FAILED: SetbackKind.FAILURE,
    FailureKind.LEAVING: SetbackKind.MOVE,
    FailureKind.DECLINED: SetbackKind.DECLINED,
}
"""The setback that each of a replica's own failure kinds amounts to."""
