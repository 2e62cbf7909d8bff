"""A server that stops ends every open request with an error in its API's words (F23)."""

import asyncio
import json

import pytest
from in_process import ServiceFactory, emulated_config

pytestmark = pytest.mark.timeout(60)

SLOW = emulated_config(emulation={"tokens_per_s": 20.0, "max_seq_len": 2048})
CHAT = {"messages": [{"role": "user", "content": "abc"}]}
REQUESTS = [
    ("/v1/completions", {"prompt": "abc", "max_tokens": 1000}),
    ("/v1/completions", {"prompt": "abc" * 100, "max_tokens": 1000, "n": 3}),
    ("/v1/chat/completions", {**CHAT, "max_tokens": 1000}),
    ("/v1/responses", {"input": "abc", "max_output_tokens": 1000}),
    ("/v1/messages", {**CHAT, "max_tokens": 1000}),
]
IDS = ["completion", "three that share a prompt", "chat", "response", "message"]


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def data(text: str) -> list[dict]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


@pytest.mark.parametrize(("path", "body"), REQUESTS, ids=IDS)
async def test_open_streams_end_with_an_error_event(make_service: ServiceFactory, path: str, body: dict):
    service = await make_service(SLOW)
    asking = asyncio.ensure_future(service.post(path, **body, stream=True))
    await until(lambda: any(len(g.token_ids) > 2 for g in service.router.journal._live.values()))
    service.directory.shut_down()
    response = await asyncio.wait_for(asking, 5)
    assert response.status_code == 200, "it had begun"
    last = data(response.text)[-1]
    if path == "/v1/messages":
        assert last["type"] == "error"
    elif path == "/v1/responses":
        assert last["type"] in ("error", "response.failed")
    assert "The server is shutting down" in json.dumps(last)
    await until(lambda: service.router.journal.num_live == 0)


@pytest.mark.parametrize(("path", "body"), REQUESTS, ids=IDS)
async def test_what_is_not_a_stream_and_what_still_comes_get_503(make_service: ServiceFactory, path: str, body: dict):
    service = await make_service(SLOW)
    asking = asyncio.ensure_future(service.post(path, **body))
    await until(lambda: any(g.token_ids for g in service.router.journal._live.values()))
    service.directory.shut_down()
    for response in (await asyncio.wait_for(asking, 5), await service.post(path, **body)):
        assert response.status_code == 503
        assert "The server is shutting down" in response.json()["error"]["message"]
        assert int(response.headers["retry-after"]) >= 1


async def test_what_waits_for_a_replica_gets_503(make_service: ServiceFactory):
    service = await make_service()
    service.client.drain(0)
    asking = asyncio.ensure_future(service.post("/v1/completions", prompt="abc", max_tokens=5))
    await until(lambda: service.router.dispatcher.num_waiting == 1)
    service.directory.shut_down()
    assert (await asyncio.wait_for(asking, 5)).status_code == 503
    assert service.router.dispatcher.num_waiting == 0


async def test_the_fleet_page_is_told_no_more(make_service: ServiceFactory):
    """Its stream of events would never end."""
    service = await make_service()
    asking = asyncio.ensure_future(service.http.get("/rayline/events"))
    await asyncio.sleep(0)
    service.directory.shut_down()
    assert (await asyncio.wait_for(asking, 5)).status_code == 200
