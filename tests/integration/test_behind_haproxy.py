"""Several routers behind HAProxy: clients that never read, what one scrape sees, and a router that is stopped."""

import asyncio
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from chaos.client_faults import ask_and_never_read
from chaos.command_faults import Command
from chaos.streams import Clients
from deployments.serve.processes import descendants

pytestmark = pytest.mark.timeout(240)

NUM_ROUTERS = 4
CLIENT_TIMEOUT_S = 4
SETTINGS = {
    "engine_kind": "emulated",
    "emulation.tokens_per_s": 100,
    "emulation.max_seq_len": 4096,
    "engine.max_batch_size": 64,
    "engine.num_pages": 8192,
    "replicas.num_cpus": 0.1,
    "router.num_cpus": 0.1,
    "router.num_replicas": NUM_ROUTERS,
}


@pytest.fixture(scope="module")
def command() -> Iterator[Command]:
    options = [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={value}")]
    # The usual 30 s would make this test longer, and show nothing more.
    environment = {**os.environ, "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(CLIENT_TIMEOUT_S)}
    with Command(options, environment=environment) as command:
        command.wait_until_ready()
        yield command


@pytest.fixture
def http(command: Command) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=command.url, timeout=60, trust_env=False) as client:
        yield client


def scrape(http: httpx.Client) -> dict[str, dict[str, float]]:
    """Values of the counters of requests by name and router; a new connection, so that any router may answer."""
    text = httpx.get(f"{http.base_url}/metrics", timeout=60, trust_env=False).text
    series: dict[str, dict[str, float]] = {}
    seen: Counter[str] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            seen[f"{sample.name}{sorted(sample.labels.items())}"] += 1
            if "router" in sample.labels:
                series.setdefault(sample.name, {})[sample.labels["router"]] = sample.value
    assert max(seen.values()) == 1, "a series comes twice"
    return series


def num_running(http: httpx.Client) -> int:
    return sum(replica["num_running"] for replica in http.get("/rayline/stats").json()["replicas"].values())


def wait_for(condition, timeout_s: float, what: str) -> float:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, what
        time.sleep(0.05)
    return time.monotonic() - started


def test_each_scrape_tells_of_all_routers_and_no_counter_falls(http: httpx.Client):
    wait_for(lambda: len(scrape(http)["rayline:requests_total"]) == NUM_ROUTERS, 30, "a router is missing")
    before = sum(scrape(http)["rayline:requests_total"].values())
    last: dict[str, float] = {}
    for number in range(1, 13):
        answer = httpx.post(
            f"{http.base_url}/v1/completions", json={"model": "demo", "prompt": "a", "max_tokens": 2}, timeout=60
        )
        assert answer.status_code == 200
        now = scrape(http)["rayline:requests_total"]
        assert len(now) == NUM_ROUTERS
        assert all(now[router] >= value for router, value in last.items()), "a counter fell"
        assert sum(now.values()) == before + number
        last = now
    assert sum(value > 0 for value in last.values()) > 1, "HAProxy spreads the requests"


def test_clients_that_never_read_are_aborted_and_others_are_not(command: Command, http: httpx.Client):
    """Fault F21: what the kernel holds for them is filled within seconds, not with their whole answers."""
    with ExitStack() as stack:
        for _ in range(8):
            ask_and_never_read(stack, command.url)
        wait_for(lambda: num_running(http) >= 32, 30, "they do not begin")
        generated = sum(r["num_generated_tokens"] for r in http.get("/rayline/stats").json()["replicas"].values())

        async def read_all() -> bool:
            async with Clients(command.url) as clients:
                return (await clients.ask("still there?", 400)).is_complete

        assert asyncio.run(read_all())
        wait_for(lambda: num_running(http) == 0, 60, "they are still running")
        stats = http.get("/rayline/stats").json()["replicas"].values()
    generated = sum(replica["num_generated_tokens"] for replica in stats) - generated
    assert generated < 32 * 3000, "they were generated to their ends"


async def test_a_router_that_is_stopped_for_a_while_finishes_its_streams(command: Command):
    """Fault F16: it counts as dead after 3.5 s, and takes its streams up again when it goes on."""
    routers = [
        pid for pid in descendants(command.process.pid) if re.match("ray::ServeReplica:[^:]*:Router", command_line(pid))
    ]
    assert len(routers) == NUM_ROUTERS
    async with Clients(command.url) as clients:
        asking = [asyncio.create_task(clients.ask(f"stream {i % 4}", 900)) for i in range(16)]
        await asyncio.sleep(1)
        os.kill(routers[0], signal.SIGSTOP)
        try:
            await asyncio.sleep(5)
        finally:
            os.kill(routers[0], signal.SIGCONT)
        stories = await asyncio.gather(*asking)
        assert [story.error for story in stories if not story.is_complete] == []
        assert sum(story.longest_pause_s > 4 for story in stories) in range(1, 16), "the stopped router's"
        texts = {story.prompt: story.text for story in stories}
        assert all(story.text == texts[story.prompt] for story in stories)
        again = await asyncio.gather(*(clients.ask("again", 20) for _ in range(16)))
        assert all(story.is_complete for story in again)
    assert command_line(routers[0]), "the router was replaced"


def command_line(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
