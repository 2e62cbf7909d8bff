"""Benchmarks behind single decisions: they run, and say what the decision rests on."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def rows_of(module: str, *arguments: str) -> list[dict]:
    run = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_more_newcomers_at_once_wait_less_and_make_longer_gaps():
    one, five, *_ = rows_of("benchmarks.newcomers", "--at-once", "1", "5")
    assert five["ttft_p99_ms"] < 0.9 * one["ttft_p99_ms"]
    assert five["output_tok_s"] > one["output_tok_s"]
    assert five["gap_p99_ms"] < 2.5 * one["gap_p99_ms"]


def test_threads_that_take_turns_sooner_make_shorter_steps():
    python, ours = rows_of("benchmarks.interpreter_share", "--intervals-ms", "2", "0.2", "--steps", "10")
    assert ours["ms_per_step"] < python["ms_per_step"]
