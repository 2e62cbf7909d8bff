"""Replicas give up adapters that requests can no longer name: on the device and in host memory, once unused."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from in_process import DEMO, LocalClient, Service, end_service, eventually
from small_adapters import write_adapter

from deployments.adapters import catalog as catalog_module, known as known_module
from deployments.config import AppConfig
from deployments.replica.engine_replica import EngineReplica
from deployments.router import unnamed_adapters as unnamed_module

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(params=["demo", "emulated"])
async def service(request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Service]:
    """One replica; the folder has the adapters one and two, and requests may load others."""
    for module, name in ((catalog_module, "_LOOK_INTERVAL_S"), (known_module, "_INTERVAL_S")):
        monkeypatch.setattr(module, name, 0.05)
    monkeypatch.setattr(unnamed_module, "_INTERVAL_S", 0.05)
    monkeypatch.setattr(unnamed_module, "_REPEAT_S", 0.2)
    write_adapter(tmp_path / "folder" / "one", seed=1, rank=4)
    write_adapter(tmp_path / "folder" / "two", seed=2, rank=8)
    settings = {
        "model": str(DEMO), "device": "cpu", "dtype": "float32", "replicas": {"torch_threads": 1},
        "engine": {"max_seq_len": 512, "max_batch_size": 8, "max_adapters": 3, "max_adapter_rank": 8},
        "adapter_folder": str(tmp_path / "folder"), "adapter_roots": [str(tmp_path)], "allow_admin_without_keys": True,
    }  # fmt: skip
    if request.param == "emulated":
        settings |= {"engine_kind": "emulated", "emulation": {"adapter_load_s": 0.01, "tokens_per_s": 200.0}}
    config = AppConfig.model_validate(settings)
    service = Service(config, LocalClient([EngineReplica(config, "replica-0")]))
    await service.router.wait_until_ready()
    await eventually(lambda: len(service.router.fleet.replica_ids) == 1 and service.directory.adapters.is_settled)
    yield service
    await end_service(service)


async def complete(service: Service, model: str, num_tokens: int = 3) -> str:
    body = {"prompt": list(b"What is 17 + 25?"), "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    answer = await service.post("/v1/completions", model=model, **body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == num_tokens
    return answer.json()["choices"][0]["text"]


def held(service: Service) -> set[str]:
    """Names of the adapters that the replica says it holds, or their digests where they have none."""
    digests = service.client.replicas[0].latest_stats.adapters
    return {"".join(service.directory.adapters.names_of([digest])) or digest for digest in digests}


async def test_an_adapter_that_is_unloaded_leaves_once_no_request_uses_it(service: Service, tmp_path: Path):
    loaded = write_adapter(tmp_path / "loaded", seed=3)
    body = {"lora_name": "three", "lora_path": str(loaded)}
    assert (await service.http.post("/v1/load_lora_adapter", json=body)).status_code == 200
    whole = await complete(service, "three", 150)
    await asyncio.gather(*(complete(service, name) for name in ("one", "two")))
    await eventually(lambda: held(service) == {"one", "two", "three"})
    stream = asyncio.ensure_future(complete(service, "three", 150))
    journal = service.router.journal
    await eventually(lambda: any(generation.token_ids for generation in journal.on_replica("replica-0")))
    assert (await service.http.post("/v1/unload_lora_adapter", json={"lora_name": "three"})).status_code == 200
    assert await stream == whole
    await eventually(lambda: held(service) == {"one", "two"})
    assert (await service.http.post("/v1/load_lora_adapter", json=body)).status_code == 200
    assert await complete(service, "three", 150) == whole


async def test_an_adapter_that_leaves_the_folder_or_changes_is_given_up(service: Service, tmp_path: Path):
    await asyncio.gather(*(complete(service, name) for name in ("one", "two")))
    await eventually(lambda: held(service) == {"one", "two"})
    shutil.rmtree(tmp_path / "folder" / "one")
    await eventually(lambda: held(service) == {"two"})
    write_adapter(tmp_path / "folder" / "two", seed=9, rank=8)
    await eventually(lambda: held(service) == set())
    await complete(service, "two")
    await eventually(lambda: held(service) == {"two"})


async def test_nothing_is_given_up_while_the_catalog_is_away(service: Service, tmp_path: Path, monkeypatch):
    """A router that cannot ask what there is does not conclude that there is less."""
    await complete(service, "one")
    await eventually(lambda: held(service) == {"one"})
    adapters = service.directory.adapters
    adapters.is_away = True
    monkeypatch.setattr(adapters, "_adapters", {})
    monkeypatch.setattr(adapters, "refresh", lambda: asyncio.sleep(0))
    await service.directory._unnamed.look()
    await asyncio.sleep(0.3)
    assert service.client.replicas[0].latest_stats.adapters
    adapters.is_away = False
    await eventually(lambda: held(service) == set())
