"""Which request a replica may have failed of.

A request that hangs or kills whatever runs it would fell the whole fleet if it were resumed like the others. So when a
replica fails, every request that was in it is a suspect, and a replica begins one suspect at a time and says so before.
The first token there clears it. A replica that fails while it tries one names the culprit: that request has felled two
replicas and ends with an error; the others were bystanders.
"""

from collections.abc import Iterable
from enum import Enum, auto
from typing import Protocol

_SAME_FAILURE_S = 2.0
"""The requests of a replica learn of its failure one after the other."""


class Part(Enum):
    """What a request had to do with the failure of a replica."""

    SUSPECT = auto()
    """The replica may have failed of it."""
    CULPRIT = auto()
    """The replica has failed of it, as another one has before."""
    BYSTANDER = auto()
    """It has nothing to do with it."""


class Passenger(Protocol):
    """A request in a replica."""

    is_suspect: bool
    """A replica has failed while it ran, and it has had no token since."""
    has_arrived: bool
    """The replica has said that it begins it."""
    part: tuple[Part, float] | None
    """In the failure that happened last, and when that was."""


def assign_parts(passengers: Iterable[Passenger], now: float) -> None:
    """A replica has failed: say what each of its requests had to do with it.

    What is known of the same failure already stays. A suspect that never arrived has not been tried, so it is not the
    culprit.
    """
    passengers = list(passengers)
    culprits = [passenger for passenger in passengers if passenger.is_suspect and passenger.has_arrived]
    for passenger in passengers:
        if part_of(passenger, now) is not None:
            continue
        with_culprit = Part.CULPRIT if passenger in culprits else Part.BYSTANDER
        passenger.part = (with_culprit if culprits else Part.SUSPECT), now


def part_of(passenger: Passenger, now: float) -> Part | None:
    """What a request had to do with the failure that happens now; None for not yet known."""
    if passenger.part is None or now - passenger.part[1] > _SAME_FAILURE_S:
        return None
    return passenger.part[0]
