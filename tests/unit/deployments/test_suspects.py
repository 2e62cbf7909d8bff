"""Engines that fail steps, break down or meet a request that fells them; the router keeps everybody else going."""

import asyncio
import itertools
import threading
import time
from collections.abc import Callable

import pytest
from in_process import Service, ServiceFactory, emulated_config
from test_failover import until
from test_router import events, finishes, text_of

from deployments.router.suspicion import Part, assign_parts, part_of
from llm.serving.schemas import FinishReason, StepFailure, StepOutput

pytestmark = pytest.mark.timeout(60)

POISON = 7
SLOW = {"tokens_per_s": 100.0, "max_seq_len": 2048}


def engine_of(service: Service, replica_id: str):
    return next(r for r in service.client.replicas if r.replica_id == replica_id)._loop._engine


def fail_steps(engine, num_failures: float = float("inf")) -> Callable[[], int]:
    """Have the engine's steps fail from now on, as when every CUDA call does; returns how many have failed."""
    step, num_failed = engine.step, itertools.count()
    failed = [0]

    def fail() -> list[StepOutput]:
        if next(num_failed) >= num_failures:
            return step()
        failed[0] += 1
        with engine_lock:
            engine._admit()
            return [engine._fail(row) for row in list(engine._running.values())]

    engine_lock = threading.Lock()
    engine.step = fail
    return lambda: failed[0]


def bury(service: Service) -> None:
    """End the replicas whose engines broke down, as Ray Serve does."""
    for index, replica in enumerate(service.client.replicas):
        if replica._loop.health.failure is not None:
            service.client.kill(index)


async def ask(service: Service, prompt: str | list[int], max_tokens: int = 100):
    return await service.post("/v1/completions", prompt=prompt, max_tokens=max_tokens, stream=True)


async def texts_of(service: Service, prompts: list[str], max_tokens: int = 100) -> dict[str, str]:
    answers = await asyncio.gather(*(ask(service, prompt, max_tokens) for prompt in prompts))
    return {prompt: text_of(events(answer.text)) for prompt, answer in zip(prompts, answers, strict=True)}


def loads(service: Service) -> dict[str, int]:
    on = [g.replica_id for g in service.router.journal._live.values()]
    return {replica_id: on.count(replica_id) for replica_id in on}


async def test_a_replica_whose_steps_fail_is_no_black_hole(make_service: ServiceFactory):
    """F13: out after its third failed step in a row, its streams elsewhere, no client told."""
    service = await make_service(emulated_config(emulation=SLOW), num_replicas=4)
    prompts = [f"prompt {i}" for i in range(16)]
    expected = await texts_of(service, prompts)
    asking = [asyncio.ensure_future(ask(service, prompt)) for prompt in prompts]
    await until(lambda: sum(len(g.token_ids) > 5 for g in service.router.journal._live.values()) == 16)
    num_failed = fail_steps(engine_of(service, "replica-0"))
    for prompt, answer in zip(prompts, await asyncio.gather(*asking), strict=True):
        assert text_of(events(answer.text)) == expected[prompt]
    await until(lambda: service.router.snapshot()["replicas"]["replica-0"]["state"] == "broken")
    assert num_failed() == 3
    assert await texts_of(service, prompts) == expected
    with pytest.raises(Exception, match="3 steps failed one after the other"):
        service.client.replicas[0].check_health()


async def test_a_replica_that_has_failed_a_step_serves_again_once_it_has_proven_itself(make_service: ServiceFactory):
    service = await make_service(emulated_config(emulation=SLOW), num_replicas=2)
    expected = (await texts_of(service, ["abc"]))["abc"]
    asking = asyncio.ensure_future(ask(service, "abc"))
    await until(lambda: any(len(g.token_ids) > 5 for g in service.router.journal._live.values()))
    (first,) = loads(service)
    fail_steps(engine_of(service, first), 1)
    await until(lambda: first not in service.router.fleet.replica_ids)
    assert text_of(events((await asking).text)) == expected
    await until(lambda: first in service.router.fleet.replica_ids)
    service.client._by_id[first].check_health()


