"""The scaling benchmark from one to two replicas, on a cluster of its own with GPUs that Ray only counts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from live_server import ROOT


@pytest.mark.timeout(600)
def test_all_parts_run_with_emulated_engines(tmp_path: Path):
    trace = tmp_path / "trace.jsonl"
    rows = [{"timestamp": 100 * i, "input_length": 1100, "output_length": 4, "hash_ids": [0, i, i]} for i in range(400)]
    trace.write_text("\n".join(map(json.dumps, rows)))
    results = tmp_path / "scaling.jsonl"
    command = [
        sys.executable, "-m", "benchmarks.scaling", "--emulated", "--emulated-tokens-per-s", 50, "--counts", 1, 2,
        "--streams", 8, "--requests", 2, "--lengths", "8-16", "--seconds", 2, "--fault-seconds", 9, "--kill-every-s", 3,
        "--clients", 1, "--plain-proxy", "--trace", trace, "--loads", 0.6, "--policies", "cost", "--results", results,
    ]  # fmt: skip
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, cwd=ROOT, timeout=540, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    by_part = {part: [row for row in rows if row["part"] == part] for part in {row["part"] for row in rows}}
    one, two = by_part["throughput"]
    assert (one["replicas"], two["replicas"], two["routers"]) == (1, 2, 1)
    assert min(one["output_tokens_per_s"], two["output_tokens_per_s"]) > 0
    assert set(two["cores"]) >= {"routers", "replicas"}
    (routed,) = by_part["trace"]
    assert routed["hit_rate"] > 0.2, "every prompt begins with the same block"
    assert routed["predicted"]["hit_rate"] > 0.2
    (faults,) = by_part["faults"]
    assert faults["killed"] >= 1
    assert faults["lost"] == 0
    (autoscaling,) = by_part["autoscaling"]
    assert autoscaling["failed"] == autoscaling["refused"] == 0
    assert autoscaling["all_serve_after_s"] > 0
