"""The load generator against the real thing: what it counts is what the server counts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from live_server import ROOT, Server

DEMO = ROOT / "configs" / "demo"


@pytest.fixture(autouse=True)
def healthy_afterwards(server: Server):
    yield
    server.check_healthy()


def bench(server: Server, out: Path, *arguments: object) -> dict:
    """The result of a run by command line, which must end well."""
    command = [sys.executable, "-m", "deployments.bench", "run", "--url", f"{server.url}/v1", "--model", "demo"]
    done = subprocess.run(
        [*command, "--out", str(out), *(str(argument) for argument in arguments)],
        capture_output=True, text=True, cwd=ROOT, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


def num_cached_prompt_tokens(server: Server) -> float:
    lines = server.http.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("vllm:prefix_cache_hits_total"))


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_a_closed_loop_of_text_counts_every_token(server: Server, tmp_path: Path, endpoint: str):
    result = bench(
        server, tmp_path / "result.json", "--endpoint", endpoint, "--tokenizer", DEMO, "--concurrency", 4,
        "--num-requests", 12, "--input-tokens", "40-80", "--output-tokens", 20, "--ignore-eos", "--save-requests",
    )  # fmt: skip
    assert (result["completed"], result["refused"], result["failed"]) == (12, 0, 0)
    assert result["output_tokens_counted_by"] == "usage"
    assert result["total_output_tokens"] == 12 * 20
    lengths = [request["num_input_tokens"] for request in result["requests"]]
    assert all(40 < length < 90 for length in lengths), "the prompt and a few control tokens"
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
        assert 0 <= result[name]["p50"] <= result[name]["p99"] <= result[name]["max"]
    assert result["e2e_ms"]["mean"] == pytest.approx(
        result["ttft_ms"]["mean"] + 19 * result["tpot_ms"]["mean"], rel=0.01
    )


def test_an_open_loop_of_token_ids(server: Server, tmp_path: Path):
    result = bench(
        server, tmp_path / "result.json", "--rate", 10, "--duration-s", 2, "--token-ids", "97-122", "--processes", 2,
        "--input-tokens", 64, "--output-tokens", 8, "--ignore-eos", "--goodput", "ttft:60000,tpot:60000",
    )  # fmt: skip
    assert result["completed"] == 20
    assert result["total_input_tokens"] == 20 * 64, "ids are counted as they are"
    assert result["total_output_tokens"] == 20 * 8
    assert result["request_goodput"] == result["request_throughput"]
    assert result["client"]["processes"] == 2
    assert result["client"]["lateness_ms"]["p50"] < 100


def test_a_trace_hits_the_prefix_cache_where_its_prompts_share_blocks(server: Server, tmp_path: Path):
    """Three prompts begin with the same two blocks of 512 tokens, a second apart: the later two find them cached."""
    trace = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 3000 * i, "input_length": 1100, "output_length": 4, "hash_ids": [1, 2, 10 + i]} for i in range(3)
    ]
    trace.write_text("\n".join(json.dumps(row) for row in rows))
    before = num_cached_prompt_tokens(server)
    result = bench(
        server, tmp_path / "result.json", "--trace", trace, "--trace-format", "mooncake", "--token-ids", "97-122",
        "--ignore-eos", "--warmup", 0, "--seed", 77,
    )  # fmt: skip
    assert result["completed"] == 3
    assert result["total_input_tokens"] == 3 * 1100
    server.wait_for(
        lambda: num_cached_prompt_tokens(server) - before >= 2 * 1024, what="shared blocks were not found in the cache"
    )
