"""Replicas follow the load: up within seconds of a burst, down without losing a stream, to zero and back."""

import asyncio
import time
from collections.abc import Iterator

import pytest
from live_server import APP_NAME, ROOT, Server

pytestmark = pytest.mark.timeout(420)


@pytest.fixture
def scaling(server: Server) -> Iterator[Server]:
    """Another application beside the session's: none to three replicas that emulate an engine of four rows."""
    from ray import serve

    from deployments.app import build_app
    from deployments.config import AppConfig

    config = AppConfig.model_validate(
        {
            "model": str(ROOT / "configs" / "demo"),
            "engine_kind": "emulated",
            "engine": {"max_batch_size": 4, "num_pages": 512},
            "emulation": {"tokens_per_s": 50.0},
            "replicas": {
                "num_cpus": 0.1,
                "autoscaling": {
                    "min_replicas": 0, "max_replicas": 3, "initial_replicas": 1, "downscale_delay_s": 1,
                    "downscale_to_zero_delay_s": 1,
                },
            },
            "router": {"num_cpus": 0.1, "drain_after_s": 1},
        }
    )  # fmt: skip
    name = f"{APP_NAME}-scaling"
    serve.run(build_app(config), name=name, route_prefix="/scaling")
    yield Server(f"{server.url}/scaling", num_replicas=1)
    serve.delete(name, _blocking=False)  # Serve waits for two seconds


def num_serving(server: Server) -> int:
    return sum(replica["is_serving"] for replica in server.stats()["replicas"].values())


def departures(server: Server) -> list[str]:
    """Why replicas left, as the router says to the fleet page."""
    return [one["cause"] for one in server.fleet()["departures"]]


async def test_replicas_follow_the_load(scaling: Server):
    import openai

    client = openai.AsyncOpenAI(base_url=f"{scaling.url}/v1", api_key="unused", max_retries=0, timeout=120)
    await asyncio.to_thread(scaling.wait_for, lambda: scaling.http.get("/ready").status_code == 200, 30)

    async def ask(num_tokens: int) -> int:
        stream = await client.completions.create(model="demo", prompt="abc", max_tokens=num_tokens, stream=True)
        return len("".join([chunk.choices[0].text async for chunk in stream if chunk.choices]))

    is_up = False

    async def keep_asking() -> list[int]:
        answers = []
        while not is_up:  # the load lasts until it is answered: a busy machine takes its time to start a replica
            answers.append(await ask(100))
        return answers

    started = time.monotonic()
    asking = [asyncio.create_task(keep_asking()) for _ in range(12)]
    try:
        await asyncio.to_thread(scaling.wait_for, lambda: num_serving(scaling) == 3, 120, "no third replica")
    finally:
        is_up = True
    print(f"three replicas {time.monotonic() - started:.1f} s after the burst")
    long = asyncio.create_task(ask(600))
    assert {length for lengths in await asyncio.gather(*asking) for length in lengths} == {100}
    await asyncio.to_thread(scaling.wait_for, lambda: num_serving(scaling) <= 1, 120, "still too many replicas")
    assert await long == 600, "a stream was cut on the way down"
    await asyncio.to_thread(scaling.wait_for, lambda: num_serving(scaling) == 0, 120, "not down to none")
    await asyncio.to_thread(scaling.wait_for, lambda: len(departures(scaling)) == 3, 30, "not all have left")
    assert departures(scaling) == ["scaled down"] * 3
    started = time.monotonic()
    assert await ask(5) == 5
    print(f"an answer from none {time.monotonic() - started:.1f} s after the request")
