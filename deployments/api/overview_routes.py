"""What administrators see of all keys and models: `/rayline/adapters` and `/rayline/batches`."""

import asyncio

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from deployments.adapters.messages import KnownAdapter, Source
from deployments.api.batch_desk import DeskAccess, page_of
from deployments.api.openai.batches import BatchObject, batch_object
from deployments.api.permissions import require_admin
from deployments.api.route_table import Route
from deployments.batches.desk import BatchDesk
from deployments.batches.records import is_batch_id
from deployments.router.directory import ModelDirectory

_DEFAULT_PAGE, _MAX_PAGE = 20, 100


class AdapterState(BaseModel):
    """An adapter that requests to a model may choose."""

    name: str
    model: str
    """Of several entries of one name, each has its own, such as `chat:v2`."""
    source: Source
    path: str
    created: int
    """When its weights were written, in seconds since 1970."""
    held_by: list[str]
    """Ids of the replicas that hold it on the device or in host memory; the others read it when a request needs it."""


class AdapterStates(BaseModel):
    """Answer of `GET /rayline/adapters`."""

    object: str = "list"
    data: list[AdapterState]
    faults: dict[str, str]
    """What is wrong with directories that hold no adapter that can be served, by name."""


class OwnedBatch(BatchObject):
    """A batch, and whose it is."""

    key: str
    """Name of the API key."""


class OwnedBatches(BaseModel):
    """Answer of `GET /rayline/batches`."""

    object: str = "list"
    data: list[OwnedBatch]
    has_more: bool


class OverviewEndpoints:
    """Tells administrators what there is, whoever made it.

    Args:
        directory: the models and the adapters.
        desk: where batches are kept; None for nowhere.
    """

    def __init__(self, directory: ModelDirectory, desk: BatchDesk | None) -> None:
        self._directory = directory
        self._access = DeskAccess(desk)

    def table(self) -> list[Route]:
        """The routes of this class."""
        return [
            Route("GET", "/rayline/adapters", self.adapters, "All adapters, and which replicas hold them",
                  AdapterStates),
            Route("GET", "/rayline/batches", self.batches, "Unfinished batches of all keys", OwnedBatches),
        ]  # fmt: skip

    async def adapters(self, request: Request) -> Response:
        """List the adapters of all models with the replicas that hold them, for administrators."""
        require_admin(request)
        holders: dict[tuple[str, str], list[str]] = {}
        for router in self._directory.routers:
            for replica_id in router.fleet.replica_ids:
                for digest in router.fleet.adapters(replica_id):
                    holders.setdefault((router.key, digest), []).append(replica_id)
        known = [adapter for adapters in self._directory.adapters.all() for adapter in adapters]
        faults = self._directory.adapters.snapshot()["adapter_faults"]
        # In a thread: they can be many.
        text = await asyncio.to_thread(
            lambda: AdapterStates(data=[_state(one, holders) for one in known], faults=faults).model_dump_json()
        )
        return Response(text, media_type="application/json")

    async def batches(self, request: Request) -> Response:
        """List the batches of all keys that have not ended, the oldest first, for administrators."""
        require_admin(request)
        page = page_of(request, is_batch_id, default=_DEFAULT_PAGE, most=_MAX_PAGE, order="asc")
        ledger = self._access.desk.ledger
        found, has_more = await self._access.run(lambda: ledger.unfinished(page))
        batches = [OwnedBatch(key=batch.record.owner, **batch_object(batch)) for batch in found]
        return Response(OwnedBatches(data=batches, has_more=has_more).model_dump_json(), media_type="application/json")


def _state(adapter: KnownAdapter, holders: dict[tuple[str, str], list[str]]) -> AdapterState:
    return AdapterState(
        name=adapter.name,
        model=adapter.key,
        source=adapter.source,
        path=adapter.path,
        created=adapter.created,
        held_by=sorted(holders.get((adapter.key, adapter.digest), [])),
    )
