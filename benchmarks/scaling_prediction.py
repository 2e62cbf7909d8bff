"""What the routing simulator says of a run of `benchmarks.scaling`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.routing_replica import ReplicaSpeed
from benchmarks.routing_sim import simulate
from benchmarks.routing_trace import BLOCK_TOKENS, read_trace
from deployments.config import PolicyName


def emulated_speed(tokens_per_s: float, prefill_tokens_per_s: float, max_rows: int) -> ReplicaSpeed:
    """An emulated engine as the simulator sees it: a step takes its pace, and a time for each prompt token."""
    return ReplicaSpeed(
        weights_s=1 / tokens_per_s, decode_context_s=1e-12, prefill_token_s=1 / prefill_tokens_per_s,
        prefill_pair_s=1e-15, num_slots=65_536 * 16, max_rows=max_rows, prefill_beside_decodes=8192,
    )  # fmt: skip


def predict(
    path: Path,
    *,
    num_requests: int,
    time_scale: float,
    policy: PolicyName,
    num_replicas: int,
    num_routers: int,
    speed: ReplicaSpeed | None,
    max_prompt: int,
) -> dict[str, Any]:
    """Time to first token and hit rate of the trace's first requests, with its clock scaled by `time_scale`."""
    trace = [
        replace(
            request,
            num_prompt_tokens=min(request.num_prompt_tokens, max_prompt),
            num_output_tokens=min(request.num_output_tokens, 2000),
            block_hashes=request.block_hashes[: min(request.num_prompt_tokens, max_prompt) // BLOCK_TOKENS],
        )
        for request in read_trace(path)[:num_requests]
    ]
    speed = speed or ReplicaSpeed()
    # `simulate` takes a load; this is the one that gives the clock asked for.
    busy_s = sum(speed.busy_s(request) for request in trace)
    load = busy_s / (time_scale * num_replicas * trace[-1].arrival_s)
    row = simulate(
        trace, policy=policy, num_replicas=num_replicas, load=load, num_routers=num_routers, speed=speed
    )  # fmt: skip
    return {
        "ttft_mean_ms": round(1e3 * row["ttft_mean"], 1),
        "ttft_p99_ms": round(1e3 * row["ttft_p99"], 1),
        "hit_rate": row["hit_rate"],
    }
