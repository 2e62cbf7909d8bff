"""Replicas that stall, are taken away or come up; deadlines, priorities, refusals and where the time went."""

import asyncio
import threading
import time

import pytest
from in_process import ServiceFactory, emulated_config
from test_router import events, finishes, text_of

from deployments.config import LiveConfig

SLOW = {"tokens_per_s": 100.0, "max_seq_len": 2048}


async def until(condition, timeout_s: float = 60) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


def replica_of(service, index: int = 0) -> str:
    return next(g.replica_id for g in service.router.journal._live.values() if g.index == index)


async def test_streams_leave_a_replica_that_stalls(make_service: ServiceFactory):
    """Nothing new goes there at once; its streams go on elsewhere later, token for token."""
    config = emulated_config(emulation=SLOW, router={"silence_timeout_s": 0.4, "stall_timeout_s": 1.0})
    service = await make_service(config, num_replicas=2)
    expected = (await service.post("/v1/completions", prompt="abc", max_tokens=60)).json()["choices"][0]["text"]
    asking = asyncio.ensure_future(service.post("/v1/completions", prompt="abc", max_tokens=60, stream=True))
    await until(lambda: any(len(g.token_ids) > 5 for g in service.router.journal._live.values()))
    stalled = replica_of(service)
    loop = next(r for r in service.client.replicas if r.replica_id == stalled)._loop
    gate, step = threading.Event(), loop._engine.step
    loop._engine.step = lambda: (gate.wait(20), step())[1]
    await until(lambda: stalled not in service.router.fleet.replica_ids)
    assert (await service.post("/v1/completions", prompt="xyz", max_tokens=3)).status_code == 200
    chunks = events((await asking).text)
    assert text_of(chunks) == expected
    assert finishes(chunks) == [(0, "length")]
    assert service.router.journal.num_resumes == 1
    gate.set()
    await until(lambda: stalled in service.router.fleet.replica_ids)


async def test_streams_leave_a_replica_that_is_taken_away(make_service: ServiceFactory):
    config = emulated_config(emulation=SLOW, router={"drain_after_s": 0.3})
    service = await make_service(config, num_replicas=2)
    expected = (await service.post("/v1/completions", prompt="abc", max_tokens=150)).json()["choices"][0]["text"]
    asking = [
        asyncio.ensure_future(service.post("/v1/completions", prompt="abc", max_tokens=150, stream=True))
        for _ in range(4)
    ]
    await until(lambda: sum(len(g.token_ids) > 5 for g in service.router.journal._live.values()) == 4)
    service.client.drain(0)
    await until(lambda: not service.client._calls["replica-0"], 2)
    for response in await asyncio.gather(*asking):
        assert text_of(events(response.text)) == expected
    assert service.router.journal.num_resumes == 0
    assert service.router.journal.num_moves >= 1


async def test_the_last_replica_keeps_its_streams_while_it_is_taken_away(make_service: ServiceFactory):
    config = emulated_config(emulation=SLOW, router={"drain_after_s": 0.1})
    service = await make_service(config)
    asking = asyncio.ensure_future(service.post("/v1/completions", prompt="abc", max_tokens=80, stream=True))
    await until(lambda: any(len(g.token_ids) > 5 for g in service.router.journal._live.values()))
    service.client.drain(0)
    assert finishes(events((await asking).text)) == [(0, "length")]
    assert service.router.journal.num_moves == 0


async def test_what_waits_without_a_replica_goes_to_the_first_that_comes(make_service: ServiceFactory):
    service = await make_service()
    service.client.drain(0)
    asking = asyncio.ensure_future(service.post("/v1/completions", prompt="abc", max_tokens=5))
    await until(lambda: service.router.dispatcher.num_waiting == 1)
    service.client.start(0)
    response = await asking
    assert response.status_code == 200
    assert float(dict(p.split(";dur=") for p in response.headers["x-rayline-timing"].split(", "))["queue"]) > 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_deadline_ends_the_request(make_service: ServiceFactory, stream: bool):
    service = await make_service(emulated_config(emulation=SLOW))
    response = await service.http.post(
        "/v1/completions", json={"model": "demo", "prompt": "abc", "max_tokens": 1000, "stream": stream},
        headers={"X-Request-Timeout": "0.3"},
    )  # fmt: skip
    if stream:
        chunks = events(response.text)
        assert 10 < len(text_of(chunks[:-1])) < 100
        assert chunks[-1]["error"]["code"] == "deadline_exceeded"
    else:
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "deadline_exceeded"
    await until(lambda: service.num_used_pages == 0)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon", ""])
async def test_a_bad_deadline_is_refused(make_service: ServiceFactory, value: str):
    service = await make_service()
    response = await service.http.post(
        "/v1/completions", json={"model": "demo", "prompt": "a"}, headers={"X-Request-Timeout": value}
    )
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "X-Request-Timeout"


