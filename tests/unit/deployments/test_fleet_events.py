"""What the fleet page is sent: over HTTP, from a router and engines in this process."""

import asyncio
import json
from typing import Any

import pytest
from in_process import Service, ServiceFactory, emulated_config, eventually

from deployments.api import fleet_stream
from deployments.observe.exposition import RouterFigures
from deployments.observe.history import RouterHistory

TOKENS = {"prompt": "abc", "max_tokens": 20}


class Peers:
    """Routers of one process that ask each other."""

    def __init__(self, router_id: str, routers: dict[str, Service]) -> None:
        self.router_id = router_id
        self._routers = routers

    async def figures(self) -> list[RouterFigures]:
        return []

    async def histories(self) -> list[RouterHistory]:
        return [service.router.history() for service in self._routers.values()]


async def first_event(service: Service) -> dict[str, Any]:
    """The event that a page gets when it opens."""
    stream = fleet_stream.watch_fleet(service.directory)
    data = await anext(stream)
    await stream.aclose()
    event: dict[str, Any] = json.loads(data.decode().removeprefix("data: "))
    return event


async def over(service: Service) -> None:
    await eventually(lambda: service.router.journal.num_live == 0)


async def test_a_page_that_opens_sees_what_has_been(make_service: ServiceFactory):
    """Nobody looked while the requests ran: their latencies, the load and the replicas are there all the same."""
    service = await make_service(num_replicas=2)
    for _ in range(3):
        await service.post("/v1/completions", **TOKENS)
    await over(service)
    service.router._sampled_at = 0.0
    service.router.sample()
    event = await first_event(service)
    (model,) = event["models"]
    assert model["name"] == "demo"
    assert set(model["replicas"]) == {"replica-0", "replica-1"}
    assert {item["text"] for item in event["events"]} == {"Replica replica-0 joined", "Replica replica-1 joined"}
    history = event["history"]
    assert (history["num_routers"], history["totals"]["num_requests"]) == (1, 3)
    ttft, gap = history["latency"]["900"]["ttft"], history["latency"]["900"]["gap"]
    assert ttft["num"] == 3
    assert 0 < ttft["p50_s"] <= ttft["p90_s"] <= ttft["p99_s"] < 30
    assert 3 <= gap["num"] <= 3 * 19, "tokens that come together have one gap before them"
    assert history["points"][-1]["num_serving"] == 2


async def test_what_autoscaling_wants_is_said(make_service: ServiceFactory):
    config = emulated_config(replicas={"autoscaling": {"min_replicas": 0, "max_replicas": 3}})
    service = await make_service(config, num_replicas=1)
    (model,) = (await first_event(service))["models"]
    assert model["wanted"] == [0, 3]
    assert model["scaling"].startswith("The load asks for ")
    assert model["scaling"].endswith("; 0 to 3 may run.")
    fixed = await make_service(emulated_config(replicas={"num_replicas": 2}), num_replicas=1)
    (model,) = (await first_event(fixed))["models"]
    assert (model["wanted"], model["scaling"]) == ([2, 2], None)


@pytest.mark.parametrize(("interval_s", "num_later"), [(3600.0, 0), (0.0, 9)])
async def test_the_history_comes_at_first_and_then_from_time_to_time(
    make_service: ServiceFactory, monkeypatch, interval_s: float, num_later: int
):
    monkeypatch.setattr(fleet_stream, "_INTERVAL_S", 0.0)
    monkeypatch.setattr(fleet_stream, "_HISTORY_INTERVAL_S", interval_s)
    stream = fleet_stream.watch_fleet((await make_service(num_replicas=1)).directory)
    has_history = [b'"history"' in await anext(stream) for _ in range(10)]
    await stream.aclose()
    assert has_history[0]
    assert sum(has_history[1:]) == num_later


@pytest.mark.parametrize("num_prompts", [1, 3])
async def test_vectors_are_no_tokens(make_service: ServiceFactory, num_prompts: int):
    service = await make_service(num_replicas=1)
    answer = await service.post("/v1/embeddings", input=["text"] * num_prompts)
    assert answer.status_code == 200
    await over(service)
    latency = (await service.directory.fleet_history())["latency"]["900"]
    assert (latency["ttft"]["num"], latency["gap"]["num"]) == (0, 0)


async def test_what_comes_with_the_reply_alone_has_a_first_token_too(make_service: ServiceFactory):
    """Log probabilities of the prompt travel with the reply, and the tokens with them."""
    service = await make_service(num_replicas=1)
    answer = await service.post("/v1/completions", **TOKENS, prompt_logprobs=1)
    assert answer.status_code == 200
    await over(service)
    latency = (await service.directory.fleet_history())["latency"]["900"]
    assert latency["ttft"]["num"] == 1


async def test_a_pause_of_a_stream_that_moves_is_a_gap(make_service: ServiceFactory):
    """The client sees it, so it counts: about 50 ms at least, while tokens come every 2 ms."""
    service = await make_service(emulated_config(emulation={"tokens_per_s": 500.0}), num_replicas=2)
    task = asyncio.ensure_future(service.post("/v1/completions", prompt="abc", max_tokens=400))
    live = service.router.journal._live
    await eventually(lambda: any(len(one.token_ids) > 20 and one.replica_id for one in live.values()))
    (generation,) = live.values()
    service.client.kill(int(generation.replica_id.removeprefix("replica-")))
    assert (await task).json()["usage"]["completion_tokens"] == 400
    gaps = (await service.directory.fleet_history())["latency"]["900"]["gap"]
    assert gaps["num"] > 10
    longest_s = max(interval.gaps.percentile(100) or 0.0 for interval in service.router.history().intervals)
    assert longest_s > 0.04


async def test_two_routers_are_told_as_one(make_service: ServiceFactory):
    """Each has had requests of its own; whichever the page asks, it shows both."""
    routers: dict[str, Service] = {}
    for router_id, num_requests in (("a", 2), ("b", 3)):
        service = await make_service(num_replicas=1, peers=Peers(router_id, routers))
        routers[router_id] = service
        for _ in range(num_requests):
            await service.post("/v1/completions", **TOKENS)
        await over(service)
    for router_id, service in routers.items():
        event = await first_event(service)
        assert event["router_id"] == router_id
        assert event["history"]["num_routers"] == 2
        assert event["history"]["totals"]["num_requests"] == 5
        assert event["history"]["latency"]["900"]["ttft"]["num"] == 5