async def test_alone_a_failed_step_is_told_at_once(make_service: ServiceFactory):
    """F4 on a fleet of one: the request never returns to the replica that failed it, and there is no other."""
    service = await make_service(emulated_config(emulation=SLOW))
    asking = asyncio.ensure_future(ask(service, "abc", 1000))
    await until(lambda: any(len(g.token_ids) > 5 for g in service.router.journal._live.values()))
    fail_steps(engine_of(service, "replica-0"), 1)
    async with asyncio.timeout(2):
        chunks = events((await asking).text)
    assert chunks[-1]["error"]["code"] == "engine_error"
    assert (await ask(service, "abc", 5)).status_code == 200


async def test_streams_of_an_engine_that_breaks_go_elsewhere_at_the_first_attempt(make_service: ServiceFactory):
    """F14: none returns to it, and new requests avoid it at once."""
    service = await make_service(emulated_config(emulation=SLOW), num_replicas=4)
    prompts = [f"prompt {i}" for i in range(16)]
    expected = await texts_of(service, prompts)
    asking = [asyncio.ensure_future(ask(service, prompt)) for prompt in prompts]
    await until(lambda: sum(len(g.token_ids) > 5 for g in service.router.journal._live.values()) == 16)
    num_there = loads(service)["replica-0"]

    def explode() -> None:
        raise RuntimeError("the engine is broken")

    service.client.num_calls = 0
    engine_of(service, "replica-0").step = explode
    answers = await asyncio.gather(*asking)
    assert [text_of(events(answer.text)) for answer in answers] == [expected[prompt] for prompt in prompts]
    assert service.router.journal.num_resumes == num_there == service.client.num_calls
    assert await texts_of(service, prompts) == expected
    assert service.router.journal.num_resumes == num_there
    bury(service)


@pytest.mark.parametrize("poison", ["fail", "break"])
@pytest.mark.parametrize("after", [0, 9])
async def test_poison_fells_two_replicas_and_ends_alone(make_service: ServiceFactory, poison: str, after: int):
    """F15, with bystanders in every replica; a poisonous request may also strike in the middle of its answer."""
    config = emulated_config(
        emulation={**SLOW, "poison_token_id": POISON, "poison": poison, "poison_after": after},
        replicas={"num_replicas": 4},
    )
    service = await make_service(config, num_replicas=4)
    prompts = [f"prompt {i}" for i in range(24)]
    expected = await texts_of(service, prompts)
    asking = [asyncio.ensure_future(ask(service, prompt)) for prompt in prompts]
    await until(lambda: sum(len(g.token_ids) > 5 for g in service.router.journal._live.values()) == 24)
    failures = []
    note = service.router.journal.on_failed_call
    service.router.journal.on_failed_call = lambda replica_id, why: failures.append(replica_id) or note(replica_id, why)
    answer = await ask(service, [POISON, *b"poison"], 50)
    if after:
        assert len(text_of(events(answer.text)[:-1])) == after
        assert events(answer.text)[-1]["error"]["code"] == "engine_error"
    else:
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "engine_error"
    assert len(set(failures)) == 2, "as many replicas failed"
    answers = await asyncio.gather(*asking)
    assert [text_of(events(answer.text)) for answer in answers] == [expected[prompt] for prompt in prompts]
    assert await texts_of(service, prompts[:8]) == {prompt: expected[prompt] for prompt in prompts[:8]}
    bury(service)


async def test_a_request_that_hangs_its_engine_ends_alone(make_service: ServiceFactory):
    """F15 by a stall: the moves count."""
    config = emulated_config(
        emulation=SLOW, replicas={"num_replicas": 4}, router={"silence_timeout_s": 0.4, "stall_timeout_s": 1.0}
    )
    service = await make_service(config, num_replicas=4)
    gate = threading.Event()
    for replica in service.client.replicas:
        engine, step = replica._loop._engine, replica._loop._engine.step

        def hang(engine=engine, step=step) -> list[StepOutput]:
            if any(POISON in row.prompt for row in (*engine._running.values(), *engine._waiting)):
                gate.wait(20)
            return step()

        engine.step = hang
    prompts = [f"prompt {i}" for i in range(12)]
    asking = [asyncio.ensure_future(ask(service, prompt, 600)) for prompt in prompts]
    await until(lambda: sum(len(g.token_ids) > 5 for g in service.router.journal._live.values()) == 12)
    answer = await ask(service, [POISON, *b"poison"], 50)
    assert answer.status_code == 500
    assert len(service.router.fleet.replica_ids) == 2
    gate.set()
    for answer in await asyncio.gather(*asking):
        assert finishes(events(answer.text)) == [(0, "length")]


