"""Files and batches over HTTP: the client of OpenAI and the emulated engine, whose files they are, what is refused."""

import asyncio
import contextlib
import hashlib
import json
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn
from in_process import Service, ServiceFactory, emulated_config
from openai import AsyncOpenAI
from openai.types import Batch

from deployments.accounts_config import KeyLimits, Role
from deployments.router.keys import ApiKey

FIRST, SECOND = "sk-first", "sk-second"
KEYS = tuple(ApiKey(name, hashlib.sha256(key.encode()).digest()) for name, key in (("a", FIRST), ("b", SECOND)))
ENDED = {"completed", "failed", "expired", "cancelled"}


def line(custom_id: str, url: str = "/v1/chat/completions", **body: Any) -> str:
    content = {"model": "demo", "messages": [{"role": "user", "content": custom_id}], "max_tokens": 4}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body or content})


def config(tmp_path: Path, **settings: Any):
    return emulated_config(batches={"store": str(tmp_path / "store")}, **settings)


@contextlib.asynccontextmanager
async def client_of(service: Service, key: str = "none") -> AsyncIterator[AsyncOpenAI]:
    """OpenAI's client, connected to the service by a real socket."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    server = uvicorn.Server(uvicorn.Config(service.api, log_level="warning", lifespan="off"))
    task = asyncio.create_task(server.serve(sockets=[listener]))
    base_url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    try:
        async with AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0) as client:
            yield client
    finally:
        server.should_exit = True
        await task


async def end_of(client: AsyncOpenAI, batch: Batch) -> Batch:
    async with asyncio.timeout(120):
        while batch.status not in ENDED:
            await asyncio.sleep(0.05)
            batch = await client.batches.retrieve(batch.id)
    return batch


async def upload(service: Service, content: bytes, headers: dict[str, str] | None = None) -> str:
    form = {"files": {"file": ("a.jsonl", content)}, "data": {"purpose": "batch"}}
    answer = await service.http.post("/v1/files", headers=headers, **form)
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


async def results(client: AsyncOpenAI, file_id: str | None) -> list[dict]:
    assert file_id is not None
    return [json.loads(text) for text in (await client.files.content(file_id)).text.splitlines()]


async def test_openai_client_runs_a_batch(make_service: ServiceFactory, tmp_path: Path):
    """Answers come in the order of the lines, errors in a file of their own, and everything in OpenAI's objects."""
    service = await make_service(config(tmp_path))
    async with client_of(service) as client:
        lines = [line(f"number {i}") for i in range(40)]
        lines[7] = line("wrong", model="demo", messages=[])
        lines[9] = line("other", model="no-such-model", messages=[{"role": "user", "content": "a"}])
        file = await client.files.create(file=("my.jsonl", "\n".join(lines).encode()), purpose="batch")
        assert (file.filename, file.bytes, file.purpose) == ("my.jsonl", len("\n".join(lines)), "batch")
        assert await client.files.retrieve(file.id) == file
        assert (await client.files.content(file.id)).text == "\n".join(lines)
        created = await client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"who": "me"}
        )
        assert (created.status, created.metadata, created.model) == ("validating", {"who": "me"}, None)
        assert created.usage is not None
        assert created.usage.total_tokens == 0
        assert created.expires_at == created.created_at + 24 * 3600
        batch = await end_of(client, created)
        assert batch.status == "completed"
        assert batch.request_counts.model_dump() == {"total": 40, "completed": 38, "failed": 2}
        assert None not in (batch.in_progress_at, batch.finalizing_at, batch.completed_at)
        answers = await results(client, batch.output_file_id)
        wanted = [f"number {i}" for i in range(40) if i not in (7, 9)]
        assert [answer["custom_id"] for answer in answers] == wanted
        for answer in answers:
            assert (answer["response"]["status_code"], answer["error"]) == (200, None)
            assert answer["response"]["body"]["usage"]["completion_tokens"] == 4
        used = [answer["response"]["body"]["usage"] for answer in answers]
        cached = sum(one["prompt_tokens_details"]["cached_tokens"] for one in used)
        prompts = sum(one["prompt_tokens"] for one in used)
        assert batch.usage is not None
        assert batch.usage.model_dump() == {
            "input_tokens": prompts, "input_tokens_details": {"cached_tokens": cached}, "output_tokens": 4 * 38,
            "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": prompts + 4 * 38,
        }  # fmt: skip
        assert prompts > 38
        assert batch.model is None, "one of its lines names another model"
        errors = await results(client, batch.error_file_id)
        assert [(error["custom_id"], error["response"]["status_code"]) for error in errors] == [
            ("wrong", 400), ("other", 404),
        ]  # fmt: skip
        assert errors[0]["response"]["body"]["error"]["param"] == "messages"
        assert [entry.id async for entry in client.batches.list(limit=1)] == [batch.id]
        files = [entry.id async for entry in client.files.list(limit=2)]
        assert set(files) == {file.id, batch.output_file_id, batch.error_file_id}
        outputs = [entry.purpose async for entry in client.files.list(purpose="batch_output")]
        assert outputs == ["batch_output"] * 2
        assert (await client.files.delete(file.id)).deleted
        with pytest.raises(openai.NotFoundError):
            await client.files.retrieve(file.id)
        with pytest.raises(openai.ConflictError):
            await client.batches.cancel(batch.id)
    assert service.desk.ledger.active_ids() == []
    assert not list((tmp_path / "store").glob("work/*/*/*")), "nothing is left of the work"


