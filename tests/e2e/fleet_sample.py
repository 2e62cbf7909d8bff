"""A fleet that has everything the page can show: what `/rayline/events` would send of it."""

import json
import math
import time
from typing import Any

GIB = 1 << 30


def machine(node: str, num_gpus: int) -> dict[str, Any]:
    gpus = [
        {"index": index, "name": "NVIDIA H200", "used_bytes": (100 + 3 * index) * GIB, "total_bytes": 140 * GIB,
         "busy_percent": 97 - index if index != 2 else None}
        for index in range(num_gpus)
    ]  # fmt: skip
    return {"node": node, "pid": 4711, "memory_bytes": 9 * GIB, "num_cores": 16, "busy_cores": 1.37, "gpus": gpus}


def replica(state: str = "serving", why: str = "", **fields: Any) -> dict[str, Any]:
    known = {
        "num_running": 180, "num_waiting": 12, "num_waiting_tokens": 48_213, "num_free_pages": 1000,
        "num_used_pages": 5200, "num_cached_pages": 2100, "num_pages": 8300, "page_size": 16, "num_preemptions": 3,
        "num_generated_tokens": 1_234_567, "num_prompt_tokens": 900_000, "num_cached_prompt_tokens": 540_000,
        "max_rows": 256, "age_s": 0.05, "is_serving": state == "serving", "state": state, "why": why,
        "machine": machine("gpu-node-1", 1), "adapters": {"num": 0, "names": []},
    }  # fmt: skip
    return {**known, **fields}


def latency(scale: float) -> dict[str, Any]:
    ttft = {"num": 12_345, "p50_s": 0.0871 * scale, "p90_s": 0.412 * scale, "p99_s": 2.31 * scale}
    return {"ttft": ttft, "gap": {"num": 1_234_567, "p50_s": 0.0104, "p90_s": 0.0171, "p99_s": 0.093 * scale}}


def state() -> dict[str, Any]:
    now = time.time()
    points = [
        {"at": now - 900 + 5 * i, "tokens_per_s": 9000 + 4000 * math.sin(i / 9), "num_live": 180 + i, "num_waiting": 0,
         "num_serving": 3, "ttft_p50_s": None if 60 < i < 80 else 0.1 + i / 2000}
        for i in range(180)
    ]  # fmt: skip
    totals = {
        "num_live": 372,
        "num_waiting": 12,
        "num_requests": 99,
        "num_refused": 4,
        "num_resumes": 7,
        "num_moves": 2,
    }
    engine = {"device": "cuda:0", "dtype": "bfloat16", "backend": "kernels", "max_seq_len": 131_072, "num_slots": 1}
    return {
        "at": now,
        "router_id": "k3x9q2pz",
        "router": {**totals, "num_live": 200},
        "models": [
            {
                "name": "meta-llama/Llama-3.3-70B-Instruct",
                "aliases": ["gpt-4o"],
                "state": "ready",
                "engine": engine,
                "wanted": [1, 4],
                "scaling": "The load asks for 3 replicas (row use); 1 to 4 may run.",
                "replicas": {
                    "a81kfj20": replica(
                        machine=machine("gpu-node-1.cluster.example.internal", 8),
                        adapters={"num": 14, "names": ["billing-answers", "sql-from-questions-" + 60 * "x"]},
                    ),
                    "b2k9dm3x": replica("doubtful", "its last 2 steps failed", num_running=0, num_waiting=0),
                    "c0": replica("gone", "its process ended suddenly: it was killed, or crashed"),
                },
            },
            {
                "name": "demo",
                "aliases": [],
                "state": "ready",
                "engine": {**engine, "device": "cpu", "dtype": "float32"},
                "wanted": [3, 3],
                "scaling": None,
                "replicas": {
                    "d4": replica(num_running=3, num_waiting=0, machine=machine("vm", 0)),
                    "older": replica(machine=None),
                },
            },
            {
                "name": "embed:v2",
                "aliases": [],
                "state": "asleep",
                "engine": None,
                "wanted": [0, 2],
                "scaling": "The load asks for 0 replicas (nothing runs or waits); 0 to 2 may run.",
                "replicas": {},
            },
        ],
        "events": [
            {"at": now - 2, "text": "Replica c0 was lost: its process ended suddenly", "is_bad": True,
             "model": "meta-llama/Llama-3.3-70B-Instruct"},
            {"at": now - 60, "text": "Replica d4 joined", "is_bad": False, "model": "demo"},
        ],
        "departures": [
            {"at": now - 2, "replica_id": "c0", "node": "gpu-node-2", "lived_s": 7260.0, "cause": "died",
             "is_failure": True, "why": "its process ended suddenly: it was killed, or crashed",
             "model": "meta-llama/Llama-3.3-70B-Instruct"},
            {"at": now - 300, "replica_id": "e7", "node": None, "lived_s": 42.0, "cause": "scaled down",
             "is_failure": False, "why": "autoscaling removed it", "model": "demo"},
        ],
        "history": {
            "num_routers": 2, "span_s": 900, "totals": totals, "points": points,
            "latency": {"60": latency(1), "900": latency(2)},
        },
    }  # fmt: skip


def events() -> str:
    """The stream's text."""
    return f"data: {json.dumps(state())}\n\n"
