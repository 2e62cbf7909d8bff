"""What HTTP, Ray Serve and the router add to one request's time to first token, with the demo model.

    python -m benchmarks.overhead [--front-ends haproxy plain] [--requests 100]

One request at a time, streamed, greedy; the same prompt through the engine alone in this process. Also prints how long
the server took from its start to its first answer. One JSON line a row.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path

import aiohttp

from benchmarks.relay import PORT, ROOT, URL, start_server, stop_server
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import GenerationRequest

DEMO = ROOT / "configs" / "demo"
QUESTION = [{"role": "user", "content": "What is 17 + 25?"}]


def bare_ttft_ms(num_requests: int) -> list[float]:
    """Milliseconds to the first token in the engine alone, sorted."""
    engine = ContinuousBatchingEngine.from_pretrained(DEMO, progress=False)
    assert engine.tokenizer is not None
    times = []
    for _ in range(num_requests):
        start = time.perf_counter()
        prompt = tuple(engine.tokenizer.apply_chat_template(QUESTION))
        engine.add_request(GenerationRequest(prompt_token_ids=prompt, temperature=0, max_new_tokens=16))
        engine.step()
        times.append((time.perf_counter() - start) * 1e3)
        while engine.scheduler.has_pending_work:
            engine.step()
    return sorted(times)


async def served_ttft_ms(num_requests: int) -> list[float]:
    """Milliseconds from sending a request to the first text, sorted."""
    body = {"model": "demo", "messages": QUESTION, "temperature": 0, "max_tokens": 16, "stream": True}
    times = []
    async with aiohttp.ClientSession() as session:
        for _ in range(num_requests):
            start = time.perf_counter()
            first = None
            async with session.post(f"{URL}/v1/chat/completions", json=body) as response:
                response.raise_for_status()
                async for line in response.content:
                    if first is None and b'"content":"4' in line:
                        first = (time.perf_counter() - start) * 1e3
            assert first is not None, "the answer is not 42"
            times.append(first)
    return sorted(times)


def main() -> None:
    """Measure the engine, then every front end asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--front-ends", nargs="+", choices=["haproxy", "plain"], default=["haproxy", "plain"])
    parser.add_argument("--requests", type=int, default=100)
    options = parser.parse_args()
    bare = bare_ttft_ms(options.requests)
    print(json.dumps({"path": "engine alone", "ttft_p50_ms": round(statistics.median(bare), 2)}), flush=True)
    application = {
        "name": "default",
        "route_prefix": "/",
        "import_path": "deployments.app:build_app",
        "args": {"model": str(DEMO), "allow_open_without_keys": True},
    }
    config = {"http_options": {"host": "127.0.0.1", "port": PORT}, "applications": [application]}
    with tempfile.TemporaryDirectory() as scratch:
        for front_end in options.front_ends:
            start = time.perf_counter()
            server = start_server(config, front_end, Path(scratch))
            try:
                asyncio.run(served_ttft_ms(1))
                first_answer_s = time.perf_counter() - start
                asyncio.run(served_ttft_ms(10))
                served = asyncio.run(served_ttft_ms(options.requests))
            finally:
                stop_server(server)
            row = {
                "path": front_end,
                "ttft_p50_ms": round(statistics.median(served), 2),
                "ttft_p99_ms": round(served[int(len(served) * 0.99)], 2),
                "added_p50_ms": round(statistics.median(served) - statistics.median(bare), 2),
                "start_to_first_answer_s": round(first_answer_s, 1),
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
