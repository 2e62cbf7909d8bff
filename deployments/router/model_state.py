"""How a model's fleet stands, as clients see it."""

from enum import StrEnum


class ModelState(StrEnum):
    """Whether a model answers."""

    READY = "ready"
    """A replica serves it."""
    STARTING = "starting"
    """No replica serves it now; requests wait for one."""
    ASLEEP = "asleep"
    """It has been scaled to zero; the next request starts a replica."""
