"""One scrape of any router: everything of all routers and replicas, each series once, no counter that ever falls."""

import asyncio
from dataclasses import replace

import pytest
from in_process import LocalClient, Service, ServiceFactory, emulated_config
from prometheus_client.parser import text_string_to_metric_families

from deployments.observe.exposition import RouterFigures, write_metrics

pytestmark = pytest.mark.timeout(180)

Series = tuple[str, tuple[tuple[str, str], ...]]


def parse(text: str) -> tuple[dict[Series, float], set[str]]:
    """Values by name and labels but for the model's name, and the names of those that count."""
    samples, counters = {}, set()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            series = sample.name, tuple(sorted((k, v) for k, v in sample.labels.items() if k != "model_name"))
            assert series not in samples, f"{series} twice"
            samples[series] = sample.value
            if family.type in ("counter", "histogram") and not sample.name.endswith("_created"):
                counters.add(sample.name)
    return samples, counters


def total(samples: dict[Series, float], name: str, **labels: str) -> float:
    return sum(
        value for (found, own), value in samples.items() if found == name and labels.items() <= dict(own).items()
    )


class Peers:
    """Routers of one process that ask each other. `is_stuck`: they cannot be asked now."""

    def __init__(self, router_id: str, routers: dict[str, Service]) -> None:
        self.router_id = router_id
        self._routers = routers
        self.is_stuck = False

    async def figures(self) -> list[RouterFigures]:
        return (
            [] if self.is_stuck else [one for service in self._routers.values() for one in service.directory.figures()]
        )


async def heard(service: Service, num_tokens: int) -> None:
    """Until the service's router has heard of so many generated tokens."""
    async with asyncio.timeout(60):
        while sum(one["num_generated_tokens"] for one in service.router.snapshot()["replicas"].values()) < num_tokens:
            await asyncio.sleep(0.005)


async def test_metrics_tell_what_happened(make_service: ServiceFactory):
    """Prometheus' own parser reads them; histograms count every request that ended, gauges what is."""
    service = await make_service(num_replicas=2)
    for _ in range(3):
        await service.post("/v1/completions", prompt="abc", max_tokens=20)
    await heard(service, 60)
    async with asyncio.timeout(60):
        while service.router.journal.num_live:
            await asyncio.sleep(0.005)
        while True:  # until both replicas have reported that their pages are free
            response = await service.http.get("/metrics")
            samples, _ = parse(response.text)
            if total(samples, "vllm:kv_cache_usage_perc") == 0:
                break
            await asyncio.sleep(0.005)
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert total(samples, "vllm:request_success_total", finished_reason="length") == 3
    assert ("vllm:request_success_total", (("finished_reason", "error"), ("router", "router"))) in samples, "from 0"
    assert total(samples, "vllm:time_to_first_token_seconds_count") == 3
    assert total(samples, "vllm:request_generation_tokens_sum") == 60
    assert 0.015 < total(samples, "vllm:request_decode_time_seconds_sum") < 10
    assert total(samples, "rayline:requests_total") == 3
    assert total(samples, "rayline:router_replicas") == 2
    assert total(samples, "rayline:min_replicas") == 1
    assert total(samples, "rayline:gpus_per_replica") == 1
    assert total(samples, "vllm:generation_tokens_total") >= 60
    assert total(samples, "rayline:replica_serving", engine="replica-1") == 1
    assert total(samples, "rayline:replica_silent") == 0


@pytest.fixture
async def two_routers(make_service: ServiceFactory):
    """Two routers in front of the same two replicas, as Serve's proxy has them: each takes every other request."""
    routers: dict[str, Service] = {}
    first = await make_service(num_replicas=2, peers=Peers("a", routers))
    second = Service(emulated_config(), LocalClient(first.client.replicas), peers=Peers("b", routers))
    routers.update(a=first, b=second)
    await second.router.wait_until_ready()
    async with asyncio.timeout(60):
        while len(second.router.fleet.replica_ids) < 2:
            await asyncio.sleep(0.005)
    yield first, second
    await second.http.aclose()
    second.directory.close()


async def test_whichever_router_is_asked_counters_only_rise(two_routers):
    """What the proxy does to a scrape: now one router answers, now the other."""
    last: dict[Series, float] = {}
    for turn in range(8):
        await two_routers[turn % 3 % 2].post("/v1/completions", prompt="abc", max_tokens=5)
        samples, counters = parse((await two_routers[turn % 2].http.get("/metrics")).text)
        assert last.keys() - samples.keys() == set()
        fallen = {series for series, value in last.items() if series[0] in counters and samples[series] < value}
        assert fallen == set()
        assert total(samples, "rayline:requests_total") == turn + 1
        assert total(samples, "rayline:router_replicas", router="b") == 2
        last = samples
    assert total(last, "rayline:requests_total", router="a") == 5
    async with asyncio.timeout(60):  # a generation is counted when its call has returned, after the client's answer
        while total(last, "vllm:e2e_request_latency_seconds_count") < 8:
            await asyncio.sleep(0.01)
            last, _ = parse((await two_routers[0].http.get("/metrics")).text)
    assert len([series for series in last if series[0] == "vllm:generation_tokens_total"]) == 2, "one a replica"


async def test_routers_that_cannot_be_asked_are_left_out_and_nothing_falls(two_routers):
    first, second = two_routers
    for service in two_routers:
        await service.post("/v1/completions", prompt="abc", max_tokens=5)
    whole, counters = parse((await second.http.get("/metrics")).text)
    first.directory._peers.is_stuck = True
    part, _ = parse((await first.http.get("/metrics")).text)
    assert total(part, "rayline:requests_total") == 1
    assert {dict(labels).get("router") for _, labels in part} == {"a", None}
    assert all(part[series] >= whole[series] for series in part if series[0] in counters)


async def test_a_replica_is_told_by_the_router_that_heard_it_last(make_service: ServiceFactory):
    service = await make_service(num_replicas=1)
    figures = service.router.metrics.figures()
    stats = figures.replicas["replica-0"]

    def heard_by(router_id: str, age_s: float, num_tokens: int) -> RouterFigures:
        replicas = {"replica-0": {**stats, "age_s": age_s, "num_generated_tokens": num_tokens}}
        return replace(figures, router_id=router_id, families=(), replicas=replicas)

    samples, _ = parse(write_metrics([heard_by("a", 0.4, 10), heard_by("b", 0.1, 13), heard_by("c", 9, 2)]).decode())
    assert total(samples, "vllm:generation_tokens_total") == 13
    assert total(samples, "rayline:replica_report_age_seconds", router="c") == 9
    # Alone, a router that has not heard it for long says nothing: an old number after a newer one is a fall.
    samples, _ = parse(write_metrics([heard_by("c", 9, 2)]).decode())
    assert not any(name == "vllm:generation_tokens_total" for name, _ in samples)
