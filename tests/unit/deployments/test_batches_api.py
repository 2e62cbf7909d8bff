"""Files and batches over HTTP: the client of OpenAI and the emulated engine, whose files they are, what is refused."""

import asyncio
import contextlib
import hashlib
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn
from in_process import Service, ServiceFactory, emulated_config
from openai import AsyncOpenAI
from openai.types import Batch

from deployments.router.keys import ApiKey

FIRST, SECOND = "sk-first", "sk-second"
KEYS = tuple(ApiKey(name, hashlib.sha256(key.encode()).digest()) for name, key in (("a", FIRST), ("b", SECOND)))
ENDED = {"completed", "failed", "expired", "cancelled"}


def line(custom_id: str, url: str = "/v1/chat/completions", **body: Any) -> str:
    content = {"model": "demo", "messages": [{"role": "user", "content": custom_id}], "max_tokens": 4}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body or content})


def config(tmp_path: Path, **settings: Any):
    return emulated_config(batches={"store": str(tmp_path / "store"), **settings})


@contextlib.asynccontextmanager
async def client_of(service: Service, key: str = "none") -> AsyncIterator[AsyncOpenAI]:
    """OpenAI's client, connected to the service by a real socket."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
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
        assert (created.status, created.metadata) == ("validating", {"who": "me"})
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
    ],
)
async def test_each_endpoint_answers_as_over_http(make_service: ServiceFactory, tmp_path: Path, url: str, body: dict):
    service = await make_service(config(tmp_path))
    async with client_of(service) as client:
        file = await client.files.create(file=("a", line("one", url, **body).encode()), purpose="batch")
        batch = await client.batches.create(input_file_id=file.id, endpoint=url, completion_window="1h")
        batch = await end_of(client, batch)
        (answer,) = await results(client, batch.output_file_id)
        alone = (await service.http.post(url, json=body)).json()
        assert answer["response"]["body"].keys() == alone.keys()
        assert answer["response"]["body"]["usage"] == alone["usage"]
