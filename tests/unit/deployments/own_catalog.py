"""A catalog of adapters in the process of its only router."""

from deployments.adapters.catalog import Catalog
from deployments.adapters.messages import Ask, LoadOrder, Outcome, Reply


class OwnCatalog:
    """`CatalogClient` of a catalog in this process, which it starts."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        catalog.start()

    async def exchange(self, ask: Ask) -> Reply:
        return self.catalog.exchange(ask)

    async def load(self, order: LoadOrder) -> Outcome:
        return await self.catalog.load(order)

    async def unload(self, name: str) -> Outcome:
        return await self.catalog.unload(name)
