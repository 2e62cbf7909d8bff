"""All parts of the scaling benchmark, shortened, on the fleet of the session."""

import json
from pathlib import Path

import pytest

from benchmarks.scaling import ScalingRun, parse
from chaos.fleet import Fleet


@pytest.mark.timeout(180)
def test_all_parts_run_with_emulated_engines(fleet: Fleet, tmp_path: Path):
    trace = tmp_path / "trace.jsonl"
    rows = [{"timestamp": 100 * i, "input_length": 600, "output_length": 4, "hash_ids": [0, i]} for i in range(400)]
    trace.write_text("\n".join(map(json.dumps, rows)))
    results = tmp_path / "scaling.jsonl"
    arguments = [
        "--emulated", "--emulated-tokens-per-s", 50, "--counts", fleet.num_replicas, "--streams", 4, "--requests", 1,
        "--lengths", "8-16", "--seconds", 1, "--fault-seconds", 4, "--kill-every-s", 1, "--clients", 1,
        "--trace", trace, "--loads", 0.6, "--policies", "cost", "--results", results,
    ]  # fmt: skip
    ScalingRun(parse([str(word) for word in arguments]), fleet).run()
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    throughput, routed, faults, autoscaling = rows
    assert [row["part"] for row in rows] == ["throughput", "trace", "faults", "autoscaling"]
    assert (throughput["replicas"], throughput["routers"]) == (3, 2)
    assert throughput["output_tokens_per_s"] > 0
    assert set(throughput["cores"]) >= {"routers", "replicas"}
    assert routed["hit_rate"] > 0.2, "every prompt begins with the same block"
    assert routed["predicted"]["hit_rate"] > 0.2
    assert faults["killed"] >= 1
    assert faults["lost"] == 0
    assert autoscaling["failed"] == autoscaling["refused"] == 0
    assert autoscaling["all_serve_after_s"] >= 0
