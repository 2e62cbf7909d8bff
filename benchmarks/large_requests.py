"""What large and small requests wait where the pool is full: the scheduler alone, against a model of a step's time.

    python -m benchmarks.large_requests [--shares 0 0.5 1 4 1000] [--rate 12]

Requests arrive at random at a pool of 60,000 slots: small ones (200 to 800 tokens in, 100 to 400 out), and one in forty
that is large (20,000 to 30,000 tokens in). A share is how many tokens of others may pass a request that finds no room,
for each token of its own: 0 is strict order of arrival, 1,000 no bound at all. One JSON line a row.
"""

import argparse
import json
import random
from collections import deque
from typing import Any

import llm.scheduling.waiting_queue as waiting
from benchmarks.engine_rows import percentile
from benchmarks.newcomers import MODELS, StepTime, run_to_end
from llm.scheduling.scheduler import Scheduler
from llm.scheduling.slot_pool import SlotPool

_LARGE = 20_000


def arrivals(rate: float, seconds: float) -> deque[tuple[float, int, int]]:
    """(time, tokens in, tokens out) of every request, in order."""
    rng = random.Random(0)
    now, requests = 0.0, deque[tuple[float, int, int]]()
    while now < seconds:
        now += rng.expovariate(rate)
        num_in = rng.randint(_LARGE, 30_000) if rng.random() < 1 / 40 else rng.randint(200, 800)
        requests.append((now, num_in, rng.randint(100, 400)))
    return requests


def simulate(step_time: StepTime, requests: deque[tuple[float, int, int]]) -> dict[str, Any]:
    """Run all requests to their end."""
    scheduler = Scheduler(
        SlotPool(60_000 // 16, 16), max_batch_size=256, max_tokens_per_step=8192, max_prefill_beside_decodes=192,
        max_seq_len=40_000, enable_prefix_caching=False,
    )  # fmt: skip
    now, num_out = 0.0, 0
    waits: dict[bool, list[float]] = {True: [], False: []}
    for now, arrived, sequence in run_to_end(scheduler, step_time, requests):
        num_out += 1
        if sequence.num_output_tokens == 1:
            waits[sequence.num_prompt_tokens >= _LARGE].append(now - arrived)
    return {
        "output_tok_s": round(num_out / now),
        "small_ttft_p50_s": round(percentile(waits[False], 0.5), 2),
        "small_ttft_p99_s": round(percentile(waits[False], 0.99), 2),
        "large_ttft_p50_s": round(percentile(waits[True], 0.5), 2),
        "large_ttft_max_s": round(max(waits[True]), 2),
        "preemptions": scheduler.num_preemptions,
    }


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", type=float, nargs="+", default=[0, 0.5, 1, 4, 1000], help="tokens that may pass")
    parser.add_argument("--rate", type=float, default=12.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=100, help="time in which requests arrive")
    options = parser.parse_args()
    for share in options.shares:
        waiting._PASSING_SHARE = share
        result = simulate(MODELS["llama-3.1-8b"], arrivals(options.rate, options.seconds))
        print(json.dumps({"passing_share": share, **result}), flush=True)


if __name__ == "__main__":
    main()