@pytest.mark.parametrize(
    ("url", "body"),
    [
        ("/v1/completions", {"model": "demo", "prompt": "a", "max_tokens": 3}),
        ("/v1/embeddings", {"model": "demo", "input": "a"}),
        ("/v1/responses", {"model": "demo", "input": "a", "max_output_tokens": 16}),
        ("/v1/rerank", {"model": "demo", "query": "a", "documents": ["b", "c"]}),
        ("/v1/score", {"model": "demo", "text_1": "a", "text_2": ["b", "c"]}),
    ],
)
async def test_each_endpoint_answers_as_over_http(make_service: ServiceFactory, tmp_path: Path, url: str, body: dict):
    service = await make_service(config(tmp_path, scoring={"method": "embeddings"}))
    async with client_of(service) as client:
        file = await client.files.create(file=("a", line("one", url, **body).encode()), purpose="batch")
        batch = await client.batches.create(input_file_id=file.id, endpoint=url, completion_window="1h")
        batch = await end_of(client, batch)
        (answer,) = await results(client, batch.output_file_id)
        used = answer["response"]["body"]["usage"]
        assert batch.model == "demo"
        assert batch.usage is not None
        assert batch.usage.input_tokens == used.get("prompt_tokens", used.get("input_tokens")) > 0
        assert batch.usage.output_tokens == used.get("completion_tokens", used.get("output_tokens", 0))
        assert batch.usage.total_tokens == used["total_tokens"]
        alone = (await service.http.post(url, json=body)).json()
        assert answer["response"]["body"].keys() == alone.keys()
        assert answer["response"]["body"]["usage"] == alone["usage"]


async def test_batches_fill_idle_rows_only(make_service: ServiceFactory, tmp_path: Path):
    """A quarter of the rows stays free, and while requests wait no line begins, whatever priority lines ask for."""
    service = await make_service(config(tmp_path, emulation={"tokens_per_s": 100.0, "max_seq_len": 2048}))
    (replica_id,) = service.router.fleet.replica_ids
    content = {"model": "demo", "prompt": "a", "max_tokens": 30, "priority": -100}

    async def begin(number: int) -> str:
        lines = "\n".join(line(f"{i}", "/v1/completions", **content) for i in range(number))
        body = {"input_file_id": await upload(service, lines.encode()), "endpoint": "/v1/completions",
                "completion_window": "24h"}  # fmt: skip
        return (await service.http.post("/v1/batches", json=body)).json()["id"]

    batch_id = await begin(60)
    most = 0
    while (await service.http.get(f"/v1/batches/{batch_id}")).json()["status"] not in ENDED:
        most = max(most, service.router.fleet.load(replica_id).num_rows)
        await asyncio.sleep(0.005)
    assert 6 < most <= 12
    flood = asyncio.gather(*(service.post("/v1/completions", prompt="b", max_tokens=30) for _ in range(80)))
    await until(lambda: service.router.dispatcher.num_waiting > 20)
    batch_id = await begin(3)
    while service.router.dispatcher.num_waiting:
        assert service.batches.snapshot()["num_open_lines"] == 0
        await asyncio.sleep(0.005)
    assert {answer.status_code for answer in await flood} == {200}
    while (found := (await service.http.get(f"/v1/batches/{batch_id}")).json())["status"] not in ENDED:
        await asyncio.sleep(0.02)
    assert found["request_counts"] == {"total": 3, "completed": 3, "failed": 0}


