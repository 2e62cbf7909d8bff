"""Clients that read nothing are cut off, by a real server on a real socket, as in a router and in Serve's proxy."""

import asyncio
import socket

import uvicorn
from starlette.middleware import Middleware
from starlette.types import Receive, Scope, Send

from deployments.api.send_timeout import PROXY_VARIABLES, SendTimeout, proxy_middlewares


async def test_a_client_that_never_reads_is_cut_off_and_others_are_not():
    ended = asyncio.Event()
    num_sent = 0

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal num_sent
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/short":
            await send({"type": "http.response.body", "body": b"short"})
            return
        try:
            while True:
                await send({"type": "http.response.body", "body": bytes(4096), "more_body": True})
                num_sent += 1
                await asyncio.sleep(0)
        finally:
            ended.set()

    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(SendTimeout(endless, 0.2), lifespan="off", log_level="critical"))
    serving = asyncio.create_task(server.serve([listening]))
    try:
        stuck = socket.socket()
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stuck.connect(listening.getsockname())
        stuck.sendall(b"GET /stuck HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(30):
            await ended.wait()
        assert num_sent * 4096 < 1 << 20, "what waits for the client is bounded"
        reader, writer = await asyncio.open_connection(*listening.getsockname())
        writer.write(b"GET /short HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert (await reader.read()).rstrip(b"0\r\n").endswith(b"short")
        writer.close()
        stuck.close()
    finally:
        server.should_exit = True
        await serving


def test_serve_finds_what_its_proxy_is_to_call():
    from ray._common.utils import import_attr

    assert import_attr(PROXY_VARIABLES["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"]) is proxy_middlewares
    assert all(isinstance(middleware, Middleware) for middleware in proxy_middlewares())
