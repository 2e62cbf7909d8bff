"""What one choice of a replica costs a router, with full prefix caches.

    python -m benchmarks.routing_decision [--replicas 64] [--prompt 12000]

Every replica's cache is as full as an H200's with an 8B model, in pages of 16 tokens. Prompts begin with 512 tokens
that all replicas have; half of each is cached by three replicas besides, as by turns of a conversation that were
answered there. Each prompt is ranked and sent; replicas report in turn, one after each prompt.
Prints one JSON line: microseconds for `Fleet.rank`, `Fleet.sent` and `Fleet.report`, and the memory that caches take.
"""

import argparse
import json
import random
import statistics
import time
import tracemalloc

from deployments.fleet.fleet import Fleet, RoutingKey
from deployments.fleet.policy import CostPolicy
from llm.serving.schemas import EngineStats

PAGE_SIZE = 16
NUM_PAGES = 895_728 // PAGE_SIZE
SHARED_TOKENS = 512


def stats() -> EngineStats:
    """A replica with half of its rows in use."""
    return EngineStats(
        num_running=128,
        num_waiting=0,
        num_waiting_tokens=random.randrange(8192),
        num_free_pages=0,
        num_used_pages=NUM_PAGES // 2,
        num_cached_pages=NUM_PAGES - NUM_PAGES // 2,
        num_pages=NUM_PAGES,
        page_size=PAGE_SIZE,
        num_preemptions=0,
        num_generated_tokens=0,
        num_prompt_tokens=0,
        num_cached_prompt_tokens=0,
        max_rows=256,
    )


def blocks(num: int) -> list[int]:
    """Hashes of so many pages."""
    return [random.getrandbits(64) for _ in range(num)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=12_000, help="tokens of each prompt")
    parser.add_argument("--decisions", type=int, default=2000)
    options = parser.parse_args()
    random.seed(0)
    replica_ids = [f"replica-{i}" for i in range(options.replicas)]
    shared = blocks(SHARED_TOKENS // PAGE_SIZE)
    fleet = Fleet(CostPolicy(seed=0))
    tracemalloc.start()
    for replica_id in replica_ids:
        fleet.report(replica_id, stats(), [*shared, *blocks(NUM_PAGES - len(shared))], [], True)
    num_bytes = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    prompts = [shared + blocks(options.prompt // PAGE_SIZE - len(shared)) for _ in range(options.decisions)]
    for prompt in prompts:
        for replica_id in random.sample(replica_ids, min(3, len(replica_ids))):
            fleet.report(replica_id, stats(), prompt[: len(prompt) // 2], [], False)
    times: dict[str, list[float]] = {"rank": [], "sent": [], "report": []}
    on_the_way: dict[str, list[int]] = {replica_id: [] for replica_id in replica_ids}
    for stream_id, prompt in enumerate(prompts):
        start = time.perf_counter()
        best = fleet.rank(RoutingKey(options.prompt, prompt))[0]
        ranked = time.perf_counter()
        fleet.sent(best, stream_id, RoutingKey(options.prompt, prompt))
        times["rank"].append(ranked - start)
        times["sent"].append(time.perf_counter() - ranked)
        on_the_way[best].append(stream_id)
        replica_id = replica_ids[stream_id % len(replica_ids)]
        received, on_the_way[replica_id] = on_the_way[replica_id], []
        for arrived in received:
            fleet.prefilled(arrived)
        added, state = [block for arrived in received for block in prompts[arrived]], stats()
        start = time.perf_counter()
        fleet.report(replica_id, state, added, [], False, received)
        times["report"].append(time.perf_counter() - start)
    row = {"replicas": options.replicas, "prompt_tokens": options.prompt, "cached_pages": NUM_PAGES}
    row |= {f"{name}_us": round(1e6 * statistics.fmean(values), 1) for name, values in times.items()}
    row |= {f"{name}_us_p99": round(1e6 * statistics.quantiles(values, n=100)[98], 1) for name, values in times.items()}
    print(json.dumps({**row, "caches_mib": round(num_bytes / 2**20)}))


if __name__ == "__main__":
    main()
