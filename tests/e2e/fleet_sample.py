"""A fleet that has everything the page can show: what `/rayline/events` would send of it."""

import itertools
import json
import math
import time
from typing import Any

from deployments.api.openai.batches import batch_object
from deployments.api.overview_routes import AdapterStates, OwnedBatches
from deployments.api.usage_routes import KeyUsage, UsageReport
from deployments.batches.line_usage import TokenUsage
from deployments.batches.records import Batch, BatchRecord, BatchState, BatchStatus, LineFault

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
        "num_adapters": 70,
        "adapter_faults": {},
    }
    engine = {"device": "cuda:0", "dtype": "bfloat16", "backend": "kernels", "max_seq_len": 131_072, "num_slots": 1}
    return {
        "at": now,
        "router_id": "k3x9q2pz",
        "router": {**totals, "num_live": 200},
        "batches": {"num_unfinished": 2},
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


def usage(num_keys: int) -> dict[str, Any]:
    """What `/rayline/usage?by=period` answers: two models by each key, some refusals, and requests without a key."""
    lines = [
        {"day": None, "key": f"team-{n:03}", "model": model, "requests": n, "prompt_tokens": 1000 * n,
         "cached_tokens": 400 * n, "output_tokens": 100 * n + place, "refusals": {}}
        for n in range(num_keys) for place, model in enumerate(("chat", "embed:v2"))
    ]  # fmt: skip
    refusals = {"rate_limit_exceeded": 31, "insufficient_quota": 4}
    lines.append({"day": None, "key": "", "model": "", "requests": 0, "refusals": refusals})
    renews = {"tokens_per_day": "2030-02-01T00:00:00Z", "tokens_per_month": "2030-03-01T00:00:00Z"}
    keys = [
        {"key": f"team-{n:03}", "role": "admin" if n == 0 else "user", "models": None,
         "expires_at": "2030-01-31T00:00:00Z" if n % 2 else None,
         "budgets": {name: {"limit": 1000, "used": 2 * n, "left": max(0, 1000 - 2 * n), "renews_at": at}
                     for name, at in renews.items() if n}}
        for n in range(num_keys)
    ]  # fmt: skip
    total = {
        "requests": 1234,
        "prompt_tokens": 5_000_000,
        "cached_tokens": 7,
        "output_tokens": 99,
        "refusals": refusals,
    }
    report = {"first_day": "2030-01-01", "last_day": "2030-01-31", "data": lines,
              "total": {**total, "refusals": refusals}, "keys": keys}  # fmt: skip
    return UsageReport.model_validate(report).model_dump(mode="json")


def own_usage(role: str = "admin") -> dict[str, Any]:
    """What `/v1/usage` answers."""
    used = {"requests": 12, "prompt_tokens": 3400, "cached_tokens": 1200, "output_tokens": 560}
    chat = {**used, "refusals": {"insufficient_quota": 3}}
    days = {"first_day": "2030-01-01", "last_day": "2030-01-31", "models": {"chat": chat, "embed:v2": used}}
    day = {"limit": 10_000, "used": 7_500, "left": 2_500, "renews_at": "2030-02-01T00:00:00Z"}
    found = {
        "key": "team-000", "role": role, "models": None, "expires_at": None, "budgets": {"tokens_per_day": day},
        "today": {**chat, **days}, "this_month": {**chat, **days, "requests": 40_000},
    }  # fmt: skip
    return KeyUsage.model_validate(found).model_dump(mode="json")


def batches(*keys: str) -> dict[str, Any]:
    """A batch of each of these keys, in another state each."""
    now = int(time.time())
    found = []
    for n, (key, status) in enumerate(zip(keys, itertools.cycle(("in_progress", "completed", "failed", "validating")))):
        record = BatchRecord(f"batch_{n:028}", key, "/v1/responses", "file-x", 1, "24h", now - n, now + 86_400)
        faults = (LineFault("invalid_json_line", "The line is not valid JSON", 3),) if status == "failed" else ()
        state = BatchState(BatchStatus(status), 1000, 370, 5, TokenUsage(1_000_000, 10, 2345), "chat", faults)
        found.append({"key": key, **batch_object(Batch(record, state))})
    return OwnedBatches.model_validate({"data": found, "has_more": False}).model_dump(mode="json")


def adapters(num: int) -> dict[str, Any]:
    """What `/rayline/adapters` answers: adapters of the first model, of which every third is held."""
    found = [
        {"name": f"adapter-{n}", "model": "meta-llama/Llama-3.3-70B-Instruct", "created": 1_800_000_000 + n,
         "source": ("configured", "folder")[n % 2], "path": f"/srv/adapters/{n}/" + 40 * "x",
         "held_by": ["a81kfj20"] * (n % 3 == 0)}
        for n in range(num)
    ]  # fmt: skip
    faults = {"broken": "/srv/adapters/broken/adapter_model.safetensors cannot be read"}
    return AdapterStates.model_validate({"data": found, "faults": faults}).model_dump(mode="json")


def events() -> str:
    """The stream's text."""
    return f"data: {json.dumps(state())}\n\n"
