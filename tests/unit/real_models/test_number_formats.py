"""`benchmarks.number_formats`, on a real model."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_a_format_is_measured_beside_float32(real_model):
    command = ["-m", "benchmarks.number_formats", "--model", str(real_model("smollm2")), "--tokens", "32"]
    done = subprocess.run(
        [sys.executable, *command, "--device", "cpu", "--formats", "bfloat16"], cwd=ROOT, capture_output=True,
        text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (row,) = map(json.loads, done.stdout.splitlines())
    assert (row["format"], row["tokens"]) == ("bfloat16", 31)
    assert 0.01 < row["mean_difference"] < 0.2, "rounding is seen, and is no more than that"
    assert row["mean_difference"] < row["max_difference"]
