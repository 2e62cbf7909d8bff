"""Which request may have made a replica fail.

A request that hangs or kills whatever runs it would bring down the whole fleet if it were resumed like the others. So
when a replica fails, every request that was on it becomes a suspect. A replica begins one suspect at a time, and
reports that it does so beforehand. The first token there clears the suspect. If a replica fails while it tries a
suspect, that request is the culprit: it has brought down two replicas and ends with an error. The others were
bystanders.
"""

from collections.abc import Iterable
from enum import Enum, auto
from typing import Protocol

_SAME_FAILURE_S = 2.0
"""The requests of a replica learn of its failure one after another, within this time."""


class Part(Enum):
    """What a request had to do with the failure of a replica."""

    SUSPECT = auto()
    """It may have caused the failure."""
    CULPRIT = auto()
    """It caused the failure, as it caused that of another replica before."""
    BYSTANDER = auto()
    """It has nothing to do with it."""


class Passenger(Protocol):
    """A request on a replica."""

    is_suspect: bool
    """A replica has failed while the request ran, and the request has had no token since."""
    has_arrived: bool
    """The replica has reported that it begins the request."""
    part: tuple[Part, float] | None
    """Its part in the latest failure, and when that was."""


def assign_parts(passengers: Iterable[Passenger], now: float) -> None:
    """After a replica's failure, set what each of its requests had to do with it.

    Parts already assigned for the same failure stay. A suspect that never arrived was not tried, so it is not the
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
    """What a request had to do with the current failure; None if not yet known."""
    if passenger.part is None or now - passenger.part[1] > _SAME_FAILURE_S:
        return None
    return passenger.part[0]
