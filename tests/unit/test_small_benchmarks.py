"""Benchmarks behind single decisions: they run, and say what the decision rests on."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.pipeline_sim import loads, simulate

ROOT = Path(__file__).parents[2]


def rows_of(module: str, *arguments: str) -> list[dict]:
    run = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_more_tokens_of_newcomers_in_a_step_wait_less_and_make_longer_gaps():
    few, many, *_ = rows_of("benchmarks.newcomers", "--most", "512", "2048")
    assert many["ttft_p99_ms"] < 0.9 * few["ttft_p99_ms"]
    assert many["output_tok_s"] > few["output_tok_s"]
    assert few["gap_p99_ms"] < many["gap_p99_ms"] < 4 * few["gap_p99_ms"]


def test_threads_that_take_turns_sooner_make_shorter_steps():
    """In turn and for seconds, and with intervals so far apart that a busy machine does not hide the difference."""
    later, sooner = rows_of(
        "benchmarks.interpreter_share", "--intervals-ms", "50", "0.2", "--steps", "1", "--seconds", "1", "--rounds", "3"
    )
    assert sooner["ms_per_step"] < later["ms_per_step"]


def test_small_requests_wait_less_where_they_may_pass_and_large_ones_a_bounded_time_more():
    in_order, passing = rows_of("benchmarks.large_requests", "--shares", "0", "1", "--seconds", "40")
    assert passing["small_ttft_p99_s"] < 0.6 * in_order["small_ttft_p99_s"]
    assert in_order["large_ttft_max_s"] < passing["large_ttft_max_s"] < 3 * in_order["large_ttft_max_s"]


def test_the_share_of_the_host_of_a_step_is_measured():
    rows = rows_of("benchmarks.host_step", "--rows", "8", "--long", "2000")
    assert len(rows) == 3 + 4
    assert all(value > 0 for row in rows for name, value in row.items() if name != "measurement")


def test_groups_of_layers_hold_no_more_than_their_windows():
    rows = {row["model"]: row for row in rows_of("benchmarks.page_groups", "--tokens", "8192", "--step", "1024")}
    assert rows["llama-3.1-8b"]["while decoding"] == 1
    assert 0.5 < rows["gpt-oss-20b"]["while decoding"] < 0.53
    assert 1 / 6 < rows["gemma-3-270m"]["while decoding"] < 0.25


def test_stages_of_a_pipeline_stand_idle_where_steps_differ():
    """With as many groups as stages hardly at all, unless some steps are far larger than others."""
    idle = {
        (num_groups, name): simulate(4, num_groups, 256, chunk, seconds=5).idle
        for num_groups in (1, 4)
        for name, chunk in loads(512).items()
    }
    assert all(0.74 < idle[1, name] < 0.76 for name in loads(512)), "a single step is in one stage at a time"
    assert idle[4, "decodes"] < 0.02
    assert idle[4, "prompts in every step"] < 0.02
    assert 0.3 < idle[4, "prompts in some steps"] < 0.6
