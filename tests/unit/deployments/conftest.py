import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator

import pytest
from in_process import LocalClient, Service, ServiceFactory, emulated_config, end_service

from deployments.api.openai.response_store import ResponseStore
from deployments.config import AppConfig
from deployments.observe.metrics import RouterPeers
from deployments.replica.engine_replica import EngineReplica
from deployments.router.access import Access
from deployments.router.keys import ApiKey


@pytest.fixture
async def make_service() -> AsyncIterator[ServiceFactory]:
    """Makes services that are ready; ends them, having checked that no page leaked."""
    async with contextlib.AsyncExitStack() as stack:

        async def make(
            config: AppConfig | None = None,
            num_replicas: int = 1,
            keys: tuple[ApiKey, ...] = (),
            peers: RouterPeers | None = None,
            access: Access | None = None,
            store: ResponseStore | None = None,
        ) -> Service:
            config = config or emulated_config()
            replicas = [EngineReplica(config, f"replica-{i}") for i in range(num_replicas)]
            service = Service(config, LocalClient(replicas), keys, peers, access, store)
            stack.push_async_callback(end_service, service)
            await service.router.wait_until_ready()
            async with asyncio.timeout(60):
                while len(service.router.fleet.replica_ids) < num_replicas:
                    await asyncio.sleep(0.005)
            return service

        yield make


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `build_app` finds where Serve does not run. Asking would start a cluster, which integration tests have."""
    monkeypatch.setattr("deployments.app.find_front_end", lambda: None)


class _Records(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def serve_log() -> Iterator[list[logging.LogRecord]]:
    """What `ray.serve` logs from INFO on. `caplog` misses it once Serve has been started in this process."""
    logger, handler = logging.getLogger("ray.serve"), _Records()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler.records
    logger.setLevel(level)
    logger.removeHandler(handler)
