"""Two versions of a model side by side, as in a rolling update: no answer is made of both."""

import asyncio
from pathlib import Path

import pytest
from in_process import LocalClient, Service, ServiceFactory, emulated_config, end_service
from scripted_engine import TOOL_TEMPLATE, checkpoint
from test_failover import until
from test_router import events, finishes, text_of

from deployments.channel.messages import FailureKind, GenerateCall, decode_reply, encode
from deployments.replica.engine_replica import EngineReplica
from llm.serving.schemas import GenerationRequest

pytestmark = pytest.mark.timeout(60)

SLOW = {"tokens_per_s": 100.0, "max_seq_len": 2048}


def new_config(directory: Path, **changes: object):
    return emulated_config(
        model=str(checkpoint(directory / "new", TOOL_TEMPLATE)), served_model_name="demo", emulation=SLOW, **changes
    )


async def test_a_router_keeps_to_its_own_version(make_service: ServiceFactory, tmp_path: Path):
    """With its last replica being taken away and only new ones beside it, a stream ends where it is."""
    config = emulated_config(emulation=SLOW, router={"drain_after_s": 0.1}, admission={"no_replica_timeout_s": 0.5})
    service = await make_service(config)
    expected = text_of(events((await service.post("/v1/completions", prompt="a", max_tokens=150, stream=True)).text))
    service.client.add(EngineReplica(new_config(tmp_path), "new"))
    await until(lambda: service.router.snapshot()["replicas"].get("new", {}).get("state") == "other version")
    asking = [
        asyncio.ensure_future(service.post("/v1/completions", prompt="a", max_tokens=150, stream=True))
        for _ in range(4)
    ]
    await until(lambda: sum(len(g.token_ids) > 5 for g in service.router.journal._live.values()) == 4)
    service.client.drain(0)
    late = await service.post("/v1/completions", prompt="a", max_tokens=5)
    assert late.status_code == 503
    for answer in await asyncio.gather(*asking):
        assert text_of(events(answer.text)) == expected
        assert finishes(events(answer.text)) == [(0, "length")]
    assert not service.client._calls["new"]
    assert service.router.journal.num_moves == 0


async def test_a_replica_declines_calls_of_another_version_and_those_meant_for_others(tmp_path: Path):
    old, new = EngineReplica(emulated_config(), "old"), EngineReplica(new_config(tmp_path), "new")
    request = GenerationRequest(prompt_token_ids=(1, 2, 3), max_new_tokens=4)
    call = encode(GenerateCall.of(request, 1, None, old.info.fingerprint))
    assert len(decode_reply(await old.generate(call, ("old", "gone"))).token_ids) == 4
    for replica, ranking in ((new, ("new",)), (new, ()), (old, ("gone",))):
        reply = decode_reply(await replica.generate(call, ranking))
        assert reply.failure.kind is FailureKind.DECLINED
        assert reply.token_ids == []
    await asyncio.to_thread(old.stop)
    await asyncio.to_thread(new.stop)


async def test_a_new_router_waits_for_a_new_replica(tmp_path: Path):
    config = new_config(tmp_path)
    client = LocalClient([EngineReplica(emulated_config(), "old")])
    service = Service(config, client)
    waiting = asyncio.ensure_future(service.router.wait_for_own_version())
    await until(lambda: service.router.snapshot()["replicas"].get("old") is not None)
    await asyncio.sleep(1.2)
    assert not waiting.done(), "the routers before it keep the clients"
    assert not service.router.is_ready
    client.add(EngineReplica(config, "new"))
    await asyncio.wait_for(waiting, 5)
    assert service.router.is_ready
    response = await service.post("/v1/completions", prompt="abc", max_tokens=5)
    assert response.status_code == 200
    assert service.router.snapshot()["replicas"]["old"]["state"] == "other version"
    assert service.router.snapshot()["replicas"]["new"]["state"] == "serving"
    await end_service(service)


async def test_where_there_is_no_replica_a_router_does_not_wait():
    service = Service(emulated_config(), LocalClient([EngineReplica(emulated_config(), "only")]))
    service.client._running.clear()
    await asyncio.wait_for(service.router.wait_for_own_version(), 5)
    assert not service.router.is_ready
    service.client.start(0)
    await service.router.wait_until_ready()
    await end_service(service)