async def test_half_of_a_keys_limits_is_kept_for_other_requests(make_service: ServiceFactory, tmp_path: Path):
    """Lines count toward the limits of their key and are charged to it, like other requests, but leave half of them."""
    limited = ApiKey("a", KEYS[0].digest, KeyLimits(max_concurrent_requests=6, requests_per_min=100))
    service = await make_service(config(tmp_path), keys=(limited, KEYS[1]))
    account = service.directory.access.account(limited)
    own = {"Authorization": f"Bearer {FIRST}"}
    lines = "\n".join(line(f"{i}") for i in range(60))
    file_id = await upload(service, lines.encode(), own)
    body = {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "1h"}
    batch_id = (await service.http.post("/v1/batches", json=body, headers=own)).json()["id"]
    most = 0

    async def counted() -> int:
        nonlocal most
        for _ in range(10):
            most = max(most, account.num_open)
            await asyncio.sleep(0.001)
        counts = (await service.http.get(f"/v1/batches/{batch_id}", headers=own)).json()["request_counts"]
        return counts["completed"]

    while await counted() < 40:
        pass
    assert most == 3
    for _ in range(20):
        await counted()
    assert await counted() < 60, "50 of 100 requests a minute are left to others, and one more each 0.6 s"
    answer = await service.http.post("/v1/chat/completions", json=json.loads(line("x"))["body"], headers=own)
    assert answer.status_code == 200
    assert int(answer.headers["x-ratelimit-remaining-requests"]) >= 45
    await service.http.post(f"/v1/batches/{batch_id}/cancel", headers=own)


async def test_whose_files_and_batches_they_are_over_http(make_service: ServiceFactory, tmp_path: Path):
    """Another key's file or batch does not exist; without a key nothing is answered; lines run for the batch's key."""
    service = await make_service(config(tmp_path), keys=KEYS)
    own, other = ({"Authorization": f"Bearer {key}"} for key in (FIRST, SECOND))
    file_id = await upload(service, line("one").encode(), own)
    body = {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "1h"}
    batch = (await service.http.post("/v1/batches", json=body, headers=own)).json()
    batch_path, file_path = f"/v1/batches/{batch['id']}", f"/v1/files/{file_id}"
    while (batch := (await service.http.get(batch_path, headers=own)).json())["status"] not in ENDED:
        await asyncio.sleep(0.02)
    assert batch["request_counts"]["completed"] == 1
    for method, path in (("GET", batch_path), ("POST", f"{batch_path}/cancel"), ("GET", file_path),
                         ("GET", f"{file_path}/content"), ("GET", f"/v1/files/{batch['output_file_id']}/content"),
                         ("DELETE", file_path)):  # fmt: skip
        answer = await service.http.request(method, path, headers=other)
        assert answer.status_code == 404, path
        assert (await service.http.request(method, path)).status_code == 401
    answer = await service.http.post("/v1/batches", json=body, headers=other)
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "input_file_id")
    for path in ("/v1/files", "/v1/batches"):
        assert (await service.http.get(path, headers=other)).json()["data"] == []
        assert (await service.http.get(path, headers=own)).json()["data"] != []
    service.directory.access.change_keys(KEYS[1:])
    body["input_file_id"] = await upload(service, line("two").encode(), other)
    late = service.desk.ledger.create("a", input_file_id=file_id, endpoint=body["endpoint"], completion_window="1h")
    await until(lambda: service.desk.ledger.get("a", late.record.id).status.is_final)
    state = service.desk.ledger.get("a", late.record.id).state
    assert (state.num_completed, state.num_failed) == (0, 1), "its key is no longer valid"


