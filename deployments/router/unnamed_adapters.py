"""`UnnamedAdapters`: has replicas give up the adapters that requests can no longer name."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence

from deployments.adapters.known import KnownAdapters
from deployments.errors import ReplicaLostError
from deployments.fleet.engine_client import EngineClient
from deployments.router.router import Router

logger = logging.getLogger("ray.serve")

_INTERVAL_S = 1.0
_REPEAT_S = 10.0
"""An adapter that is still held this long after the replica was asked may have been loaded again: it is asked again."""


class UnnamedAdapters:
    """Compares what replicas report to hold with what requests may name: adapters that were unloaded, removed, or
    replaced by others of their name.

    Adapters of this router's live requests stay, so that another replica can continue them. A replica gives up nothing
    that any request uses, so that nothing is lost if several routers ask it, or one that has not heard of an adapter.

    Args:
        known: the adapters that requests may name.
        routers: those of all models.
        clients: the engine replicas of each model, by the routers' keys.
        clock: seconds; monotonic.
    """

    def __init__(
        self,
        known: KnownAdapters,
        routers: Sequence[Router],
        clients: Mapping[str, EngineClient],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._known = known
        self._routers = routers
        self._clients = clients
        self._clock = clock
        self._asked_at: dict[tuple[str, str], float] = {}
        """When a replica was asked to give up an adapter; of those that are still held."""
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin, if there are adapters at all."""
        if self._known.takes_orders:
            self._task = asyncio.get_running_loop().create_task(self._follow())

    def close(self) -> None:
        """Stop."""
        if self._task is not None:
            self._task.cancel()

    async def look(self) -> None:
        """Ask each replica once to give up what it need not hold."""
        if not self._known.is_current:
            return
        asked_at, now = self._asked_at, self._clock()
        self._asked_at = {}
        for router in self._routers:
            wanted = self._known.digests(router.key) | router.journal.adapters
            for replica_id in router.fleet.replica_ids:
                unnamed = router.fleet.adapters(replica_id) - wanted
                told = {digest: asked_at.get((replica_id, digest), now - _REPEAT_S) for digest in sorted(unnamed)}
                due = [digest for digest, at in told.items() if now - at >= _REPEAT_S]
                told |= dict.fromkeys(due, now)
                self._asked_at |= {(replica_id, digest): at for digest, at in told.items()}
                if due:
                    await self._ask(router, replica_id, due)

    async def _ask(self, router: Router, replica_id: str, digests: Sequence[str]) -> None:
        try:
            await self._clients[router.key].forget_adapters(replica_id, digests)
        except ReplicaLostError:
            return
        logger.info("replica %s of model %s gives up %d adapter(s)", replica_id, router.key, len(digests))

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(_INTERVAL_S)
            try:
                await self.look()
            except Exception:
                logger.exception("replicas cannot be asked to give up adapters; trying again")
