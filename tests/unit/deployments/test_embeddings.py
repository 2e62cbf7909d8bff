"""`/v1/embeddings`: its forms, and that its inputs are requests like any other."""

import asyncio
import base64
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from in_process import Service, ServiceFactory, emulated_config
from prometheus_client.parser import text_string_to_metric_families
from scripted_engine import TOOL_TEMPLATE, model_config
from test_key_limits import KEY, bearer, key

from deployments.api.openai.responses import EmbeddingList
from deployments.config import AppConfig
from deployments.replica.emulated_engine import EmulatedEngine
from llm.config import EngineConfig
from llm.errors import EngineError
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import GenerationRequest, StepOutput

SLOW_PREFILL = {"tokens_per_s": 100.0, "prefill_tokens_per_s": 100.0, "max_seq_len": 2048}


def slow_config(**changes: object) -> AppConfig:
    """Two rows, and a hundred tokens of prompts a second."""
    return emulated_config(emulation=SLOW_PREFILL, engine={"max_batch_size": 2, "num_pages": 2048}, **changes)


async def until_idle(service: Service) -> None:
    async with asyncio.timeout(10):
        while service.router.journal.num_live or service.num_used_pages:
            await asyncio.sleep(0.01)


@pytest.fixture
async def service(make_service: ServiceFactory, tmp_path: Path) -> Service:
    return await make_service(model_config(tmp_path, TOOL_TEMPLATE, engine_kind="torch"), num_replicas=2)


async def embed(service: Service, given: object, **fields) -> dict:
    response = await service.post("/v1/embeddings", input=given, **fields)
    assert response.status_code == 200, response.text
    EmbeddingList.model_validate_json(response.content, strict=True)
    return response.json()


async def test_forms_of_input_and_output(service: Service):
    answer = await embed(service, "seventeen")
    (entry,) = answer["data"]
    vector = entry["embedding"]
    assert sum(x * x for x in vector) == pytest.approx(1, abs=1e-5)
    assert answer["usage"] == {"prompt_tokens": 10, "total_tokens": 10}, "nine letters and the beginning"
    encoded = (await embed(service, "seventeen", encoding_format="base64"))["data"][0]["embedding"]
    assert list(struct.unpack(f"<{len(vector)}f", base64.b64decode(encoded))) == pytest.approx(vector, abs=1e-7)
    ids = (await service.post("/tokenize", prompt="seventeen")).json()["tokens"]
    several = await embed(service, ["seventeen", "12 + 30"])
    assert [entry["index"] for entry in several["data"]] == [0, 1]
    for same in (several, await embed(service, ids), await embed(service, [ids, [97]])):
        assert same["data"][0]["embedding"] == pytest.approx(vector, abs=1e-5)
    mean = (await embed(service, "seventeen", pooling="mean"))["data"][0]["embedding"]
    assert mean != pytest.approx(vector, abs=1e-2)
    await embed(service, "a", dimensions=len(vector))


async def test_embeddings_beside_generation(service: Service):
    alone = await embed(service, "seventeen")
    stream = asyncio.ensure_future(service.post("/v1/completions", prompt="a", max_tokens=60, ignore_eos=True))
    together = await asyncio.gather(*(embed(service, "seventeen") for _ in range(20)))
    assert (await stream).json()["usage"]["completion_tokens"] == 60
    assert all(
        answer["data"][0]["embedding"] == pytest.approx(alone["data"][0]["embedding"], abs=1e-5) for answer in together
    )


async def test_vectors_are_those_of_the_engine(service: Service):
    engine = ContinuousBatchingEngine.from_pretrained(
        service.router.config.model, device="cpu", progress=False, config=EngineConfig(max_batch_size=4)
    )
    texts = ["seventeen", "12 + 30", "a"]
    for pooling in ("last", "mean"):
        answer = await embed(service, texts, pooling=pooling)
        ids = [(await service.post("/tokenize", prompt=text)).json()["tokens"] for text in texts]
        for entry, vector in zip(answer["data"], engine.embed(ids, pooling=pooling, progress=False), strict=True):
            assert entry["embedding"] == pytest.approx(vector.tolist(), abs=1e-5)


