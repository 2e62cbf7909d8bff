"""What follows files ends before the threads do that read them: nothing is logged when a deployment is shut down."""

import asyncio
import logging
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from in_process import DEMO, eventually
from small_adapters import write_adapter

from deployments.adapters import catalog as catalog_module
from deployments.adapters.messages import Ask, decode_reply, encode
from deployments.adapters.models import catalog_models
from deployments.config import AppConfig
from deployments.errors import RecordAwayError
from deployments.router import access as access_module, courier as courier_module
from deployments.router.access import Access
from deployments.router.keys import KeySource
from deployments.router.meter import Meter
from deployments.serve.adapter_catalog import AdapterCatalogReplica
from deployments.usage.entries import UsageQuery
from deployments.usage.ledger import Ledger
from deployments.usage.place import RecordPlace


@pytest.fixture
async def pool() -> AsyncIterator[ThreadPoolExecutor]:
    """The event loop's threads, as Ray Serve sets them."""
    pool = ThreadPoolExecutor(2)
    asyncio.get_running_loop().set_default_executor(pool)
    yield pool
    pool.shutdown()


async def test_a_catalog_ends_silently(pool, tmp_path: Path, monkeypatch, caplog):
    monkeypatch.setattr(catalog_module, "_LOOK_INTERVAL_S", 0.01)
    write_adapter(tmp_path / "one")
    config = AppConfig(
        model=str(DEMO), engine_kind="emulated", engine={"max_adapters": 1}, adapter_folder=str(tmp_path)
    )
    replica = AdapterCatalogReplica.__new__(AdapterCatalogReplica)
    await replica.__init__(catalog_models(config), ["demo"])

    async def names() -> list[str]:
        reply = decode_reply(await replica.exchange(encode(Ask())))
        return [adapter.name for adapter in reply.adapters or ()]

    while await names() != ["one"]:
        await asyncio.sleep(0.01)
    caplog.clear()
    with caplog.at_level(logging.ERROR):
        replica.__del__()
        pool.shutdown(wait=False)
        await asyncio.sleep(0.2)
    assert not caplog.records
    replica.__del__()  # as the garbage collector will


async def test_what_looks_for_others_usage_ends_silently(pool, tmp_path: Path, monkeypatch, caplog):
    """What this router has counted can still be delivered."""
    monkeypatch.setattr(courier_module, "_ORPHANS_INTERVAL_S", 0.01)
    meter = Meter(RecordPlace(str(tmp_path / "usage.jsonl"), str(tmp_path / "spool")))
    access = Access(meter=meter)
    await asyncio.sleep(0.1)
    with caplog.at_level(logging.WARNING):
        access.stop_following()
        pool.shutdown(wait=False)
        await asyncio.sleep(0.2)
        meter.refuse("team", "demo", "server_error")
        (row,) = await meter.rows(UsageQuery("0001-01-01", "9999-12-31"))
    assert (row.key, row.num_requests) == ("team", 1)
    assert not caplog.records
    access.close()


async def test_a_closed_record_is_away(tmp_path: Path, caplog):
    """A router whose record is closed before it is keeps what it has counted, for the next one, and says so once."""
    place = RecordPlace(str(tmp_path / "usage.jsonl"), str(tmp_path / "spool"))
    ledger = Ledger(place.record)
    meter = Meter(place, ledger)
    ledger.close()
    with caplog.at_level(logging.WARNING):
        meter.refuse("team", "demo", "server_error")
        with pytest.raises(RecordAwayError, match="closed"):
            await meter.rows(UsageQuery("0001-01-01", "9999-12-31"))
        await asyncio.sleep(0.5)
    assert len(caplog.records) == 1
    assert "is away" in caplog.text
    meter.close()
    ledger.close()
    later, record = Meter(place), tmp_path / "usage.jsonl"
    await eventually(lambda: record.exists() and "server_error" in record.read_text())
    later.close()


async def test_what_follows_the_keys_ends_silently(pool, tmp_path: Path, monkeypatch, caplog):
    monkeypatch.setattr(access_module, "_LOOK_INTERVAL_S", 0.01)
    (tmp_path / "keys").write_text("a: secret-of-a\n")
    access = Access(KeySource(path=str(tmp_path / "keys")))
    (tmp_path / "keys").write_text("a: secret-of-a\nb: secret-of-b\n")
    await eventually(lambda: len(access.keys) == 2)
    caplog.clear()
    with caplog.at_level(logging.ERROR):
        access.stop_following()
        pool.shutdown(wait=False)
        await asyncio.sleep(0.2)
    assert not caplog.records
    access.close()
