"""The engine's benchmark at a thirty-second of its size: every row runs and the table reads it."""

import json
import subprocess
import sys

import pytest

from benchmarks.engine_rows import LeastReads, comparable_rows
from benchmarks.engine_table import TARGETS, table

TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 100,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def command(tmp_path) -> list[str]:
    (tmp_path / "qwen3-0.6b").mkdir()
    (tmp_path / "qwen3-0.6b" / "config.json").write_text(json.dumps(TINY))
    return [sys.executable, "-m", "benchmarks.engine", "--model", str(tmp_path / "qwen3-0.6b"), "--random-weights"]


def test_every_row_is_measured_and_set_beside_the_peers(command, tmp_path):
    out = tmp_path / "rows.jsonl"
    subprocess.run([*command, "--scale", "32", "--out", str(out)], check=True, capture_output=True, timeout=250)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    names = {row["name"] for row in rows}
    assert all(name in names or name.startswith(("fp8", "deterministic")) for name in TARGETS), "but for a GPU's own"
    assert not any("error" in row for row in rows)
    assert all(row["read_gb_s"] >= 0 for row in rows if row["name"].startswith(("mixed", "decode")))

    slower = [{**row, "engine": "peer", "output_tok_s": row.get("output_tok_s", 0) // 2} for row in rows]
    mixed = next(line for line in table(rows, slower).splitlines() if line.startswith("| mixed"))
    assert "| 2.0" in mixed
    assert mixed.endswith("| ≥ 1.25 of vLLM's | met |")


def test_a_profile_says_where_the_time_of_a_step_goes(command):
    command += ["--scale", "32", "--profile", "64", "--context", "640"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=250).stdout
    for phase in ("schedule", "launch", "apply", "process", "waiting"):
        assert f"host: {phase}" in printed


def test_rows_say_what_had_to_be_read():
    """A row that reads faster than the memory can is wrong: 256 steps of 1 GB, and 8 contexts of 256 MB on average."""
    rows = comparable_rows(lambda _, output_lens: sum(output_lens) / 1000, reads=LeastReads(10**9, 10**6))
    decode = next(row for row in rows if row.name == "decode batch 8").measure()
    assert decode["ms_per_step"] == 8
    assert decode["read_gb_s"] == pytest.approx((1 + 8 * 0.256) / 0.008)
