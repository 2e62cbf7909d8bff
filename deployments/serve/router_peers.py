"""Lets a router ask the other routers of its deployment."""

import contextvars
import logging
from typing import Any

from deployments.observe.exposition import RouterFigures
from deployments.observe.history import RouterHistory

logger = logging.getLogger("ray.serve")

_TIMEOUT_S = 2.0
"""Well under Prometheus' scrape timeout: one hanging router must not hide the others from it."""


class ServePeers:
    """The routers of this process's deployment, through a Ray Serve handle."""

    def __init__(self) -> None:
        from ray import serve

        context = serve.get_replica_context()
        self.router_id: str = context.replica_id.unique_id
        self._handle: Any = serve.get_deployment_handle(context.deployment, context.app_name)

    async def figures(self) -> list[RouterFigures]:
        """See `RouterPeers`."""
        return [one for one in await self._ask("figures") if isinstance(one, RouterFigures)]

    async def histories(self) -> list[RouterHistory]:
        """See `RouterPeers`."""
        return [one for one in await self._ask("histories") if isinstance(one, RouterHistory)]

    async def _ask(self, method: str) -> list[object]:
        """The items of all routers' answers. Those that die meanwhile are left out; if one hangs, all are."""
        try:
            # Outside the HTTP request's context, which Ray Serve would otherwise attach to the calls.
            response = contextvars.Context().run(self._handle.broadcast, method)
            answers = await response.results_async(timeout_s=_TIMEOUT_S, return_exceptions=True)
            return [item for answer in answers if isinstance(answer, list) for item in answer]
        except Exception as error:  # noqa: BLE001 - whatever it is, this router's own figures must still be had
            logger.warning("the other routers' %s are not available now: %s: %s", method, type(error).__name__, error)
            return []
