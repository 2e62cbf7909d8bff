"""The API in front of engine replicas in one process: streams, failover, lost messages, clients that leave."""

import asyncio
import json

import pytest
from in_process import DEMO, LocalClient, Service, ServiceFactory, emulated_config, eventually

from deployments.channel.listener import TokenListener
from deployments.channel.messages import ChannelAddress, EngineInfo
from deployments.config import AppConfig


def events(body: str) -> list[dict]:
    """The JSON of each event, `[DONE]` checked and left out."""
    lines = [line for line in body.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def text_of(chunks: list[dict], index: int = 0) -> str:
    return "".join(
        choice.get("text", "") or choice.get("delta", {}).get("content") or ""
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["index"] == index
    )


def finishes(chunks: list[dict]) -> list[tuple[int, str]]:
    return [(c["index"], c["finish_reason"]) for chunk in chunks for c in chunk["choices"] if c["finish_reason"]]


def num_begun(service: Service) -> int:
    """Generations that have tokens, and go on."""
    return sum(bool(generation.token_ids) for generation in service.router.journal._live.values())


async def test_chat_stream_has_openais_form(make_service: ServiceFactory):
    service = await make_service()
    messages = [{"role": "user", "content": "hi"}]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    response = await service.post("/v1/chat/completions", messages=messages, max_tokens=7, **options)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    chunks = events(response.text)
    assert len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1
    assert chunks[0]["id"].startswith("chatcmpl-")
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert chunks[0]["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": "", "refusal": None}, "logprobs": None,
         "finish_reason": None}
    ]  # fmt: skip
    assert finishes(chunks) == [(0, "length")]
    assert chunks[-2]["choices"][0]["delta"] == {}
    assert [c["usage"] for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"] == []
    usage = chunks[-1]["usage"]
    assert usage["completion_tokens"] == 7
    assert usage["total_tokens"] == usage["prompt_tokens"] + 7
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}
    assert len(text_of(chunks)) == 7


async def test_streamed_and_whole_answers_are_the_same(make_service: ServiceFactory):
    service = await make_service()
    whole = (await service.post("/v1/completions", prompt="abc", max_tokens=40)).json()
    chunks = events((await service.post("/v1/completions", prompt="abc", max_tokens=40, stream=True)).text)
    assert whole["object"] == chunks[0]["object"] == "text_completion"
    assert text_of(chunks) == whole["choices"][0]["text"]
    assert finishes(chunks) == [(0, "length")]
    assert all("usage" not in chunk for chunk in chunks)
    assert whole["choices"][0]["logprobs"] is None


async def test_prompts_times_n_gives_choices_in_order(make_service: ServiceFactory):
    service = await make_service()
    body = (await service.post("/v1/completions", prompt=["abc", "xyz"], n=2, max_tokens=5)).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    texts = [choice["text"] for choice in body["choices"]]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    assert body["usage"]["prompt_tokens"] == 8, "each prompt counts once: three characters and the first token"
    assert body["usage"]["completion_tokens"] == 20
    chunks = events((await service.post("/v1/completions", prompt=["abc", "xyz"], n=2, max_tokens=5, stream=True)).text)
    assert sorted(finishes(chunks)) == [(i, "length") for i in range(4)]
    assert [text_of(chunks, i) for i in range(4)] == texts


async def test_stop_string_across_tokens_ends_text_and_engine_request(make_service: ServiceFactory):
    service = await make_service(emulated_config(emulation={"tokens_per_s": 300.0, "max_seq_len": 2048}))
    full = (await service.post("/v1/completions", prompt="abc", max_tokens=20)).json()["choices"][0]["text"]
    stop = full[8:11]
    body = (await service.post("/v1/completions", prompt="abc", max_tokens=2000, stop=stop)).json()
    assert body["choices"][0]["text"] == full[:8]
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == 11
    chunks = events(
        (await service.post("/v1/completions", prompt="abc", max_tokens=2000, stop=["no", stop], stream=True)).text
    )
    assert text_of(chunks) == full[:8]
    assert finishes(chunks) == [(0, "stop")]


async def test_stop_token_is_no_part_of_the_text(make_service: ServiceFactory):
    service = await make_service()
    full = (await service.post("/v1/completions", prompt="abc", max_tokens=20)).json()["choices"][0]["text"]
    body = (
        await service.post("/v1/completions", prompt="abc", max_tokens=20, stop_token_ids=[ord(full[5])], min_tokens=3)
    ).json()
    assert body["choices"][0] == {"index": 0, "text": full[:5], "logprobs": None, "finish_reason": "stop"}