async def test_many_suspects_are_resumed_soon(make_service: ServiceFactory):
    """A single survivor begins one suspect at a time: as fast as it makes first tokens."""
    config = emulated_config(emulation=SLOW, engine={"max_batch_size": 64, "num_pages": 8192})
    service = await make_service(config, num_replicas=2)
    asking = [asyncio.ensure_future(ask(service, f"prompt {i}", 400)) for i in range(64)]
    await until(lambda: sum(len(g.token_ids) > 5 for g in service.router.journal._live.values()) == 64, 20)
    survivor = service.client.replicas[1]._loop
    journal, num_tried = service.router.journal, []
    step = survivor._engine.step

    def count_and_step() -> list[StepOutput]:
        num_tried.append(
            sum(g.is_suspect and g.has_arrived and g.replica_id == "replica-1" for g in list(journal._live.values()))
        )
        return step()

    survivor._engine.step = count_and_step
    killed_at = time.monotonic()
    service.client.kill(0)
    await until(lambda: len(journal._live) < 64)
    await until(lambda: len(journal._live) == 64 and not any(g.is_suspect for g in journal._live.values()), 10)
    resumed_s = time.monotonic() - killed_at
    print(f"32 suspects resumed after {resumed_s:.2f} s, the shortest way takes {32 / SLOW['tokens_per_s']} s")
    for answer in await asyncio.gather(*asking):
        assert finishes(events(answer.text)) == [(0, "length")]
    assert journal.num_resumes == 32
    assert max(num_tried) <= 1


class Rider:
    def __init__(self, *, is_suspect: bool = False, has_arrived: bool = True) -> None:
        self.is_suspect = is_suspect
        self.has_arrived = has_arrived
        self.part = None


def parts(*riders: Rider, now: float = 100.0) -> list[Part | None]:
    assign_parts(riders, now)
    return [part_of(rider, now) for rider in riders]


def test_parts_in_a_failure():
    assert parts(Rider(), Rider()) == [Part.SUSPECT, Part.SUSPECT], "nobody stands out"
    assert parts(Rider(), Rider(is_suspect=True)) == [Part.BYSTANDER, Part.CULPRIT]
    assert parts(Rider(), Rider(is_suspect=True, has_arrived=False)) == [Part.SUSPECT, Part.SUSPECT], "never tried"


def test_a_part_is_kept_for_the_failure_that_it_was_given_in():
    first, late = Rider(is_suspect=True), Rider()
    assert parts(first, late) == [Part.CULPRIT, Part.BYSTANDER]
    assert parts(late, now=100.5) == [Part.BYSTANDER], "the culprit has left already"
    assert parts(late, now=200.0) == [Part.SUSPECT], "another failure"


async def test_a_failed_step_is_a_failure_and_a_failed_request_is_an_error(make_service: ServiceFactory):
    """What is wrong with one request alone ends it as before, and is no evidence against the replica."""
    service = await make_service(emulated_config(emulation=SLOW), num_replicas=2)
    for replica in service.client.replicas:
        engine, advance = replica._loop._engine, replica._loop._engine._advance

        def stumble(row, engine=engine, advance=advance) -> StepOutput:
            if row.num_output < 5:
                return advance(row)
            del engine._running[row.request.request_id]
            engine.pool.release(row.pages)
            return StepOutput(row.request.request_id, (), finish_reason=FinishReason.ERROR, error="grammar: stuck")

        engine._advance = stumble
    chunks = events((await ask(service, "abc")).text)
    assert chunks[-1]["error"]["code"] == "engine_error"
    assert service.router.journal.num_resumes == 0
    assert len(service.router.fleet.replica_ids) == 2


async def test_a_lost_device_breaks_the_engine_at_once(make_service: ServiceFactory):
    service = await make_service(emulated_config(emulation=SLOW), num_replicas=2)
    engine = engine_of(service, "replica-0")
    fail = engine._fail

    def lose(row) -> StepOutput:
        output = fail(row)
        return StepOutput(
            output.request_id, (), finish_reason=FinishReason.ERROR, error="CUDA error: device-side assert triggered",
            step_failure=StepFailure.DEVICE,
        )  # fmt: skip

    engine._fail = lose
    num_failed = fail_steps(engine)
    assert [(await ask(service, f"prompt {i}", 20)).status_code for i in range(4)] == [200] * 4
    assert num_failed() == 1
    with pytest.raises(Exception, match="the device is lost"):
        service.client.replicas[0].check_health()
