"""Tokens a second that the serving path relays, with an emulated engine behind it: everything but the model.

    python -m benchmarks.relay [--streams 256] [--front-ends haproxy plain] [--routers 1] [--tokens 200]

Starts `serve run` with an engine that gives every stream 100 tokens a second, opens the streams at once from several
client processes, and counts what arrives over HTTP. Prints one JSON line a row; `ideal_tokens_per_s` is what the
emulated engine makes.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import aiohttp
import yaml

ROOT = Path(__file__).parent.parent
PORT = 8123
URL = f"http://127.0.0.1:{PORT}"
FRONT_ENDS = {
    "plain": {},
    "haproxy": {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"},
}
_START_TIMEOUT_S = 120


@dataclass(frozen=True)
class StreamTimes:
    """What one client stream saw, on the machine's monotonic clock, in seconds."""

    started: float
    first_token: float
    ended: float
    num_tokens: int


def serve_config(options: argparse.Namespace) -> dict[str, object]:
    """Configuration of an application with an emulated engine."""
    args = {
        "model": str(ROOT / "configs" / "demo"),
        "served_model_name": "emulated",
        "engine_kind": "emulated",
        "emulation": {"tokens_per_s": options.rate},
        "engine": {"max_batch_size": options.streams, "max_tokens_per_step": max(8192, options.streams)},
        "replicas": {"num_replicas": options.replicas},
        "router": {"num_replicas": options.routers},
        "allow_open_without_keys": True,
    }
    application = {"name": "default", "route_prefix": "/", "import_path": "deployments.app:build_app", "args": args}
    return {"http_options": {"host": "127.0.0.1", "port": PORT}, "applications": [application]}


def start_server(config: dict[str, object], front_end: str, scratch: Path) -> subprocess.Popen[bytes]:
    """Run `serve run` and wait until it answers."""
    path = scratch / f"{front_end}.yaml"
    path.write_text(yaml.safe_dump(config))
    log = (scratch / f"{front_end}.log").open("wb")
    server = subprocess.Popen(
        [sys.executable, "-m", "ray.serve.scripts", "run", str(path)],
        cwd=ROOT,
        env={**os.environ, **FRONT_ENDS[front_end], "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1"},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{URL}/ready", timeout=2):
                return server
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    stop_server(server)
    raise RuntimeError(f"the server did not come up:\n{Path(log.name).read_text()[-3000:]}")


def stop_server(server: subprocess.Popen[bytes]) -> None:
    """Interrupt `serve run` as a user would, and make sure that it is gone."""
    if server.poll() is None:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(timeout=40)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


async def _stream(session: aiohttp.ClientSession, index: int, num_tokens: int) -> StreamTimes:
    body = {
        "model": "emulated",
        "prompt": [97 + index % 26] * 32,
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started = time.monotonic()
    first_token = None
    usage = 0
    async with session.post(f"{URL}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if line.startswith(b"data: {"):
                first_token = first_token or time.monotonic()
                if b'"usage":{' in line:
                    usage = json.loads(line[6:])["usage"]["completion_tokens"]
    assert first_token is not None, "the stream was empty"
    assert usage == num_tokens, f"{usage} of {num_tokens} tokens arrived"
    return StreamTimes(started, first_token, time.monotonic(), usage)


def _client(indices: list[int], num_tokens: int, together: Barrier, results: "Queue[list[StreamTimes]]") -> None:
    async def run() -> list[StreamTimes]:
        timeout = aiohttp.ClientTimeout(total=300)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
            together.wait()
            return await asyncio.gather(*(_stream(session, index, num_tokens) for index in indices))

    results.put(asyncio.run(run()))


def load(num_streams: int, num_tokens: int, num_processes: int) -> dict[str, object]:
    """Open all streams at once; return tokens a second from the first request to the last token, and TTFT."""
    context = multiprocessing.get_context("spawn")
    together, results = context.Barrier(num_processes), context.Queue()
    shares = [list(range(start, num_streams, num_processes)) for start in range(num_processes)]
    clients = [context.Process(target=_client, args=(share, num_tokens, together, results)) for share in shares]
    for client in clients:
        client.start()
    times = [stream for _ in clients for stream in results.get(timeout=330)]
    for client in clients:
        client.join()
    elapsed = max(stream.ended for stream in times) - min(stream.started for stream in times)
    to_first = sorted(stream.first_token - stream.started for stream in times)
    return {
        "tokens_per_s": round(sum(stream.num_tokens for stream in times) / elapsed),
        "ttft_p50_ms": round(statistics.median(to_first) * 1e3, 1),
        "ttft_p99_ms": round(to_first[int(len(to_first) * 0.99)] * 1e3, 1),
    }


def main() -> None:
    """Measure every front end asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--front-ends", nargs="+", choices=list(FRONT_ENDS), default=["haproxy", "plain"])
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=200, help="tokens a stream")
    parser.add_argument("--rate", type=float, default=100.0, help="tokens a second of each stream")
    parser.add_argument("--routers", type=int, default=1)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--clients", type=int, default=4, help="client processes")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for front_end in options.front_ends:
            server = start_server(serve_config(options), front_end, Path(scratch))
            try:
                load(options.streams, 20, options.clients)
                for _ in range(options.repeats):
                    row = load(options.streams, options.tokens, options.clients)
                    setting = {"front_end": front_end, "streams": options.streams, "routers": options.routers}
                    print(json.dumps({**setting, "ideal_tokens_per_s": options.streams * options.rate, **row}))
            finally:
                stop_server(server)


if __name__ == "__main__":
    main()
