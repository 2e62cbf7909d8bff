"""What the load generator itself adds to what it measures, beside aiohttp and httpx in its place.

    python -m benchmarks.serve_overhead [--streams 200] [--tokens-per-s 100] [--tokens 500] [--clients rayline aiohttp]

A server in another process writes every stream a token at a set pace and remembers when; each client, one process,
opens all streams at once. One JSON line a client: what it reports against what the server did. `delay_ms` is from
writing a token to the client's time stamp for it, `overhead` by how much a figure of the client is worse than the
server's.
"""

import argparse
import asyncio
import json
import multiprocessing
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import uvloop

from benchmarks.serve_emulator import StreamLog, emulator
from deployments.bench.client import Target
from deployments.bench.load import LoadSpec, run_load
from deployments.bench.prompts import TokenSource
from deployments.bench.records import distribution
from deployments.bench.workload import PlannedRequest


@dataclass(frozen=True, slots=True)
class SeenStream:
    """One stream as a client saw it, on the machine's monotonic clock, in seconds."""

    sent_s: float
    chunks_s: list[float]


@dataclass(frozen=True, slots=True)
class SeenLoad:
    """All streams by the number that the server gave them, and the share of a core that the client used."""

    streams: dict[int, SeenStream]
    cpu_share: float


def see_with_rayline(url: str, num_streams: int, num_tokens: int) -> SeenLoad:
    """The load through the load generator.

    Raises:
        RuntimeError: a request failed.
    """
    target = Target(url, "/completions")
    spec = LoadSpec(
        target=target, address=target.resolve(), timeout_s=600, source=TokenSource.ids(0, 999), is_chat=False,
        model="emulated", seed=0, options={}, concurrency=num_streams,
        requests=tuple(PlannedRequest(i, 32, num_tokens) for i in range(num_streams)),
    )  # fmt: skip
    result = run_load(spec, num_processes=1)
    streams = {}
    for record in result.records:
        if record.ttft_s is None or not record.is_completed:
            raise RuntimeError(f"a request failed: {record.error_kind}, {record.error_example}")
        sent = result.started_s + record.sent_s
        chunks = [sent + record.ttft_s]
        for gap in record.gaps_s:
            chunks.append(chunks[-1] + gap)
        streams[record.num_input_tokens] = SeenStream(sent, chunks)
    return SeenLoad(streams, result.clients[0].cpu_share)


class _PeerStream:
    """Reads one answer's lines for a client that is not ours."""

    def __init__(self) -> None:
        self.sent_s = time.monotonic()
        self.chunks_s: list[float] = []
        self.serial = 0

    def take(self, line: bytes) -> None:
        """Note when a token came."""
        if not line.startswith(b"data: {"):
            return
        event = msgspec.json.decode(line[6:])
        if event["choices"]:
            self.chunks_s.append(time.monotonic())
        elif usage := event.get("usage"):
            self.serial = usage["prompt_tokens"]


async def _with_aiohttp(url: str, num_streams: int, body: dict[str, Any]) -> list[_PeerStream]:
    import aiohttp

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one() -> _PeerStream:
            stream, rest = _PeerStream(), b""
            async with session.post(url, json=body) as response:
                async for data in response.content.iter_any():
                    *events, rest = (rest + data).split(b"\n\n")
                    for event in events:
                        stream.take(event)
            return stream

        return await asyncio.gather(*(one() for _ in range(num_streams)))


async def _with_httpx(url: str, num_streams: int, body: dict[str, Any]) -> list[_PeerStream]:
    import httpx

    async with httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=None)) as session:

        async def one() -> _PeerStream:
            stream = _PeerStream()
            async with session.stream("POST", url, json=body) as response:
                async for line in response.aiter_lines():
                    stream.take(line.encode())
            return stream

        return await asyncio.gather(*(one() for _ in range(num_streams)))


_PEERS: dict[str, Callable[[str, int, dict[str, Any]], Coroutine[Any, Any, list[_PeerStream]]]] = {
    "aiohttp": _with_aiohttp,
    "httpx": _with_httpx,
}