async def test_inputs_of_a_lost_replica_go_on_elsewhere(make_service: ServiceFactory):
    """One of two replicas dies while both compute; every vector comes, the same as ever."""
    service = await make_service(slow_config(), num_replicas=2)
    inputs = [[97 + i] * 20 for i in range(8)]
    asking = asyncio.ensure_future(embed(service, inputs))
    async with asyncio.timeout(10):
        while not all(replica._loop._engine.has_pending_work for replica in service.client.replicas):
            await asyncio.sleep(0.005)
    service.client.kill(0)
    answer = await asking
    assert service.router.journal.num_resumes > 0
    assert answer["usage"]["prompt_tokens"] == 160
    undisturbed = await embed(await make_service(), inputs)
    assert [entry["embedding"] for entry in answer["data"]] == [entry["embedding"] for entry in undisturbed["data"]]


async def test_a_deadline_ends_all_inputs(make_service: ServiceFactory):
    service = await make_service(slow_config())
    body = {"model": "demo", "input": [[97 + i] * 20 for i in range(30)]}
    response = await service.http.post("/v1/embeddings", json=body, headers={"X-Request-Timeout": "0.3"})
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
    await until_idle(service)


async def test_more_than_may_wait_is_refused(make_service: ServiceFactory):
    service = await make_service(slow_config(admission={"max_queue_tokens": 200}))
    asking = [service.post("/v1/embeddings", input=[[97 + i] * 10, [98 + i] * 10]) for i in range(20)]
    responses = await asyncio.gather(*asking)
    refused = [response for response in responses if response.status_code == 429]
    assert 0 < len(refused) < 20
    assert all(int(response.headers["retry-after"]) >= 1 for response in refused)
    assert {response.status_code for response in responses} == {200, 429}


async def test_urgent_inputs_go_first(make_service: ServiceFactory):
    service = await make_service(slow_config())
    ended = []

    async def ask(name: str, priority: int) -> None:
        await embed(service, [[97 + i] * 10 for i in range(6)], priority=priority)
        ended.append(name)

    asking = []
    for name, priority in (("first", 0), ("late", 10), ("urgent", -5)):
        asking.append(asyncio.ensure_future(ask(name, priority)))
        async with asyncio.timeout(10):
            while service.router.journal.num_requests < 6 * len(asking):
                await asyncio.sleep(0.001)
    await asyncio.gather(*asking)
    assert ended == ["urgent", "first", "late"], "what the replica has not begun of the first waits too"


async def test_a_client_that_leaves_frees_its_rows(make_service: ServiceFactory):
    service = await make_service(slow_config())
    asking = asyncio.ensure_future(service.post("/v1/embeddings", input=[[97 + i] * 50 for i in range(30)]))
    async with asyncio.timeout(10):
        while not service.num_used_pages:
            await asyncio.sleep(0.005)
    asking.cancel()
    started = time.monotonic()
    await until_idle(service)
    assert time.monotonic() - started < 5, "what nobody waits for would take 15 s"


async def test_keys_are_charged_for_every_input(make_service: ServiceFactory):
    service = await make_service(keys=(key(KEY, "first", tokens_per_min=100),))
    body = {"model": "demo", "input": [[97] * 10, [97] * 10, [98] * 5]}
    response = await service.http.post("/v1/embeddings", json=body, headers=bearer())
    assert response.json()["usage"]["prompt_tokens"] == 25
    assert int(response.headers["x-ratelimit-remaining-tokens"]) in range(75, 100), "they come back by and by"