@pytest.mark.parametrize("stream", [False, True])
async def test_log_probabilities(make_service: ServiceFactory, stream: bool):
    service = await make_service()
    messages = [{"role": "user", "content": "hi"}]
    options = {"logprobs": True, "top_logprobs": 2, "max_tokens": 4, "stream": stream}
    response = await service.post("/v1/chat/completions", messages=messages, **options)
    chunks = events(response.text) if stream else [response.json()]
    entries = [e for c in chunks for choice in c["choices"] for e in (choice["logprobs"] or {}).get("content", [])]
    assert len(entries) == 4
    assert entries[0]["logprob"] == -0.5
    assert entries[0]["bytes"] == list(entries[0]["token"].encode())
    assert [top["token"] for top in entries[0]["top_logprobs"]] == ["a", "b"]

    response = await service.post("/v1/completions", prompt="abc", logprobs=1, max_tokens=4, stream=stream)
    chunks = events(response.text) if stream else [response.json()]
    found = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"] if choice["logprobs"]]
    assert [offset for part in found for offset in part["text_offset"]] == [0, 1, 2, 3]
    assert [top for part in found for top in part["top_logprobs"]] == [{"a": -1.0}] * 4


@pytest.mark.parametrize("lost", ["every second frame", "the first frame", "everything"])
async def test_lost_messages_lose_nothing(make_service: ServiceFactory, monkeypatch, lost: str):
    """The reply is the authority: what the channel did not bring comes with it."""
    service = await make_service()
    expected = (await service.post("/v1/completions", prompt="abc", max_tokens=60)).json()["choices"][0]["text"]
    take, num_seen = TokenListener._take, 0

    def lossy(self: TokenListener, peer: bytes, data: bytes) -> None:
        nonlocal num_seen
        num_seen += 1
        kept = {"every second frame": num_seen % 2 == 0, "the first frame": num_seen > 1, "everything": False}[lost]
        if kept:
            take(self, peer, data)

    monkeypatch.setattr(TokenListener, "_take", lossy)
    for logprobs in (None, 1):
        response = await service.post("/v1/completions", prompt="abc", max_tokens=60, stream=True, logprobs=logprobs)
        chunks = events(response.text)
        assert text_of(chunks) == expected
        assert finishes(chunks) == [(0, "length")]
    num_entries = sum(len(c["choices"][0]["logprobs"]["tokens"]) for c in chunks if c["choices"][0]["logprobs"])
    assert num_entries == 60


async def test_a_request_goes_on_elsewhere_when_its_replica_dies(make_service: ServiceFactory):
    config = emulated_config(emulation={"tokens_per_s": 200.0, "max_seq_len": 2048})
    service = await make_service(config, num_replicas=2)
    expected = (await service.post("/v1/completions", prompt="abc", max_tokens=300)).json()
    asking = [
        asyncio.ensure_future(service.post("/v1/completions", prompt="abc", max_tokens=300, stream=True, logprobs=0))
        for _ in range(4)
    ]
    await eventually(lambda: num_begun(service) == 4)
    service.client.kill(0)
    for response in await asyncio.gather(*asking):
        chunks = events(response.text)
        assert text_of(chunks) == expected["choices"][0]["text"]
        assert finishes(chunks) == [(0, "length")]
        assert sum(len(c["choices"][0]["logprobs"]["tokens"]) for c in chunks if c["choices"][0]["logprobs"]) == 300
    assert service.router.journal.num_resumes == 2


async def test_greedy_text_is_identical_after_a_replica_died(make_service: ServiceFactory):
    """With the real engine: prompt and emitted tokens are prefilled again and the text goes on as it would have."""
    config = AppConfig.model_validate(
        {"model": str(DEMO), "device": "cpu", "engine": {"max_batch_size": 4, "num_pages": 512}}
    )
    service = await make_service(config, num_replicas=2)
    body = {"prompt": "Once upon", "max_tokens": 150, "ignore_eos": True, "stream": True, "temperature": 0.8, "seed": 7}
    expected = text_of(events((await service.post("/v1/completions", **body)).text))
    asking = asyncio.ensure_future(service.post("/v1/completions", **body))
    while not any(len(g.token_ids) > 20 for g in service.router.journal._live.values()):
        await asyncio.sleep(0.005)
    (running,) = (g.replica_id for g in service.router.journal._live.values())
    service.client.kill(int(running[-1]))
    assert text_of(events((await asking).text)) == expected
    assert service.router.journal.num_resumes == 1