def _peer_process(name: str, url: str, num_streams: int, body: dict[str, Any], pipe: Connection) -> None:
    started, cpu = time.monotonic(), time.process_time()
    streams = uvloop.run(_PEERS[name](url, num_streams, body))
    cpu_share = (time.process_time() - cpu) / (time.monotonic() - started)
    pipe.send(SeenLoad({s.serial: SeenStream(s.sent_s, s.chunks_s) for s in streams}, cpu_share))


def see_with_peer(name: str, url: str, num_streams: int, num_tokens: int) -> SeenLoad:
    """The load through `aiohttp` or `httpx`, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    body = {"prompt": [1] * 32, "max_tokens": num_tokens, "stream": True}
    process = context.Process(target=_peer_process, args=(name, f"{url}/completions", num_streams, body, theirs))
    process.start()
    theirs.close()
    seen: SeenLoad = ours.recv()
    process.join()
    return seen


def compare(seen: SeenLoad, logs: dict[int, StreamLog]) -> dict[str, Any]:
    """What the client saw against what the server did.

    Raises:
        RuntimeError: the client missed tokens.
    """
    for serial, log in logs.items():
        if serial not in seen.streams or len(seen.streams[serial].chunks_s) != len(log.written_s):
            raise RuntimeError(f"the client missed tokens of stream {serial}")
    pairs = [(seen.streams[serial], log) for serial, log in logs.items()]
    delays = (c - w for stream, log in pairs for c, w in zip(stream.chunks_s, log.written_s, strict=True))
    num_tokens = sum(len(log.written_s) for _, log in pairs)
    served_s = max(log.written_s[-1] for _, log in pairs) - min(log.received_s for _, log in pairs)
    seen_s = max(stream.chunks_s[-1] for stream, _ in pairs) - min(stream.sent_s for stream, _ in pairs)
    delay = distribution(delays)
    assert delay is not None, "there are tokens"
    return {
        "server_tokens_per_s": round(num_tokens / served_s),
        "client_tokens_per_s": round(num_tokens / seen_s),
        "overhead_throughput": _excess(seen_s, served_s),
        "overhead_tpot": _excess(
            sum(_tpot(stream.chunks_s) for stream, _ in pairs), sum(_tpot(log.written_s) for _, log in pairs)
        ),
        "overhead_e2e": _excess(
            sum(stream.chunks_s[-1] - stream.sent_s for stream, _ in pairs),
            sum(log.written_s[-1] - log.received_s for _, log in pairs),
        ),
        "delay_ms": {name: round(delay[name], 2) for name in ("mean", "p50", "p99")},
        "cpu_share": round(seen.cpu_share, 3),
        "cpu_us_per_token": round(seen.cpu_share * seen_s / num_tokens * 1e6, 1),
    }


def _tpot(times_s: list[float]) -> float:
    return (times_s[-1] - times_s[0]) / max(len(times_s) - 1, 1)


def _excess(seen: float, true: float) -> str:
    return f"{seen / true - 1:+.2%}"


def measure(client: str, num_streams: int, tokens_per_s: float, num_tokens: int) -> dict[str, Any]:
    """One row: a client (`rayline`, `aiohttp` or `httpx`) against the emulated server."""
    with emulator(tokens_per_s) as server:
        if client == "rayline":
            seen = see_with_rayline(server.url, num_streams, num_tokens)
        else:
            seen = see_with_peer(client, server.url, num_streams, num_tokens)
        return compare(seen, server.take_logs())


def main() -> None:
    """Measure every client asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--tokens-per-s", type=float, default=100.0, help="of each stream")
    parser.add_argument("--tokens", type=int, default=500, help="of each stream")
    parser.add_argument("--clients", nargs="+", choices=["rayline", *_PEERS], default=["rayline", *_PEERS])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    for client in options.clients:
        for _ in range(options.repeats):
            row = measure(client, options.streams, options.tokens_per_s, options.tokens)
            print(json.dumps({"client": client, "streams": options.streams, **row}), flush=True)


if __name__ == "__main__":
    main()
