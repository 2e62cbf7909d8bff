"""Streams that end early: because the client leaves while they begin, or because something fails inside."""

import asyncio
import gc
import json

import pytest
from in_process import Service, ServiceFactory, emulated_config

from deployments.chat.choices import Choice
from deployments.router.generation import Generation

HI = [{"role": "user", "content": "hi"}]


async def leave(service: Service, path: str, body: dict, num_bodies: int) -> None:
    """Ask for a stream, and leave while its headers, or the n-th piece of its body, is being sent."""
    data = json.dumps({"model": "demo", "stream": True, **body}).encode()
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "client": ("1.1.1.1", 1),
        "server": ("test", 80), "headers": [(b"content-type", b"application/json")],
    }  # fmt: skip
    incoming: asyncio.Queue[dict] = asyncio.Queue()
    incoming.put_nowait({"type": "http.request", "body": data, "more_body": False})
    num_sent = -1

    async def send(message: dict) -> None:
        nonlocal num_sent
        num_sent += 1
        if num_sent >= num_bodies:
            incoming.put_nowait({"type": "http.disconnect"})
            await asyncio.sleep(1)

    await service.api(scope, incoming.get, send)
    assert num_sent == num_bodies, "it went on after the client had left"


@pytest.mark.parametrize("num_bodies", [0, 1, 3])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": HI}),
        ("/v1/completions", {"prompt": "hi", "max_tokens": 1500, "n": 2}),
        ("/v1/responses", {"input": "hi"}),
        ("/v1/messages", {"messages": HI, "max_tokens": 1500}),
    ],
)
async def test_the_work_ends(make_service: ServiceFactory, path: str, body: dict, num_bodies: int):
    service = await make_service(emulated_config(emulation={"tokens_per_s": 100.0, "max_seq_len": 2048}))
    await leave(service, path, body, num_bodies)
    async with asyncio.timeout(30):
        while service.router.journal.num_live or service.num_used_pages:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("path", "body", "end"),
    [
        ("/v1/chat/completions", {"messages": HI}, "data: [DONE]"),
        ("/v1/responses", {"input": "hi"}, '"type":"response.failed"'),
        ("/v1/messages", {"messages": HI, "max_tokens": 1500}, "event: error"),
    ],
)
async def test_what_fails_inside_a_stream_ends_it_in_the_apis_words(
    make_service: ServiceFactory, monkeypatch, path: str, body: dict, end: str
):
    service = await make_service(emulated_config(emulation={"tokens_per_s": 100.0, "max_seq_len": 2048}))
    advance = Choice.advance
    num_calls = 0

    def fail_later(self: Choice):
        nonlocal num_calls
        num_calls += 1
        if num_calls > 3:
            raise RuntimeError("secret detail")
        return advance(self)

    monkeypatch.setattr(Choice, "advance", fail_later)
    answer = await service.post(path, stream=True, **body)
    assert end in answer.text.strip().split("\n\n")[-1]
    assert "The server failed to answer this request" in answer.text
    assert "secret" not in answer.text
    assert ("[DONE]" in answer.text) == (path == "/v1/chat/completions")
    async with asyncio.timeout(30):
        while service.router.journal.num_live or service.num_used_pages:
            await asyncio.sleep(0.01)


def generations() -> list[object]:
    """Those that are still in memory."""
    return [found for found in gc.get_objects() if type(found) is Generation]


async def test_what_is_over_leaves_nothing_to_the_garbage_collector(make_service: ServiceFactory):
    """Whole, streamed, stopped by its text and left by the client: memory of prompts and tokens is free at once."""
    service = await make_service(emulated_config(emulation={"tokens_per_s": 1000.0, "max_seq_len": 2048}))
    body = {"prompt": "hi", "max_tokens": 20, "n": 2}
    gc.collect()
    earlier = generations()  # of requests of other tests that failed: their errors' tracebacks may be kept
    gc.disable()
    try:
        for more in ({}, {"stream": True}, {"stop": ["c"]}):
            assert (await service.post("/v1/completions", **body, **more)).status_code == 200
        await leave(service, "/v1/completions", {**body, "max_tokens": 1500}, 3)
        async with asyncio.timeout(30):
            while service.router.journal.num_live or any(found not in earlier for found in generations()):
                await asyncio.sleep(0.1)
    finally:
        gc.enable()
