"""Adapters by request with the real engine: merged = chosen by request, resumed = uninterrupted, changed = refused."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from in_process import DEMO, LocalClient, Service, end_service, eventually
from small_adapters import write_adapter

from deployments.adapters import catalog as catalog_module, known as known_module
from deployments.config import AppConfig
from deployments.replica.engine_replica import EngineReplica
from llm.checkpoint.adapter_digest import adapter_digest
from llm.config import EngineConfig
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import GenerationRequest

pytestmark = pytest.mark.timeout(300)

PROMPT = tuple(b"What is 17 + 25?")
NAMES = ("demo", "one", "two")


@pytest.fixture
async def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Service]:
    """Two CPU replicas in float32; the folder has the adapters one and two."""
    monkeypatch.setattr(catalog_module, "_LOOK_INTERVAL_S", 0.05)
    monkeypatch.setattr(known_module, "_INTERVAL_S", 0.05)
    write_adapter(tmp_path / "folder" / "one", seed=1, rank=4)
    write_adapter(tmp_path / "folder" / "two", seed=2, rank=8)
    settings = {
        "model": str(DEMO),
        "device": "cpu",
        "dtype": "float32",
        "engine": {"max_seq_len": 512, "max_batch_size": 8, "max_adapters": 2, "max_adapter_rank": 8},
        "replicas": {"num_replicas": 2, "torch_threads": 1},
        "adapter_folder": str(tmp_path / "folder"),
        "adapter_roots": [str(tmp_path)],
        "allow_admin_without_keys": True,
    }
    config = AppConfig.model_validate(settings)
    service = Service(config, LocalClient([EngineReplica(config, f"replica-{i}") for i in range(2)]))
    await service.router.wait_until_ready()
    await eventually(lambda: len(service.router.fleet.replica_ids) == 2 and service.directory.adapters.is_settled)
    yield service
    await end_service(service)


def merged_text(lora: Path | None, num_tokens: int) -> str:
    """What the engine makes whose weights have the adapter merged into them."""
    engine = ContinuousBatchingEngine.from_pretrained(
        DEMO, config=EngineConfig(max_seq_len=512), device="cpu", lora=lora, progress=False
    )
    request = GenerationRequest(
        prompt_token_ids=PROMPT, max_new_tokens=num_tokens, temperature=0, ignore_eos=True, seed=0
    )
    [result] = engine.generate([request], progress=False)
    return result.text


async def complete(service: Service, model: str, num_tokens: int, **body: Any) -> Any:
    fields = {"prompt": list(PROMPT), "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, **body}
    return await service.post("/v1/completions", model=model, **fields)


async def text(service: Service, model: str, num_tokens: int) -> str:
    answer = await complete(service, model, num_tokens)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


async def test_an_answer_is_that_of_the_merged_model_even_beside_others(service: Service, tmp_path: Path):
    expected = {name: merged_text(tmp_path / "folder" / name if name != "demo" else None, 24) for name in NAMES}
    assert len(set(expected.values())) == 3
    names = NAMES * 4
    assert await asyncio.gather(*(text(service, name, 24) for name in names)) == [expected[name] for name in names]

    loaded = write_adapter(tmp_path / "loaded", seed=3)
    body = {"lora_name": "three", "lora_path": str(loaded)}
    assert (await service.http.post("/v1/load_lora_adapter", json=body)).status_code == 200
    assert await text(service, "three", 24) == merged_text(loaded, 24)


async def test_streams_continue_with_their_adapters(service: Service):
    whole = {name: await text(service, name, 100) for name in NAMES}
    streams = [asyncio.ensure_future(text(service, name, 100)) for name in NAMES * 2]
    journal = service.router.journal
    await eventually(lambda: any(len(g.token_ids) > 5 for g in journal.on_replica("replica-0")))
    service.client.kill(0)
    assert await asyncio.gather(*streams) == [whole[name] for name in NAMES * 2]
    assert journal.num_resumes > 0


async def test_a_stream_is_not_continued_with_a_changed_adapter(service: Service, tmp_path: Path):
    """The replica that still holds the old one is lost; the other one finds other files, and runs nothing with them."""
    stream = asyncio.ensure_future(complete(service, "one", 400))
    journal = service.router.journal
    await eventually(lambda: any(g.token_ids for g in journal._live.values()))
    [generation] = journal._live.values()
    write_adapter(tmp_path / "folder" / "one", seed=7)
    service.client.kill(int(generation.replica_id.removeprefix("replica-")))
    answer = await stream
    assert answer.status_code == 503, answer.text
    assert answer.json()["error"]["code"] == "adapter_changed"
    assert answer.headers["Retry-After"]
    changed = adapter_digest(tmp_path / "folder" / "one")
    await eventually(lambda: service.directory.adapters.find("one")[0].digest == changed)
    assert await text(service, "one", 24) == merged_text(tmp_path / "folder" / "one", 24)


async def test_an_adapter_that_does_not_fit_is_never_served(service: Service, tmp_path: Path):
    write_adapter(tmp_path / "large", rank=16)
    body = {"lora_name": "large", "lora_path": str(tmp_path / "large")}
    refused = await service.http.post("/v1/load_lora_adapter", json=body)
    assert refused.status_code == 400
    assert "engine.max_adapter_rank" in refused.json()["error"]["message"]
    broken = write_adapter(tmp_path / "broken", modules_to_save=["lm_head"])
    body = {"lora_name": "broken", "lora_path": str(broken)}
    refused = await service.http.post("/v1/load_lora_adapter", json=body)
    assert refused.status_code == 400
    assert "modules_to_save" in refused.json()["error"]["message"]
