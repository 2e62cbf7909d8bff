"""Two versions of a model side by side, as in a rolling update: no answer is made of both."""

import asyncio
from pathlib import Path

import pytest
from in_process import LocalClient, Service, ServiceFactory, emulated_config, end_service
from scripted_engine import TOOL_TEMPLATE, checkpoint
from test_failover import until
from test_router import events, finishes, text_of

from deployments.channel.messages import FailureKind, GenerateCall, decode_reply, encode
from deployments.fleet.engine_client import Starts
from deployments.replica.engine_replica import EngineReplica
from llm.serving.schemas import GenerationRequest

pytestmark = pytest.mark.timeout(60)

SLOW = {"tokens_per_s": 100.0, "max_seq_len": 2048}


def state_of(service: Service, replica_id: str) -> str | None:
    return service.router.snapshot()["replicas"].get(replica_id, {}).get("state")


def new_config(directory: Path, **changes: object):
    return emulated_config(
        model=str(checkpoint(directory / "new", TOOL_TEMPLATE)), served_model_name="demo", emulation=SLOW, **changes
    )


async def test_a_router_keeps_to_its_own_version(make_service: ServiceFactory, tmp_path: Path):
    """Its last replica stays for it while it is taken away: streams end there, and late requests are answered there.

    Once that is gone, what comes is told at once, though the next new replica is starting.
    """
    config = emulated_config(emulation=SLOW, router={"drain_after_s": 0.1})
    service = await make_service(config)
    expected = text_of(events((await service.post("/v1/completions", prompt="a", max_tokens=150, stream=True)).text))
    service.client.add(EngineReplica(new_config(tmp_path), "new"))
    await until(lambda: state_of(service, "new") == "other version")
    asking = [
        asyncio.ensure_future(service.post("/v1/completions", prompt="a", max_tokens=150, stream=True))
        for _ in range(4)
    ]
    await until(lambda: sum(len(g.token_ids) > 5 for g in service.router.journal._live.values()) == 4)
    service.client.starts = Starts(1)
    service.client.drain(0)
    late = await service.post("/v1/completions", prompt="a", max_tokens=150, stream=True)
    for answer in (late, *await asyncio.gather(*asking)):
        assert text_of(events(answer.text)) == expected
        assert finishes(events(answer.text)) == [(0, "length")]
    assert state_of(service, "replica-0") == "staying"
    assert set(service.client.stays) == {"replica-0"}
    assert service.router.journal.num_moves == service.router.journal.num_resumes == 0
    service.client.end(0)
    await until(lambda: state_of(service, "replica-0") == "gone")
    too_late = await service.post("/v1/completions", prompt="a", max_tokens=5)
    assert too_late.status_code == 503
    assert "updated" in too_late.json()["error"]["message"]
    assert too_late.headers["retry-after"]
    assert not service.client._calls["new"]


async def test_the_last_replica_stays_although_nobody_has_seen_the_next_version_yet(
    make_service: ServiceFactory, tmp_path: Path
):
    """Ray Serve lists the first new replica and takes the last old one away in one and the same word."""
    service = await make_service(emulated_config(emulation=SLOW))
    await until(lambda: state_of(service, "replica-0") == "serving")
    client = service.client
    client._running.discard("replica-0")
    client._leaving.add("replica-0")
    client.add(EngineReplica(new_config(tmp_path), "new"))
    assert state_of(service, "replica-0") == "staying"
    assert "replica-0" in service.router.fleet.replica_ids, "requests go there without a pause"
    await until(lambda: state_of(service, "new") == "other version")
    assert (await service.post("/v1/completions", prompt="a", max_tokens=5)).status_code == 200
    await until(lambda: len(client.stays) >= 3)
    assert set(client.stays) == {"replica-0"}


async def test_a_replica_that_is_taken_away_leaves_where_another_one_of_its_version_is(
    make_service: ServiceFactory, tmp_path: Path
):
    """Scaled down, or replaced by one of the same version: it is asked to stay at most until that one has reported."""
    service = await make_service(emulated_config(), num_replicas=2)
    await until(lambda: state_of(service, "replica-0") == state_of(service, "replica-1") == "serving")
    service.client.add(EngineReplica(new_config(tmp_path), "new"))
    service.client.drain(0)
    assert state_of(service, "replica-0") == "leaving"
    await until(lambda: state_of(service, "new") == "other version")
    assert state_of(service, "replica-0") in ("leaving", "gone")
    assert not service.client.stays
    service.client.add(EngineReplica(emulated_config(), "same"))
    service.client.drain(1)
    await until(lambda: state_of(service, "same") == "serving")
    assert state_of(service, "replica-1") == "leaving"


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
