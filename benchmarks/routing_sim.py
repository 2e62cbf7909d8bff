"""Routing policies side by side: simulated replicas replay a trace.

    python -m benchmarks.routing_sim TRACE [TRACE ...] [--replicas 1 2 4 8 16 64] [--loads 0.3 0.5 0.8]

Policies, `Fleet` and slot pool are those that serve; how long engines take is computed (`benchmarks.routing_replica`).
A load of 1.0 would keep every replica computing all the time if nothing were cached; the trace's clock runs faster or
slower to give a load, the same for all policies. Formats of traces and where to get them: `benchmarks.routing_trace`.
Prints one JSON line a row, then a table:

- `ttft_*`: seconds until a request's first token is back at its router;
- `ttft_floor`: the mean if there were no queues and one cache as large as all together;
- `tpot_ms`: mean milliseconds for each further token;
- `hit_rate`: share of prompt tokens that came from prefix caches;
- `max_served`, `max_computed`, `max_open`: the busiest replica over the mean, by requests served, by prompt tokens
  computed, and by requests queued or running on the average;
- `decision_us`: microseconds to choose a replica, in this process, with the trace's blocks of 512 tokens;
  `benchmarks.routing_decision` has the figure for pages of 16.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.routing_events import CALL_DELAY_S, MESSAGE_DELAY_S, Simulation
from benchmarks.routing_replica import ReplicaSpeed
from benchmarks.routing_trace import BLOCK_TOKENS, TraceRequest, read_trace
from deployments.config import PolicyName


def simulate(
    trace: Sequence[TraceRequest],
    *,
    policy: PolicyName,
    num_replicas: int,
    load: float,
    num_routers: int = 1,
    seed: int = 0,
    speed: ReplicaSpeed | None = None,
) -> dict[str, Any]:
    """One row: a trace at a load under a policy.

    Raises:
        ValueError: a request is larger than a replica's memory.
    """
    speed = speed or ReplicaSpeed()
    duration_s = trace[-1].arrival_s
    busy_s = sum(speed.busy_s(request) for request in trace)
    time_scale = busy_s / (load * num_replicas * duration_s) if duration_s else 1.0
    simulation = Simulation(
        trace,
        policy=policy,
        num_replicas=num_replicas,
        num_routers=num_routers,
        speed=speed,
        time_scale=time_scale,
        seed=seed,
    )
    start = time.perf_counter()
    simulation.run()
    replicas, requests = simulation.replicas, simulation.requests
    ttft = sorted(r.first_token_s + MESSAGE_DELAY_S - r.request.arrival_s * time_scale for r in requests)
    decode_s = sum(r.end_s - r.first_token_s for r in requests)
    num_decoded = sum(r.request.num_output_tokens - 1 for r in requests)
    decision_s = sorted(simulation.decision_s)
    return {
        "policy": str(policy),
        "replicas": num_replicas,
        "load": load,
        "routers": num_routers,
        "ttft_mean": round(statistics.fmean(ttft), 4),
        "ttft_p50": round(_quantile(ttft, 0.5), 4),
        "ttft_p99": round(_quantile(ttft, 0.99), 4),
        "ttft_floor": round(_ttft_floor(trace, num_replicas, speed), 4),
        "tpot_ms": round(1e3 * decode_s / max(num_decoded, 1), 2),
        "hit_rate": round(sum(r.num_cached_tokens for r in requests) / sum(r.num_prompt_tokens for r in trace), 3),
        "max_served": _max_over_mean([replica.num_served for replica in replicas]),
        "max_computed": _max_over_mean([replica.num_computed_tokens for replica in replicas]),
        "max_open": _max_over_mean(simulation.open_s),
        "decision_us": round(1e6 * statistics.fmean(decision_s), 1),
        "decision_us_p99": round(1e6 * _quantile(decision_s, 0.99), 1),
        "simulated_s": round(simulation.now, 1),
        "took_s": round(time.perf_counter() - start, 1),
    }


def _ttft_floor(trace: Sequence[TraceRequest], num_replicas: int, speed: ReplicaSpeed) -> float:
    """Mean seconds to prefill alone, with the last blocks of all requests so far in one cache."""
    cache: OrderedDict[int, None] = OrderedDict()
    total_s = 0.0
    for request in trace:
        num_tokens, blocks = request.num_prompt_tokens, request.block_hashes
        cached = itertools.takewhile(cache.__contains__, blocks[: (num_tokens - 1) // BLOCK_TOKENS])
        total_s += speed.prefill_s(num_tokens, sum(1 for _ in cached) * BLOCK_TOKENS)
        for block in reversed(blocks):
            cache[block] = None
            cache.move_to_end(block)
        while len(cache) > num_replicas * (speed.num_slots // BLOCK_TOKENS):
            cache.popitem(last=False)
    return total_s / len(trace) + CALL_DELAY_S + MESSAGE_DELAY_S


def _quantile(ordered: Sequence[float], quantile: float) -> float:
    return ordered[min(int(len(ordered) * quantile), len(ordered) - 1)]


def _max_over_mean(values: Sequence[float]) -> float:
    mean = statistics.fmean(values)
    return round(max(values) / mean, 2) if mean else 1.0


def main() -> None:
    """Run every combination that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="+", type=Path, metavar="TRACE", help="file in Mooncake's or Azure's format")
    parser.add_argument("--replicas", nargs="+", type=int, default=[1, 2, 4, 8, 16, 64])
    parser.add_argument("--loads", nargs="+", type=float, default=[0.3, 0.5, 0.8], help="see above")
    parser.add_argument("--policies", nargs="+", type=PolicyName, default=list(PolicyName), help="; ".join(PolicyName))
    parser.add_argument("--routers", type=int, default=1, help="requests go to the routers in turn")
    parser.add_argument("--requests", type=int, help="only the first so many of each trace")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if min([*options.replicas, *options.loads, options.routers]) <= 0:
        parser.error("--replicas, --loads and --routers take positive numbers")
    try:
        traces = {path: read_trace(path)[: options.requests] for path in options.traces}
    except (OSError, ValueError) as error:
        parser.error(str(error))
    combinations = [
        (path, num_replicas, load, policy)
        for path in traces
        for num_replicas in options.replicas
        for load in options.loads
        for policy in options.policies
    ]
    rows = []
    for index, (path, num_replicas, load, policy) in enumerate(combinations):
        print(f"{index}/{len(combinations)} {path.stem} {num_replicas} {load} {policy}", file=sys.stderr, flush=True)
        row = simulate(
            traces[path],
            policy=policy,
            num_replicas=num_replicas,
            load=load,
            num_routers=options.routers,
            seed=options.seed,
        )
        rows.append({"trace": path.stem, **row})
        print(json.dumps(rows[-1]), flush=True)
    Console(width=200).print(_table(rows))


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table()
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    return table


if __name__ == "__main__":
    main()