async def test_too_much_work_is_refused_with_retry_after(make_service: ServiceFactory):
    """Of what a full server is sent, all that is taken is finished."""
    config = emulated_config(
        emulation=SLOW, engine={"max_batch_size": 2, "num_pages": 2048}, admission={"max_queue_tokens": 600}
    )
    service = await make_service(config)
    asking = [service.post("/v1/completions", prompt=f"ab{i}", max_tokens=50) for i in range(40)]
    responses = await asyncio.gather(*asking)
    refused = [response for response in responses if response.status_code == 429]
    assert 20 < len(refused) < 38
    assert all(int(response.headers["retry-after"]) >= 1 for response in refused)
    assert all(response.json()["error"]["code"] == "rate_limit_exceeded" for response in refused)
    assert {response.status_code for response in responses} == {200, 429}
    assert service.router.snapshot()["router"]["num_refused"] == len(refused)


async def test_urgent_requests_go_first(make_service: ServiceFactory):
    config = emulated_config(emulation=SLOW, engine={"max_batch_size": 1, "num_pages": 2048})
    service = await make_service(config)
    ended = []

    async def ask(name: str, priority: int | None) -> None:
        body = {} if priority is None else {"priority": priority}
        assert (await service.post("/v1/completions", prompt=name, max_tokens=20, **body)).status_code == 200
        ended.append(name)

    asking = [asyncio.ensure_future(ask(f"first{i}", 0)) for i in range(2)]
    await until(lambda: service.router.journal.num_live == 2)
    for name, priority in (("late", 10), ("normal", None), ("urgent", -5)):
        asking.append(asyncio.ensure_future(ask(name, priority)))
        await until(lambda: service.router.journal.num_live == len(asking))
    await asyncio.gather(*asking)
    assert ended[2:] == ["urgent", "normal", "late"]


async def test_answers_to_one_prompt_share_its_prefill(make_service: ServiceFactory):
    service = await make_service()
    before = service.client.replicas[0]._loop._engine.stats().num_cached_prompt_tokens
    prompt = [(i * 7) % 100 + 100 for i in range(200)]
    body = (await service.post("/v1/completions", prompt=prompt, n=4, max_tokens=5)).json()
    assert len(body["choices"]) == 4
    after = service.client.replicas[0]._loop._engine.stats().num_cached_prompt_tokens
    assert after - before == 3 * (199 // 16) * 16


async def test_a_conversation_goes_back_to_the_replica_that_knows_it(make_service: ServiceFactory):
    """And a new one to the other."""
    service = await make_service(num_replicas=3)
    prompts = [[(i * step) % 199 + 50 for i in range(320)] for step in (7, 11, 13)]
    for prompt in prompts:
        await service.post("/v1/completions", prompt=prompt, max_tokens=5)
    await asyncio.sleep(0.25)
    before = [replica._loop._engine.stats() for replica in service.client.replicas]
    assert [s.num_prompt_tokens > 100 for s in before] == [True] * 3, "one conversation each"
    for prompt in reversed(prompts):
        await service.post("/v1/completions", prompt=[*prompt, 40, 41, 42], max_tokens=5)
    after = [replica._loop._engine.stats() for replica in service.client.replicas]
    assert [s.num_cached_prompt_tokens for s in after] == [320] * 3


async def test_the_answer_says_where_the_time_went(make_service: ServiceFactory):
    service = await make_service(emulated_config(emulation={**SLOW, "prefill_tokens_per_s": 1000.0}))
    prompt = [100 + i % 100 for i in range(100)]
    for stream in (False, True):
        started = time.monotonic()
        response = await service.post("/v1/completions", prompt=prompt[stream:], max_tokens=30, stream=stream)
        took_ms = 1000 * (time.monotonic() - started)
        phases = {n: float(v) for n, v in (p.split(";dur=") for p in response.headers["x-rayline-timing"].split(", "))}
        assert list(phases)[:4] == ["route", "queue", "prefill", "relay"]
        assert phases["prefill"] > 90, "a hundred tokens at a thousand a second"
        assert sum(phases.values()) <= took_ms, "no time is counted twice"
        if not stream:
            assert phases["decode"] > 250


async def test_settings_change_while_it_runs(make_service: ServiceFactory):
    """What is left out goes back to what it was at the start."""
    service = await make_service(emulated_config(admission={"max_queue_s": 7}, router={"max_resumes": 5}))
    router = service.router
    router.reconfigure(LiveConfig.model_validate({"admission": {"max_queue_tokens": 5}, "max_resumes": 0}))
    assert (router.dispatcher.config.max_queue_tokens, router.journal.max_resumes) == (5, 0)
    router.reconfigure(LiveConfig(drain_after_s=3))
    assert (router.dispatcher.config.max_queue_s, router.journal.max_resumes) == (7, 5)
    assert router._watch.config.drain_after_s == 3


async def test_one_that_is_given_up_while_it_moves_does_not_go_on(make_service: ServiceFactory):
    service = await make_service(emulated_config(emulation=SLOW), num_replicas=2)
    asking = asyncio.ensure_future(service.post("/v1/completions", prompt="abc", max_tokens=2000, stream=True))
    await until(lambda: any(len(g.token_ids) > 5 for g in service.router.journal._live.values()))
    (generation,) = service.router.journal._live.values()
    generation.leave_replica("it is told to", is_failure=False)
    generation.cancel()
    await until(lambda: service.router.journal.num_live == 0, 2)
    await until(lambda: service.num_used_pages == 0, 2)
    asking.cancel()
