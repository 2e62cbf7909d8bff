"""Requests that offer HTTP/2, as every Java client sends them, to a real uvicorn on a real socket."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator

import httpx
import pytest
import uvicorn
import uvicorn.config
from in_process import Service, ServiceFactory
from scripted_engine import events_of
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.api.upgrades import decline_upgrades

OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\n"
BODY = b'{"a": 1}'
BY_LENGTH = b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
IN_CHUNKS = b"Transfer-Encoding: chunked\r\n\r\n4\r\n%s\r\n4\r\n%s\r\n0\r\n\r\n" % (BODY[:4], BODY[4:])


@pytest.fixture
def declining(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(uvicorn.config.HTTP_PROTOCOLS, "auto", uvicorn.config.HTTP_PROTOCOLS["auto"])
    decline_upgrades()


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the body and with what is left of the offer."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message["body"]
        more = message["more_body"]
    left = [name for name, _ in scope["headers"] if name in (b"upgrade", b"http2-settings", b"connection")]
    answer = b"%s %s %s" % (scope["path"].encode(), body, b",".join(left))
    length = str(len(answer)).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
    await send({"type": "http.response.body", "body": answer})


@contextlib.asynccontextmanager
async def serving(app: ASGIApp, **options: object) -> AsyncIterator[tuple[str, int]]:
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="critical", **options))
    task = asyncio.create_task(server.serve([listening]))
    try:
        yield listening.getsockname()
    finally:
        server.should_exit = True
        await task


async def exchange(address: tuple[str, int], pieces: list[bytes], num_answers: int) -> list[bytes]:
    """The bodies of so many answers to what is sent, one piece in a packet."""
    reader, writer = await asyncio.open_connection(*address)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.01)
        answers = []
        async with asyncio.timeout(10):
            for _ in range(num_answers):
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                assert head.startswith(b"http/1.1 200"), head
                answers.append(await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0])))
        return answers
    finally:
        writer.close()


@pytest.mark.usefixtures("declining")
@pytest.mark.parametrize("rest", [BY_LENGTH, IN_CHUNKS], ids=["length", "chunks"])
@pytest.mark.parametrize("num_bytes", [1, 40, 10**6], ids=["by bytes", "by pieces", "at once"])
async def test_the_body_is_read_and_the_connection_goes_on(rest: bytes, num_bytes: int):
    """However the packets fall: three requests on one connection, the last one a plain one."""
    head = b"POST /%d HTTP/1.1\r\nHost: x\r\n"
    sent = head % 1 + OFFER + rest + head % 2 + OFFER + rest + head % 3 + rest
    pieces = [sent[i : i + num_bytes] for i in range(0, len(sent), num_bytes)]
    if num_bytes == 1:
        pieces = [sent[:150], *(sent[i : i + 1] for i in range(150, 260)), sent[260:]]
    async with serving(echo) as address:
        answers = await exchange(address, pieces, 3)
    assert answers == [b"/%d %s " % (i, BODY) for i in (1, 2, 3)]


@pytest.mark.usefixtures("declining")
async def test_other_requests_are_as_before():
    async with serving(echo) as address:
        tls = b"POST /x HTTP/1.1\r\nHost: x\r\nConnection: keep-alive, upgrade\r\nUpgrade: TLS/1.0\r\n" + BY_LENGTH
        pieces = [b"GET /a%20b?c=d HTTP/1.1\r\nHost: x\r\n" + OFFER + b"\r\n", tls]
        assert await exchange(address, pieces, 2) == [b"/a b  ", b"/x %s connection" % BODY]


@pytest.mark.usefixtures("declining")
async def test_a_chat_of_a_java_client(make_service: ServiceFactory):
    service: Service = await make_service()
    async with serving(service.api) as (host, port), httpx.AsyncClient(base_url=f"http://{host}:{port}") as client:
        headers = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAEAAEAAAAIAAAAB"}
        chat = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
        answer = await client.post("/v1/chat/completions", json=chat, headers=headers)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 3


async def test_a_lost_body_is_told(make_service: ServiceFactory):
    """Where a front end that Rayline has not prepared drops the body."""
    service: Service = await make_service()
    async with serving(service.api, http="httptools") as (host, port), httpx.AsyncClient() as client:
        headers = {"Connection": "Upgrade", "Upgrade": "h2c"}
        answer = await client.post(f"http://{host}:{port}/v1/completions", json={"model": "demo"}, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "body_missing")


@pytest.mark.usefixtures("declining")
@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_of_http_1_0_gets_no_chunks(make_service: ServiceFactory, stream: bool):
    """The end of the answer is the end of the connection."""
    service: Service = await make_service()
    chat = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 20, "stream": stream}
    body = json.dumps(chat).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    async with serving(service.api) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(head.encode() + body)
        async with asyncio.timeout(30):
            answer_head, _, answer = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
    assert b" 200 " in answer_head.splitlines()[0]
    assert b"transfer-encoding" not in answer_head.lower()
    if stream:
        assert len(events_of(answer.decode())) >= 3
        assert all(line == "" or line.startswith("data: ") for line in answer.decode().splitlines())
    else:
        assert json.loads(answer)["object"] == "chat.completion"
