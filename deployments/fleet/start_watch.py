"""`StartWatch`: how the starts of replicas go, while requests wait for one."""

import asyncio
import logging
import math
from collections.abc import Callable

from deployments.fleet.engine_client import EngineClient, Starts
from deployments.fleet.events import FleetRecord

logger = logging.getLogger("ray.serve")

_INTERVAL_S = 1.0
_LIFETIME_S = 10.0
"""How long Ray Serve's word on starts counts; it does not answer if its controller hangs."""


class StartWatch:
    """Asks Ray Serve about starts, and records why they fail. Lives on the router's event loop.

    Args:
        client: asks Serve.
        record: gets the failures.
        clock: seconds; monotonic.
    """

    def __init__(self, client: EngineClient, record: FleetRecord, clock: Callable[[], float]) -> None:
        self._client = client
        self._record = record
        self._clock = clock
        self._starts = Starts()
        self._noted_failure: str | None = None
        self._asked_at = self._told_at = -math.inf
        self._asking: asyncio.Task[None] | None = None

    @property
    def latest(self) -> Starts:
        """How starts go, as far as is known now."""
        return self._starts if self._clock() - self._told_at < _LIFETIME_S else Starts()

    def look(self, *, is_needed: bool) -> None:
        """Ask, if it is needed and was not done a moment ago. What is known is forgotten once it is not needed."""
        if not is_needed:
            self._starts = Starts()
        elif self._clock() - self._asked_at > _INTERVAL_S and (self._asking is None or self._asking.done()):
            self._asked_at = self._clock()
            self._asking = asyncio.get_running_loop().create_task(self._ask())

    def note_joined(self) -> None:
        """Note that a replica has started: from now on, a failure is news."""
        self._noted_failure = None

    def close(self) -> None:
        """Stop asking."""
        if self._asking is not None:
            self._asking.cancel()

    async def _ask(self) -> None:
        try:
            self._starts = await self._client.replica_starts()
            self._told_at = self._clock()
        except Exception:
            logger.exception("Serve cannot be asked which replicas are starting; trying again")
            return
        failure = self._starts.failure
        if failure is not None and failure != self._noted_failure:
            self._noted_failure = failure
            logger.error("a replica failed to start: %s", failure)
            self._record.events.add(f"A replica failed to start: {failure}", is_bad=True)