@pytest.mark.parametrize("failover", [False, True])
async def test_without_a_replica_left_the_stream_ends_with_an_error_event(make_service: ServiceFactory, failover):
    config = emulated_config(
        emulation={"tokens_per_s": 100.0, "max_seq_len": 2048},
        router={"max_resumes": 3 if failover else 0},
        admission={"no_replica_timeout_s": 0.5},
    )
    service = await make_service(config)
    asking = asyncio.ensure_future(service.post("/v1/completions", prompt="abc", max_tokens=500, stream=True))
    whole = asyncio.ensure_future(service.post("/v1/completions", prompt="abc", max_tokens=500))
    await eventually(lambda: num_begun(service) == 2)
    service.client.kill(0)
    chunks = events((await asking).text)
    assert chunks[-1]["error"]["type"] == "server_error"
    assert set(chunks[-1]["error"]) == {"message", "type", "param", "code"}
    assert (await whole).status_code == (503 if failover else 500)
    assert (await whole).json()["error"]["type"] == "server_error"


async def test_an_engine_that_breaks_answers_everything_and_fails_its_health_check(make_service: ServiceFactory):
    emulation = {"tokens_per_s": 100.0, "max_seq_len": 2048}
    service = await make_service(emulated_config(admission={"no_replica_timeout_s": 0.5}, emulation=emulation))
    replica = service.client.replicas[0]
    replica.check_health()
    asking = [asyncio.ensure_future(service.post("/v1/completions", prompt="abc", max_tokens=999)) for _ in range(3)]
    await eventually(lambda: num_begun(service) == 3)
    engine = replica._loop._engine

    def explode():
        raise RuntimeError("out of memory")

    engine.step = explode
    for response in await asyncio.gather(*asking):
        assert response.status_code == 503, "nothing has replaced it in time"
        assert "out of memory" not in response.text
    with pytest.raises(Exception, match="broke down: RuntimeError: out of memory"):
        replica.check_health()
    assert (await service.post("/v1/completions", prompt="abc")).status_code == 503, "answered, not left waiting"
    for row in list(engine._running):
        engine.abort(row)


async def test_leaving_frees_the_pages(make_service: ServiceFactory):
    config = emulated_config(emulation={"tokens_per_s": 100.0, "max_seq_len": 2048})
    service = await make_service(config)
    for stream in (True, False):
        asking = asyncio.ensure_future(
            service.post("/v1/completions", prompt="abc", max_tokens=2000, n=3, stream=stream)
        )
        while service.num_used_pages == 0:
            await asyncio.sleep(0.005)
        asking.cancel()
        await eventually(lambda: not service.num_used_pages and not service.router.journal.num_live, timeout_s=15)


async def test_a_disconnect_message_ends_the_work(make_service: ServiceFactory):
    """What an HTTP server tells when the connection closes, without cancelling anything itself."""
    service = await make_service(emulated_config(emulation={"tokens_per_s": 100.0, "max_seq_len": 2048}))
    body = json.dumps({"model": "demo", "prompt": "abc", "max_tokens": 2000, "stream": True}).encode()
    has_tokens, sent = asyncio.Event(), []
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive():
        if messages:
            return messages.pop()
        await has_tokens.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)
        if len(sent) > 5:
            has_tokens.set()

    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions", "root_path": "",
        "query_string": b"", "headers": [(b"content-type", b"application/json")], "http_version": "1.1",
        "scheme": "http", "server": ("test", 80), "client": ("test", 1),
    }  # fmt: skip
    async with asyncio.timeout(30):
        await service.api(scope, receive, send)
        while service.num_used_pages:
            await asyncio.sleep(0.005)
    assert len(sent) < 50


async def test_two_replicas_share_the_work(make_service: ServiceFactory):
    service = await make_service(num_replicas=2)
    await asyncio.gather(*(service.post("/v1/completions", prompt="abc", max_tokens=50) for _ in range(8)))
    async with asyncio.timeout(30):  # reports come every tenth of a second
        while True:
            replicas = (await service.http.get("/rayline/stats")).json()["replicas"]
            generated = {name: replica["num_generated_tokens"] for name, replica in replicas.items()}
            if sum(generated.values()) >= 2 * (4 * 50 + 8):
                break
            await asyncio.sleep(0.02)
    assert generated == {"replica-0": 4 * 50 + 8, "replica-1": 4 * 50 + 8}


@pytest.mark.timeout(60)
async def test_a_router_learns_what_an_engine_is_even_if_the_answer_is_lost(make_service: ServiceFactory, monkeypatch):
    """A busy router gives up on a replica's answer, while the replica's reports, for which it asked, arrive."""
    attach, num_lost = LocalClient.attach, 0

    async def lose_the_first(client: LocalClient, replica_id: str, channel: ChannelAddress) -> EngineInfo:
        nonlocal num_lost
        info = await attach(client, replica_id, channel)
        if not num_lost:
            num_lost += 1
            await asyncio.sleep(0.5)  # five reports
            raise TimeoutError
        return info

    monkeypatch.setattr(LocalClient, "attach", lose_the_first)
    service = await make_service()
    assert num_lost == 1
    assert (await service.post("/v1/completions", prompt="abc", max_tokens=3)).status_code == 200