async def test_administrators_see_the_unfinished_batches_of_all_keys(make_service: ServiceFactory, tmp_path: Path):
    boss = ApiKey("boss", hashlib.sha256(b"sk-boss").digest(), role=Role.ADMIN)
    service = await make_service(config(tmp_path), keys=(*KEYS, boss))
    await service.batches.stop()
    made = []
    for key in (FIRST, SECOND):
        own = {"Authorization": f"Bearer {key}"}
        body = {"input_file_id": await upload(service, line("a").encode(), own), "endpoint": "/v1/chat/completions",
                "completion_window": "1h"}  # fmt: skip
        made.append((await service.http.post("/v1/batches", json=body, headers=own)).json())
        await asyncio.sleep(0.002)  # ids sort by their milliseconds
    assert (await service.http.get("/rayline/batches", headers=own)).status_code == 403
    admin = {"Authorization": "Bearer sk-boss"}
    listed = (await service.http.get("/rayline/batches", headers=admin)).json()
    assert listed["data"] == [{**batch, "key": key} for batch, key in zip(made, "ab", strict=True)]
    page = (await service.http.get("/rayline/batches?limit=1", headers=admin)).json()
    assert ([batch["id"] for batch in page["data"]], page["has_more"]) == ([made[0]["id"]], True)
    rest = (await service.http.get(f"/rayline/batches?after={made[0]['id']}", headers=admin)).json()
    assert ([batch["id"] for batch in rest["data"]], rest["has_more"]) == ([made[1]["id"]], False)


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"endpoint": "/v1/messages"}, 400, "endpoint"),
        ({"endpoint": "/v1/batches"}, 400, "endpoint"),
        ({"completion_window": "soon"}, 400, "completion_window"),
        ({"completion_window": "8d"}, 400, "completion_window"),
        ({"completion_window": "0h"}, 400, "completion_window"),
        ({"input_file_id": "file-lost"}, 404, "input_file_id"),
        ({"input_file_id": "../x"}, 404, "input_file_id"),
        ({"input_file_id": None}, 400, "input_file_id"),
        ({"metadata": {"k": 1}}, 400, "metadata.k"),
        ({"metadata": {str(i): "" for i in range(17)}}, 400, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 5}}, 400, "output_expires_after.seconds"),
    ],
)
async def test_batches_that_are_refused(
    make_service: ServiceFactory, tmp_path: Path, changes: dict, status: int, param: str
):
    service = await make_service(config(tmp_path))
    body = {"input_file_id": await upload(service, line("a").encode()), "endpoint": "/v1/chat/completions",
            "completion_window": "24h"}  # fmt: skip
    answer = await service.http.post("/v1/batches", json={**body, **changes})
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text
    assert service.desk.ledger.active_ids() == []


