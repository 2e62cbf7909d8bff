"""How far a client may push itself forward, and when a load balancer may send requests here."""

import asyncio
import hashlib

import pytest
from in_process import LocalClient, Service, ServiceFactory, emulated_config, end_service

from deployments.accounts_config import KeyLimits
from deployments.config import AppConfig
from deployments.router.keys import ApiKey

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
BODIES = {
    "/v1/completions": {"prompt": "a", "max_tokens": 1},
    "/v1/chat/completions": CHAT,
    "/v1/messages": CHAT,
    "/v1/responses": {"input": "hi", "max_output_tokens": 1},
}


def api_key(name: str, **limits: int) -> ApiKey:
    return ApiKey(name, hashlib.sha256(name.encode()).digest(), KeyLimits(**limits))


def param_of(path: str, body: dict) -> str | None:
    error = body["error"]
    return "priority" if path == "/v1/messages" and error["message"].startswith("priority:") else error.get("param")


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("priority", "status"), [(-(2**31), 400), (-101, 400), (-100, 200), (100, 200), (101, 400), (True, 400), ("1", 400)]
)
async def test_the_bounds_of_a_priority(make_service: ServiceFactory, path: str, priority: object, status: int):
    service = await make_service()
    answer = await service.post(path, **BODIES[path], priority=priority)
    assert answer.status_code == status
    assert status == 200 or param_of(path, answer.json()) == "priority"


@pytest.mark.parametrize("path", BODIES)
async def test_a_key_goes_before_others_only_where_its_entry_says_so(make_service: ServiceFactory, path: str):
    keys = (api_key("plain"), api_key("urgent", min_priority=-10), api_key("batch", min_priority=20))
    service = await make_service(keys=keys)

    async def ask(secret: str, **fields: int):
        return await service.http.post(
            path, json={"model": "demo", **BODIES[path], **fields}, headers={"x-api-key": secret}
        )

    allowed = {("plain", 0), ("plain", 5), ("urgent", -10), ("urgent", 0), ("batch", 20), ("batch", 100)}
    for secret, priority in allowed:
        assert (await ask(secret, priority=priority)).status_code == 200, (secret, priority)
    for secret, priority in {("plain", -1), ("urgent", -11), ("batch", 19), ("batch", 0)}:
        refused = await ask(secret, priority=priority)
        assert refused.status_code == 400, (secret, priority)
        assert param_of(path, refused.json()) == "priority"


async def test_a_key_that_has_to_wait_waits_without_saying_so(make_service: ServiceFactory):
    """Requests of a key whose lowest priority is above 0 get that one."""
    config = emulated_config(
        engine={"max_batch_size": 1, "num_pages": 2048}, emulation={"tokens_per_s": 100.0, "max_seq_len": 2048}
    )
    service = await make_service(config, keys=(api_key("plain"), api_key("batch", min_priority=20)))
    done: list[str] = []

    async def ask(name: str, secret: str) -> None:
        body = {"model": "demo", "prompt": "a", "max_tokens": 10, "ignore_eos": True}
        await service.http.post("/v1/completions", json=body, headers={"x-api-key": secret})
        done.append(name)

    async def start(name: str, secret: str, num_before: int) -> asyncio.Task[None]:
        task = asyncio.ensure_future(ask(name, secret))
        async with asyncio.timeout(5):
            while service.router.journal.num_requests == num_before:
                await asyncio.sleep(0.001)
        return task

    tasks = [await start(f"busy-{i}", "plain", i) for i in range(4)]
    tasks.append(await start("batch", "batch", 4))
    tasks.append(await start("plain", "plain", 5))
    await asyncio.gather(*tasks)
    assert done.index("plain") < done.index("batch")


def scaling(min_replicas: int) -> AppConfig:
    return emulated_config(replicas={"autoscaling": {"min_replicas": min_replicas, "max_replicas": 2}})


async def test_not_ready_without_a_replica(make_service: ServiceFactory):
    service = await make_service(num_replicas=2)
    assert (await service.http.get("/ready")).status_code == 200
    service.client.drain(0)
    assert (await service.http.get("/ready")).status_code == 200, "one is left"
    service.client.drain(1)
    answer = await service.http.get("/ready")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_replica")
    assert answer.headers["retry-after"] == "10"
    assert (await service.http.get("/health")).status_code == 200, "the router itself is well"
    service.client.start(1)
    async with asyncio.timeout(10):
        while (await service.http.get("/ready")).status_code != 200:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(("min_replicas", "status"), [(0, 200), (1, 503)])
async def test_ready_where_the_last_replica_left_on_purpose(
    make_service: ServiceFactory, min_replicas: int, status: int
):
    service = await make_service(scaling(min_replicas))
    service.client.drain(0)
    assert (await service.http.get("/ready")).status_code == status


@pytest.mark.parametrize(("min_replicas", "status"), [(0, 200), (1, 503)])
async def test_a_new_router_of_a_fleet_at_zero_gets_requests(min_replicas: int, status: int):
    """Nothing else would start a replica; until one has told what it is, other fleets are loading."""
    service = Service(scaling(min_replicas), LocalClient([]))
    answer = await service.http.get("/ready")
    assert answer.status_code == status
    assert status == 200 or answer.json()["error"]["code"] == "model_loading"
    await end_service(service)


async def test_not_ready_while_the_only_replica_is_silent(make_service: ServiceFactory):
    """It is on Serve's list, so no request starts another one."""
    service = await make_service(scaling(0))
    service.router.fleet.remove(service.client.replicas[0].replica_id)
    service.client.replicas[0].stop()
    assert (await service.http.get("/ready")).status_code == 503
