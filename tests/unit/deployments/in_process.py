"""A router and its engine replicas in one process, without Ray."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import msgspec
import pytest

from deployments.config import AppConfig
from deployments.engine_client import ReplicaLostError
from deployments.engine_factory import EngineInfo
from deployments.engine_replica import EngineReplica
from deployments.openai.routes import create_api
from deployments.router import Router

DEMO = Path(__file__).parents[3] / "configs" / "demo"


class LocalClient:
    """`EngineClient` for replicas in this process, in turn. `kill` does what losing a node does."""

    def __init__(self, replicas: list[EngineReplica]) -> None:
        self.replicas = replicas
        self.num_calls = 0
        self._calls: dict[int, set[asyncio.Task[bytes]]] = {i: set() for i in range(len(replicas))}

    async def describe(self) -> EngineInfo:
        return msgspec.msgpack.decode(await self.replicas[0].describe(), type=EngineInfo)

    async def generate(self, call: bytes) -> bytes:
        alive = sorted(self._calls)
        if not alive:
            raise ReplicaLostError("nobody left")
        chosen = alive[self.num_calls % len(alive)]
        self.num_calls += 1
        task = asyncio.ensure_future(self.replicas[chosen].generate(call))
        self._calls[chosen].add(task)
        try:
            return await task
        except asyncio.CancelledError:
            if chosen not in self._calls:
                raise ReplicaLostError("killed") from None
            task.cancel()
            raise
        finally:
            self._calls.get(chosen, set()).discard(task)

    def kill(self, index: int) -> None:
        calls = self._calls.pop(index)
        self.replicas[index].stop()
        for task in calls:
            task.cancel()


class Service:
    """A router with its HTTP application and the replicas behind it."""

    def __init__(self, config: AppConfig, client: LocalClient, key_digests: tuple[bytes, ...] = ()) -> None:
        self.client = client
        self.router = Router(config, client)
        self.api = create_api(self.router, key_digests)
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(self.api, raise_app_exceptions=False), base_url="http://test", timeout=30
        )

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


async def end_service(service: Service) -> None:
    await service.http.aclose()
    for _ in range(100):
        if service.num_used_pages == 0 or len(service.client._calls) < len(service.client.replicas):
            break
        await asyncio.sleep(0.01)
    else:
        pytest.fail(f"{service.num_used_pages} pages are still in use")
    assert service.router.journal.num_live == 0, "a generation is still in the journal"
    service.router.close()
    for replica in service.client.replicas:
        replica.stop()
