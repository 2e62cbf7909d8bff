"""A router and its engine replicas in one process, without Ray."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from own_catalog import OwnCatalog

from deployments.adapters.catalog import Catalog
from deployments.adapters.known import KnownAdapters
from deployments.adapters.models import catalog_models, names_of_models
from deployments.api.application import create_api
from deployments.api.in_process_calls import create_runner
from deployments.api.openai.response_store import ResponseStore, own_store
from deployments.batches.desk import own_desk
from deployments.channel.messages import ChannelAddress, EngineInfo, decode_info, encode
from deployments.config import AppConfig
from deployments.errors import ReplicaLostError
from deployments.fleet.engine_client import Starts
from deployments.observe.metrics import RouterPeers
from deployments.replica.engine_replica import EngineReplica
from deployments.router.access import Access
from deployments.router.directory import ModelDirectory
from deployments.router.keys import ApiKey, KeySource

DEMO = Path(__file__).parents[3] / "configs" / "demo"


class LocalClient:
    """`EngineClient` for replicas in this process. `kill` does what losing a node does, `drain` scaling down.

    A replica that is drained takes calls that name it, until `end`.
    """

    def __init__(self, replicas: list[EngineReplica]) -> None:
        self.replicas = replicas
        self.num_calls = 0
        self.num_wake_ups = 0
        self.starts = Starts()
        self._by_id = {replica.replica_id: replica for replica in replicas}
        self._running = set(self._by_id)
        self._leaving: set[str] = set()
        self.stays: list[str] = []
        self._calls: dict[str, set[asyncio.Task[bytes]]] = {replica_id: set() for replica_id in self._by_id}
        self._on_replicas: Callable[[frozenset[str]], None] = lambda _: None

    def watch(self, callback: Callable[[frozenset[str]], None]) -> None:
        self._on_replicas = callback
        callback(frozenset(self._running))

    async def wake(self) -> None:
        self.num_wake_ups += 1
        while not self._running:
            await asyncio.sleep(0.01)

    async def replica_starts(self) -> Starts:
        return self.starts

    async def attach(self, replica_id: str, channel: ChannelAddress) -> EngineInfo:
        return decode_info(await self._choose((replica_id,)).attach(encode(channel)))

    async def stay(self, replica_id: str, duration_s: float) -> None:
        self.stays.append(replica_id)
        await self._choose((replica_id,)).stay(duration_s, (replica_id,))

    async def tell_queue(self, replica_id: str, channel: ChannelAddress, num_tokens: int) -> None:
        await self._choose((replica_id,)).note_queue(channel.router_id, (), num_tokens)

    async def forget_adapters(self, replica_id: str, digests: Sequence[str]) -> None:
        await self._choose((replica_id,)).forget_adapters(digests, (replica_id,))

    async def generate(self, call: bytes, ranking: Sequence[str]) -> bytes:
        replica = self._choose(ranking)
        return await self._run(replica, replica.generate(call, ranking))

    async def generate_batch(self, calls: bytes, ranking: Sequence[str]) -> bytes:
        replica = self._choose(ranking)
        return await self._run(replica, replica.generate_batch(calls, ranking))

    async def _run(self, replica: EngineReplica, call: Coroutine[Any, Any, bytes]) -> bytes:
        self.num_calls += 1
        task = asyncio.ensure_future(call)
        self._calls[replica.replica_id].add(task)
        try:
            return await task
        except asyncio.CancelledError:
            if replica.replica_id not in self._calls:
                raise ReplicaLostError("killed") from None
            task.cancel()
            raise
        finally:
            self._calls.get(replica.replica_id, set()).discard(task)

    def add(self, replica: EngineReplica) -> None:
        self.replicas.append(replica)
        self._by_id[replica.replica_id] = replica
        self._calls[replica.replica_id] = set()
        self.start(len(self.replicas) - 1)

    def kill(self, index: int) -> None:
        replica = self.replicas[index]
        calls = self._calls.pop(replica.replica_id)
        replica.stop()
        for task in calls:
            task.cancel()
        self.drain(index)
        self.end(index)

    def drain(self, index: int) -> None:
        self._running.discard(self.replicas[index].replica_id)
        self._leaving.add(self.replicas[index].replica_id)
        self._on_replicas(frozenset(self._running))

    def end(self, index: int) -> None:
        """What Serve does once a replica that it takes away has no call left: it stops."""
        self._leaving.discard(self.replicas[index].replica_id)
        self.replicas[index].stop()

    def start(self, index: int) -> None:
        self._running.add(self.replicas[index].replica_id)
        self._on_replicas(frozenset(self._running))

    def close(self) -> None:
        """Stop the replicas and let go of them.

        FastAPI caches what it knows of an endpoint for as long as the process lives, and with the endpoint the router
        and this client: what they still held would stay, 200 MB for each real engine.
        """
        for replica in self.replicas:
            replica.stop()
        self.replicas.clear()
        self._by_id.clear()

    def _choose(self, ranking: Sequence[str]) -> EngineReplica:
        named = next((i for i in ranking if i in self._running | self._leaving), None)
        if named is None and not self._running:
            raise ReplicaLostError("nobody left")
        return self._by_id[named if named is not None else min(self._running)]


class Service:
    """A router with its HTTP application and the replicas behind it."""

    def __init__(
        self,
        config: AppConfig,
        client: LocalClient | dict[str, LocalClient],
        keys: tuple[ApiKey, ...] = (),
        peers: RouterPeers | None = None,
        access: Access | None = None,
        store: ResponseStore | None = None,
    ) -> None:
        self.client = client
        clients = client if isinstance(client, dict) else dict.fromkeys(config.by_key, client)
        models = catalog_models(config)
        self.catalog = Catalog(models, names_of_models(config), recovery_s=0) if models else None
        adapters = KnownAdapters(OwnCatalog(self.catalog) if self.catalog is not None else None)
        self.directory = ModelDirectory(
            config, clients, peers=peers, access=access or Access(KeySource(keys)), adapters=adapters
        )
        self.router = self.directory.routers[0]
        self.store = store if store is not None else own_store(config.responses)
        self.desk = own_desk(config.batches)
        self.api = create_api(self.directory, self.store, self.desk)
        self.batches = create_runner(self.desk, self.api, self.directory) if self.desk is not None else None
        if self.batches is not None:
            self.batches.start()
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(self.api, raise_app_exceptions=False), base_url="http://test", timeout=30
        )

    def close(self) -> None:
        """Stop the router, and its catalog of adapters."""
        self.directory.close()
        if self.catalog is not None:
            self.catalog.close()

    @property
    def num_used_pages(self) -> int:
        return sum(replica._loop._engine.stats().num_used_pages for replica in self.client.replicas)

    async def post(self, path: str, **body: object) -> httpx.Response:
        return await self.http.post(path, json={"model": "demo", **body})


ServiceFactory = Callable[..., Awaitable[Service]]


def emulated_config(**changes: object) -> AppConfig:
    """The demo checkpoint's tokenizer with an engine that makes letters, fast."""
    fields = {
        "model": str(DEMO),
        "engine_kind": "emulated",
        "engine": {"max_batch_size": 16, "num_pages": 2048},
        "emulation": {"tokens_per_s": 1000.0, "max_seq_len": 2048},
    }
    return AppConfig.model_validate({**fields, **changes})


async def eventually(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    """Wait until `condition` holds; on a busy machine that takes as long as it takes."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


async def end_service(service: Service) -> None:
    await service.http.aclose()
    if service.batches is not None:
        await service.batches.stop()
        service.desk.close()
    for _ in range(100):
        if service.num_used_pages == 0 or len(service.client._calls) < len(service.client.replicas):
            break
        await asyncio.sleep(0.01)
    else:
        pytest.fail(f"{service.num_used_pages} pages are still in use")
    assert service.router.journal.num_live == 0, "a generation is still in the journal"
    service.close()
    service.client.close()
