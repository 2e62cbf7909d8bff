"""The catalog of adapters that routers share: a deployment with one replica, and the client through which routers call
it."""

from collections.abc import Sequence
from typing import Any

from deployments.adapters.catalog import Catalog, CatalogModel
from deployments.adapters.messages import (
    Ask,
    LoadOrder,
    Outcome,
    Reply,
    decode_ask,
    decode_order,
    decode_outcome,
    decode_reply,
    encode,
)
from deployments.errors import CatalogAwayError
from deployments.observe.terminal import show_warnings
from deployments.serve.calls import call
from deployments.serve.following import Following

_ORDER_TIMEOUT_S = 300.0
"""Checking an adapter takes some seconds, and more where its files are far away."""


class AdapterCatalogReplica(Following):
    """A `Catalog` behind Ray Serve. What was loaded by request is only in memory; routers tell a new one of it.

    Args:
        models: the models that take adapters.
        taken_names: names and aliases of all models.
    """

    async def __init__(self, models: Sequence[CatalogModel], taken_names: Sequence[str]) -> None:  # type: ignore[misc]
        # Asynchronous, so that it runs on the event loop that the catalog is to live on: Ray Serve awaits it.
        show_warnings()
        self._catalog = Catalog(models, taken_names)
        self._catalog.start()
        self.until_the_end(self._catalog.close)

    async def exchange(self, ask: bytes) -> bytes:
        """See `Catalog.exchange`; both sides encoded."""
        return encode(self._catalog.exchange(decode_ask(ask)))

    async def load(self, order: bytes) -> bytes:
        """See `Catalog.load`; both sides encoded."""
        return encode(await self._catalog.load(decode_order(order)))

    async def unload(self, name: str) -> bytes:
        """See `Catalog.unload`; the outcome is encoded."""
        return encode(await self._catalog.unload(name))


class ServeCatalogClient:
    """`CatalogClient` through a Ray Serve deployment handle.

    Args:
        handle: of the `AdapterCatalog` deployment.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def exchange(self, ask: Ask) -> Reply:
        """See `CatalogClient`."""
        return decode_reply(await call(self._handle.exchange, encode(ask), away=CatalogAwayError))

    async def load(self, order: LoadOrder) -> Outcome:
        """See `CatalogClient`."""
        answer = await call(self._handle.load, encode(order), away=CatalogAwayError, timeout_s=_ORDER_TIMEOUT_S)
        return decode_outcome(answer)

    async def unload(self, name: str) -> Outcome:
        """See `CatalogClient`."""
        answer = await call(self._handle.unload, name, away=CatalogAwayError, timeout_s=_ORDER_TIMEOUT_S)
        return decode_outcome(answer)