async def test_uploads_that_are_refused_leave_nothing(make_service: ServiceFactory, tmp_path: Path):
    """Uploads have a bound of their own; whatever is wrong with a form, nothing of it is kept."""
    settings = {"store": str(tmp_path / "store"), "max_file_bytes": 20_000, "max_files_per_key": 2}
    service = await make_service(emulated_config(batches=settings, limits={"max_body_bytes": 1024}))
    path, part = "/v1/files", {"file": ("a", b"x")}
    boundary = {"Content-Type": "multipart/form-data; boundary=b"}
    days = {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "1"}
    attempts = [
        (413, "file", {"files": {"file": ("a", b"x" * 20_001)}, "data": {"purpose": "batch"}}),
        (400, "purpose", {"files": part}),
        (400, "purpose", {"files": part, "data": {"purpose": "fine-tune"}}),
        (400, "file", {"data": {"purpose": "batch"}, "files": {"other": ("a", b"x")}}),
        (400, "file", {"data": {"purpose": "batch"}, "files": [("file", ("a", b"x")), ("file", ("b", b"x"))]}),
        (400, "expires_after[seconds]", {"files": part, "data": days}),
        (400, "purpose", {"files": part, "data": {"purpose": "x" * 5000}}),
        (400, None, {"content": b"--b\r\nnonsense", "headers": boundary}),
        (400, None, {"content": b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nx', "headers": boundary}),
        (415, None, {"json": {"file": "x"}}),
        (415, None, {"files": part, "headers": {"Content-Encoding": "gzip"}}),
        (415, None, {"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}),
    ]
    for status, param, request in attempts:
        answer = await service.http.post(path, **request)
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), (request, answer.text)
    assert [place for place in (tmp_path / "store").rglob("*") if place.is_file()] == []
    kept = await service.http.post(path, files={"file": ("../a/b.jsonl", b"x" * 20_000)}, data={"purpose": "batch"})
    assert (kept.json()["filename"], kept.json()["bytes"]) == ("b.jsonl", 20_000)
    await upload(service, b"x")
    full = await service.http.post(path, files=part, data={"purpose": "batch"})
    assert (full.status_code, full.json()["error"]["code"]) == (400, "too_many_files")
    for query in ({"limit": "0"}, {"limit": "10001"}, {"limit": "x"}, {"order": "up"}, {"after": "nobody"}):
        for listed in (path, "/v1/batches"):
            answer = await service.http.get(listed, params=query)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, next(iter(query))), (listed, query)
    assert (await service.http.get(path, params={"order": "asc", "limit": 1})).json()["last_id"] == kept.json()["id"]


async def test_a_client_that_stops_sending_is_told(make_service: ServiceFactory, tmp_path: Path):
    service = await make_service(config(tmp_path, limits={"body_timeout_s": 0.2}))
    head = (
        b"POST /v1/files HTTP/1.1\r\nHost: a\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        b'Content-Length: 1000\r\n\r\n--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nx'
    )
    async with client_of(service) as client:
        reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
        writer.write(head)
        assert b" 408 " in await reader.readline()
        writer.close()
    assert service.desk.store.names("content") == []


async def test_without_a_store_the_answer_says_what_to_set(make_service: ServiceFactory):
    service = await make_service()
    body = {"input_file_id": "file-a", "endpoint": "/v1/completions", "completion_window": "24h"}
    for answer in (
        await service.http.get("/v1/files"),
        await service.http.get("/v1/files/file-a/content"),
        await service.http.post("/v1/files", files={"file": ("a", b"x")}, data={"purpose": "batch"}),
        await service.http.post("/v1/batches", json=body),
        await service.http.post("/v1/batches/batch_a/cancel"),
    ):
        assert answer.status_code == 404
        assert "batches.store" in answer.json()["error"]["message"]


async def test_a_store_that_is_away_is_a_503(make_service: ServiceFactory, tmp_path: Path, monkeypatch):
    service = await make_service(config(tmp_path))
    file_id = await upload(service, line("a").encode())

    def away(name: str) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(service.desk.store, "read", away)
    answer = await service.http.get(f"/v1/files/{file_id}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
    assert answer.headers["retry-after"]


async def test_batches_are_counted(make_service: ServiceFactory, tmp_path: Path):
    service = await make_service(config(tmp_path))
    file_id = await upload(service, "\n".join([line("a"), line("b", model="demo")]).encode())
    body = {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    batch_id = (await service.http.post("/v1/batches", json=body)).json()["id"]
    await until(lambda: service.batches.snapshot()["num_ended"]["completed"] == 1)
    await until(lambda: service.batches.snapshot()["num_unfinished"] == 0)
    assert (await service.http.get(f"/v1/batches/{batch_id}")).json()["request_counts"]["failed"] == 1
    metrics = (await service.http.get("/metrics")).text
    router = service.directory._peers.router_id
    for name, labels in {
        "rayline:batch_lines_total": f'model_name="",outcome="completed",router="{router}"',
        "rayline:batches_ended_total": f'model_name="",router="{router}",status="completed"',
        "rayline:batches_unfinished": f'model_name="",router="{router}"',
    }.items():
        assert f"{name}{{{labels}}} {0 if name.endswith('unfinished') else 1}.0" in metrics
    stats = (await service.http.get("/rayline/stats")).json()
    assert stats["batches"]["num_completed_lines"] == 1


def test_memory_is_for_one_router():
    with pytest.raises(ValueError, match="several routers need a directory"):
        emulated_config(batches={"store": "memory://x"}, router={"num_replicas": 2})
