"""Streams that wait long for their first token: the connection is kept open by comments, and an error is an event."""

import asyncio

import pytest
from in_process import ServiceFactory, emulated_config
from scripted_engine import events_of

from deployments.api import answering

HI = [{"role": "user", "content": "hi"}]
SLOW = {"tokens_per_s": 1000.0, "prefill_tokens_per_s": 50.0, "max_seq_len": 2048}
PATHS = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a" * 20}]},
    "/v1/completions": {"prompt": "a" * 20},
    "/v1/responses": {"input": "a" * 20},
    "/v1/messages": {"messages": [{"role": "user", "content": "a" * 20}], "max_tokens": 5},
}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "KEEP_ALIVE_S", 0.02)


async def test_comments_come_first_and_then_the_answer(make_service: ServiceFactory):
    service = await make_service(emulated_config(emulation=SLOW))
    answer = await service.post("/v1/completions", prompt="a" * 20, max_tokens=5, stream=True)
    assert answer.text.startswith(": keep-alive\n\n: keep-alive\n\n")
    text = answer.text.rpartition(": keep-alive\n\n")[2]
    assert events_of(text)[-1]["choices"][0]["finish_reason"] == "length"


async def test_an_answer_that_is_not_streamed_has_no_comments(make_service: ServiceFactory):
    service = await make_service(emulated_config(emulation=SLOW))
    assert (await service.post("/v1/completions", prompt="a" * 20, max_tokens=5)).json()["choices"]


@pytest.mark.parametrize("path", PATHS)
async def test_an_error_after_the_comments_is_an_event(make_service: ServiceFactory, path: str):
    service = await make_service(emulated_config(emulation=SLOW))
    headers = {"X-Request-Timeout": "0.2"}
    answer = await service.http.post(path, json={"model": "demo", "stream": True, **PATHS[path]}, headers=headers)
    assert answer.status_code == 200
    assert answer.text.startswith(": keep-alive")
    assert "timeout has passed" in answer.text.rpartition(": keep-alive\n\n")[2]
    assert "event: error" in answer.text or answer.text.endswith("data: [DONE]\n\n")


async def test_an_error_at_once_keeps_its_status(make_service: ServiceFactory):
    service = await make_service(emulated_config(emulation=SLOW))
    assert (await service.post("/v1/completions", prompt="", stream=True)).status_code == 400


async def test_a_client_that_leaves_while_it_waits_leaves_nothing(make_service: ServiceFactory):
    service = await make_service(emulated_config(emulation=SLOW))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await service.post("/v1/completions", prompt="a" * 20, stream=True)
    async with asyncio.timeout(5):
        while service.router.journal.num_live or service.num_used_pages:
            await asyncio.sleep(0.01)