async def test_log_and_metrics_tell_of_each_input(make_service: ServiceFactory, serve_log):
    service = await make_service()
    await embed(service, [[97] * 10, [98] * 5])
    text = (await service.http.get("/metrics")).text
    samples = {
        (sample.name, sample.labels.get("finished_reason")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["vllm:request_success_total", "stop"] == 2
    assert samples["vllm:request_prompt_tokens_sum", None] == 15
    assert samples["vllm:request_queue_time_seconds_count", None] == 2
    fields = [record.rayline for record in serve_log if "num_prompt_tokens" in getattr(record, "rayline", ())]
    assert sorted((f["outcome"], f["num_prompt_tokens"], f["num_output_tokens"]) for f in fields) == [
        ("stop", 5, 0),
        ("stop", 10, 0),
    ]
    assert all(f["phases_ms"]["prefill"] >= 0 for f in fields)


async def test_a_hung_engine_fails_its_health_check(make_service: ServiceFactory, monkeypatch: pytest.MonkeyPatch):
    """An input that hangs the engine is seen as any other step that hangs."""
    service = await make_service(emulated_config(replicas={"stall_timeout_s": 1.0}))
    (replica,) = service.client.replicas
    engine, release = replica._loop._engine, threading.Event()
    make_vector = engine._pool

    def hang(row: object) -> object:
        release.wait(20)
        return make_vector(row)

    monkeypatch.setattr(engine, "_pool", hang)
    asking = asyncio.ensure_future(service.post("/v1/embeddings", input="a"))
    failure = ""
    async with asyncio.timeout(10):
        while not failure:
            await asyncio.sleep(0.02)
            try:
                replica.check_health()
            except EngineError as error:
                failure = str(error)
    assert "has been running for more than 1 s" in failure
    release.set()
    assert (await asking).status_code == 200


async def test_an_input_that_hangs_its_engine_fells_two_and_ends_its_request(make_service: ServiceFactory):
    """F22: streams beside it go on elsewhere, and so do clean inputs that shared its call and its replica."""
    config = emulated_config(
        emulation={"tokens_per_s": 100.0, "max_seq_len": 2048},
        replicas={"num_replicas": 4},
        router={"silence_timeout_s": 0.4, "stall_timeout_s": 1.0},
    )
    service = await make_service(config, num_replicas=4)
    poison, gate = 7, threading.Event()
    for replica in service.client.replicas:
        engine, step = replica._loop._engine, replica._loop._engine.step

        def hang(engine: EmulatedEngine = engine, step: Callable[[], list[StepOutput]] = step) -> list[StepOutput]:
            if any(poison in row.prompt for row in (*engine._running.values(), *engine._waiting)):
                gate.wait(20)
            return step()

        engine.step = hang
    clean = [[97 + i] * 3 for i in range(4)]
    vectors = (await embed(service, clean))["data"]
    streams = [
        asyncio.ensure_future(service.post("/v1/completions", prompt=f"{i}", max_tokens=500, ignore_eos=True))
        for i in range(8)
    ]
    async with asyncio.timeout(10):
        while sum(len(g.token_ids) > 5 for g in service.router.journal._live.values()) < 8:
            await asyncio.sleep(0.01)
    poisonous = asyncio.ensure_future(service.post("/v1/embeddings", input=[*clean, [97, poison]]))
    assert (await embed(service, clean))["data"] == vectors
    answer = await poisonous
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_error")
    assert len(service.router.fleet.replica_ids) == 2
    assert (await embed(service, clean))["data"] == vectors
    gate.set()
    for stream in await asyncio.gather(*streams):
        assert stream.json()["usage"]["completion_tokens"] == 500


async def test_the_most_inputs_come_in_few_calls(make_service: ServiceFactory):
    """And never more of them on a replica than it has rows for, so that others find room."""
    service = await make_service(emulated_config(engine={"max_batch_size": 64, "num_pages": 8192}), num_replicas=2)
    most_rows = [0]

    def count_rows(engine: EmulatedEngine) -> None:
        add_request = engine.add_request

        def add(request: GenerationRequest) -> str:
            request_id = add_request(request)
            stats = engine.stats()
            most_rows.append(stats.num_running + stats.num_waiting)
            return request_id

        engine.add_request = add

    for replica in service.client.replicas:
        count_rows(replica._loop._engine)
    inputs = [[97 + i % 100, 97 + i // 100, 99] for i in range(2048)]
    answer = await embed(service, inputs, encoding_format="base64")
    assert [entry["index"] for entry in answer["data"]] == list(range(2048))
    assert service.client.num_calls < 400
    assert 0 < max(most_rows) <= 80, "a quarter more than the rows"


async def test_what_is_wrong_is_400(service: Service):
    for changes, param in (
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [1, -1]}, "input"),
        ({"input": [10**6]}, "input"),
        ({"input": [97] * 3000}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": 5}, "input"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"dimensions": 3}, "dimensions"),
        ({"pooling": "max"}, "pooling"),
    ):
        response = await service.post("/v1/embeddings", **{"input": "a", **changes})
        assert response.status_code == 400, (param, response.text)
        assert response.json()["error"]["param"] == param
