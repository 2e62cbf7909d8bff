"""Fault F21: clients that ask for streams and read nothing of them.

`python -m chaos.client_faults` tries it behind HAProxy. Ray decides on its front end when it is first imported.
"""

import asyncio
import json
import os
import socket
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

from chaos.fleet import Outcome, cluster, emulated, proxy_pids, running

_MARK = "figure: "
_NUM_CLIENTS = 8
_MOST_S = 60
_MOST_MB = 64
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


async def f21_clients_that_never_read(front_end: str) -> Outcome:
    """Eight clients read nothing of streams that would go on for 100 s, behind Serve's proxy: aborted within 60 s."""
    args = emulated(1, tokens_per_s=40.0)
    async with running(front_end, "f21", args) as (fleet, clients):
        before_mb = _resident_mb([*fleet.router_pids(), *proxy_pids()])
        with ExitStack() as stack:
            for _ in range(_NUM_CLIENTS):
                ask_and_never_read(stack, fleet.url)
            await fleet.wait_for(clients, lambda stats: stats["router"]["num_live"] > 0, 30, "they begin")
            started = time.monotonic()
            waiting = asyncio.create_task(fleet.wait_until_idle(clients, 2 * _MOST_S))
            most_mb = before_mb
            while not waiting.done():
                await asyncio.sleep(0.5)
                most_mb = max(most_mb, _resident_mb([*fleet.router_pids(), *proxy_pids()]))
            await waiting
            took_s = time.monotonic() - started
            answered = (await clients.ask("still there?", 20)).is_complete
        grown_mb = most_mb - before_mb
        figure = f"{_NUM_CLIENTS} clients aborted after {took_s:.0f} s; router and proxy grew by {grown_mb:.0f} MB"
        return Outcome(figure, took_s < _MOST_S, grown_mb < _MOST_MB, answered)


async def f21_behind_haproxy(_: str) -> Outcome:
    """The same behind HAProxy."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "chaos.client_faults", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    output, _errors = await process.communicate()
    # Ray writes there too.
    figures = [line.removeprefix(_MARK) for line in output.decode().splitlines() if line.startswith(_MARK)]
    return Outcome(f"behind HAProxy: {figures[0] if figures else 'it could not be tried'}", process.returncode == 0)


def ask_and_never_read(stack: ExitStack, url: str) -> None:
    """Ask for four answers of 4,000 tokens, some 3 MB, on a connection that has next to no buffer."""
    address = urlsplit(url)
    wanted = {"model": "demo", "prompt": "a", "max_tokens": 4000, "n": 4, "ignore_eos": True, "stream": True}
    body = json.dumps(wanted).encode()
    head = (
        f"POST {address.path}/v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    connection = stack.enter_context(socket.socket())
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((address.hostname, address.port))
    connection.sendall(head.encode() + body)


def _resident_mb(pids: list[int]) -> float:
    """Memory that these processes hold."""
    num_pages = 0
    for pid in pids:
        try:
            num_pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except OSError:
            continue
    return num_pages * _PAGE_BYTES / 1e6


def _main() -> None:
    with cluster(haproxy=True) as front_end:
        try:
            outcome = asyncio.run(f21_clients_that_never_read(front_end))
        except Exception as error:  # noqa: BLE001 - whatever it is, the process that started this one tells it
            outcome = Outcome(f"{type(error).__name__}: {error}", False)
    print(f"{_MARK}{outcome.figure}", flush=True)
    sys.exit(0 if outcome.is_ok else 1)


if __name__ == "__main__":
    _main()
