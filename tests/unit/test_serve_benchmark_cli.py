"""The load generator's workloads, command line, tables and plots."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from scripted_server import Answer, ScriptedServer, tokens
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from typer.testing import CliRunner

from deployments.bench.command import app
from deployments.bench.plot import INK, PALETTE
from deployments.bench.prompts import BodyBuilder, TokenSource
from deployments.bench.workload import (
    BLOCK_TOKENS,
    LengthRange,
    PlannedRequest,
    TraceFormat,
    random_workload,
    trace_workload,
    with_arrivals,
)

ROOT = Path(__file__).parents[2]
MOONCAKE = [
    {"timestamp": 1000, "input_length": 1100, "output_length": 50, "hash_ids": [5, 6, 7]},
    {"timestamp": 3000, "input_length": 1030, "output_length": 9, "hash_ids": [5, 6, 8]},
    {"timestamp": 2000, "input_length": 300, "output_length": 4, "hash_ids": [9]},
    {"timestamp": 4000, "input_length": 1024, "output_length": 4, "hash_ids": [5, 6]},
]


@pytest.fixture
def mooncake(tmp_path: Path) -> Path:
    path = tmp_path / "mooncake.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in MOONCAKE))
    return path


@pytest.fixture
def bpe(tmp_path: Path) -> Path:
    """A folder with a tokenizer as Llama's and Qwen's are, trained on a list of words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    words = (ROOT / "demo" / "words.txt").read_text().split()
    tokenizer.train_from_iterator([" ".join(words[i : i + 50] * 5) for i in range(0, len(words), 50)], trainer)
    (tmp_path / "bpe").mkdir()
    tokenizer.save(str(tmp_path / "bpe" / "tokenizer.json"))
    return tmp_path / "bpe"


class TestWorkload:
    def test_arrivals_have_the_rate_and_the_burstiness_asked_for(self):
        """Gamma-distributed gaps with shape b vary by 1/sqrt(b) of their mean; b = 1 is Poisson."""
        requests = random_workload(20_000, LengthRange(1, 9), LengthRange(5, 5), seed=0)
        assert {r.num_input_tokens for r in requests} == set(range(1, 10))
        for burstiness in (0.25, 1.0, 4.0):
            arrivals = [r.arrival_s for r in with_arrivals(requests, 50.0, burstiness, seed=3)]
            assert arrivals[-1] == pytest.approx(20_000 / 50)
            gaps = np.diff(arrivals)
            assert gaps.min() >= 0
            assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)
        assert with_arrivals(requests, 50.0, 1.0, seed=3) == with_arrivals(requests, 50.0, 1.0, seed=3)

    def test_a_mooncake_trace_keeps_what_prompts_share(self, mooncake):
        requests = trace_workload(mooncake, TraceFormat.MOONCAKE, speed=2.0)
        assert [r.arrival_s for r in requests] == [0.0, 0.5, 1.0, 1.5]
        assert [r.num_input_tokens for r in requests] == [1100, 300, 1030, 1024]
        builder = BodyBuilder(TokenSource.ids(0, 31_999), is_chat=False, model="m", seed=1, options={})
        prompts = [json.loads(builder.body(request))["prompt"] for request in requests]
        assert [len(prompt) for prompt in prompts] == [1100, 300, 1030, 1024]
        assert prompts[0][: 2 * BLOCK_TOKENS] == prompts[2][: 2 * BLOCK_TOKENS] == prompts[3]
        assert prompts[0][2 * BLOCK_TOKENS :][:6] != prompts[2][2 * BLOCK_TOKENS :]
        assert prompts[1][:16] != prompts[0][:16]
        other = BodyBuilder(TokenSource.ids(0, 31_999), is_chat=False, model="m", seed=2, options={})
        assert json.loads(other.body(requests[3]))["prompt"][:16] != prompts[3][:16]

    def test_cut_prompts_share_what_is_left_of_them(self, mooncake):
        requests = trace_workload(
            mooncake, TraceFormat.MOONCAKE, max_input_tokens=600, max_output_tokens=8, num_requests=2
        )
        assert [(r.num_input_tokens, r.num_output_tokens) for r in requests] == [(600, 8), (600, 8)]
        builder = BodyBuilder(TokenSource.ids(0, 99), is_chat=False, model="m", seed=1, options={})
        first, second = (json.loads(builder.body(request))["prompt"] for request in requests)
        assert first == second
        assert len(first) == 600

    def test_an_azure_trace(self, tmp_path):
        path = tmp_path / "azure.csv"
        path.write_text(
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n"
            "2023-11-16 18:15:50.9951690,396,109\n"
        )
        first, second = trace_workload(path, TraceFormat.AZURE)
        assert (first.num_input_tokens, first.num_output_tokens, first.arrival_s) == (374, 44, 0.0)
        assert second.arrival_s == pytest.approx(4.314579, abs=1e-5)

    @pytest.mark.parametrize(
        ("text", "problem"),
        [("{}", "request 1 .*'hash_ids'"), ("", "empty"), (json.dumps({**MOONCAKE[0], "hash_ids": [1]}), "too few")],
    )
    def test_a_file_that_is_no_trace(self, tmp_path, text, problem):
        path = tmp_path / "x.jsonl"
        path.write_text(text)
        with pytest.raises(ValueError, match=problem):
            trace_workload(path, TraceFormat.MOONCAKE)

    @pytest.mark.parametrize("separator", [" ", ""])
    def test_words_are_as_many_tokens_as_asked_for(self, separator, bpe):
        directory = bpe if separator else ROOT / "configs" / "demo"
        source = TokenSource.words(directory)
        assert source.separator == separator
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        for is_chat in (False, True):
            body = BodyBuilder(source, is_chat=is_chat, model="m", seed=0, options={"top_k": 1}).body(
                PlannedRequest(0, 1000, 7)
            )
            document = json.loads(body)
            text = document["messages"][0]["content"] if is_chat else document["prompt"]
            assert len(tokenizer.encode(text, add_special_tokens=False).ids) == pytest.approx(1000, abs=10)
            assert document["max_completion_tokens" if is_chat else "max_tokens"] == 7
            assert document["top_k"] == 1
        with pytest.raises(ValueError, match=r"no tokenizer\.json"):
            TokenSource.words(ROOT)


def invoke(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


class TestCommandLine:
    def test_run_writes_a_result_that_has_no_key_in_it(self, tmp_path, monkeypatch):
        monkeypatch.setenv("BENCH_KEY", "sk-secret")
        out = tmp_path / "a" / "result.json"
        with ScriptedServer(lambda _: tokens(5, gap_s=0.02)) as server:
            output = invoke(
                "run", "--url", server.url, "--model", "m", "--concurrency", 2, "--num-requests", 6, "--goodput",
                "ttft:60000", "--api-key-env", "BENCH_KEY", "--output-tokens", 5, "--out", out, "--save-requests",
            )  # fmt: skip
        assert "6 completed, 0 refused, 0 failed" in output
        document = json.loads(out.read_text())
        assert len(server.seen) == 7, "six and a warm-up"
        assert server.seen[0].body["prompt"] not in [seen.body["prompt"] for seen in server.seen[1:]]
        assert server.seen[0].headers["authorization"] == "Bearer sk-secret"
        assert "sk-secret" not in out.read_text()
        assert document["total_output_tokens"] == 30
        assert document["request_goodput"] == document["request_throughput"] > 0
        assert document["itl_ms"]["p50"] > 5, "the server waits 20 ms between tokens"
        assert len(document["requests"]) == 6
        assert document["arguments"]["input_tokens"] == "512"

    def test_sweep_table_and_plot(self, tmp_path):
        def script(body: dict) -> Answer:
            return tokens(body["max_tokens"], gap_s=0.002)

        with ScriptedServer(script) as server:
            for label in ("one", "two"):
                invoke(
                    "sweep", "--url", server.url, "--model", "m", "--rates", "20,40,80", "--duration-s", 0.5, "--label",
                    label, "--output-tokens", 4, "--input-tokens", "4-16", "--out", tmp_path / label, "--warmup", 0,
                )  # fmt: skip
        prompts = [tuple(seen.body["prompt"]) for seen in server.seen[:70]]
        assert len(set(prompts)) == 70, "no load finds the prompts of the one before in a prefix cache"
        files = sorted(tmp_path.glob("*/*.json"))
        assert [file.name for file in files[:3]] == ["one-rate-20.json", "one-rate-40.json", "one-rate-80.json"]
        rows = invoke("table", *files, "--markdown").splitlines()
        assert len(rows) == 8
        assert rows[2].startswith("| one | 20/s | ")
        assert invoke("table", *files).count("one") == 3
        picture = tmp_path / "latency.png"
        invoke("plot", *files, "--out", picture, "--title", "Latency")
        width, height = (int.from_bytes(picture.read_bytes()[i : i + 4], "big") for i in (16, 20))
        assert (width, height) == (2100, 640)
        invoke("plot", *files, "--out", tmp_path / "latency.svg")
        svg = (tmp_path / "latency.svg").read_text()
        assert all(text in svg for text in ("one, p50", "two, p99", "Time to first token, ms", INK))

    def test_ctrl_c_prints_what_has_been_measured(self, tmp_path):
        out = tmp_path / "result.json"
        with ScriptedServer(lambda _: tokens(2, gap_s=0.05)) as server:
            command = [sys.executable, "-m", "deployments.bench", "run", "--url", server.url, "--model", "m", "--out",
                       str(out), "--concurrency", "2", "--num-requests", "5000", "--processes", "2"]  # fmt: skip
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, cwd=ROOT,
                # What a shell starts in the background ignores Ctrl-C, this test run perhaps, and so do its children.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )  # fmt: skip
            deadline = time.monotonic() + 60
            while len(server.seen) < 20 and time.monotonic() < deadline:
                time.sleep(0.05)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of the group
            output, _ = process.communicate(timeout=30)
        assert process.returncode == 130, output
        assert "interrupted" in output
        assert "Traceback" not in output
        document = json.loads(out.read_text())
        assert document["interrupted"] is True
        assert 10 <= document["completed"] < 5000
        assert document["ttft_ms"]["p50"] > 0

    @pytest.mark.parametrize(
        ("arguments", "problem"),
        [
            ([], "exactly one of --concurrency, --rate and --trace (none given)"),
            (["--rate", 1, "--concurrency", 2], "--concurrency and --rate given"),
            (["--rate", -1], "--rate -1: must be above 0"),
            (["--rate", 1, "--input-tokens", "9-3"], "--input-tokens '9-3'"),
            (["--rate", 1, "--token-ids", "5"], "--token-ids '5'"),
            (["--rate", 1, "--goodput", "x:1"], "--goodput 'x:1'"),
            (["--rate", 1, "--extra-body", "[]"], "--extra-body"),
            (["--rate", 1, "--endpoint", "chat"], "give --tokenizer DIR"),
            (["--concurrency", 1, "--duration-s", 3], "--duration-s: only with --rate"),
            (["--trace", __file__], "--trace-format"),
            (["--trace", __file__, "--trace-format", "mooncake"], "request 1 does not read as --trace-format mooncake"),
            (["--rate", 1, "--url", "http://127.0.0.1:1/v1"], "is the server running?"),
        ],
    )
    def test_bad_arguments_are_answered_with_what_to_give(self, arguments, problem):
        with ScriptedServer(lambda _: tokens(1)) as server:
            output = invoke("run", "--model", "m", "--url", server.url, *arguments, code=2)
        assert problem in " ".join(output.split())
        assert not server.seen

    @pytest.mark.parametrize(
        ("status", "hint"),
        [("400 Bad Request", "--token-ids"), ("401 Unauthorized", "OPENAI_API_KEY"), ("404 Not Found", "/v1/models")],
    )
    def test_a_server_that_refuses_the_first_request_ends_the_run(self, status, hint):
        with ScriptedServer(lambda _: Answer([(0, b'{"error": {"message": "no such thing"}}')], status)) as server:
            output = invoke("run", "--model", "m", "--url", server.url, "--rate", 5, "--warmup", 3, code=2)
        assert "no such thing" in output
        assert hint in output
        assert len(server.seen) == 1

    def test_what_is_no_result_and_what_has_no_common_axis(self, tmp_path):
        assert "not a result" in invoke("table", __file__, code=2)
        with ScriptedServer(lambda _: tokens(1)) as server:
            for name, value in (("--rate", 50), ("--concurrency", 1)):
                invoke("run", "--url", server.url, "--model", "m", name, value, "--num-requests", 2, "--out",
                       tmp_path / f"{name}.json")  # fmt: skip
        files = sorted(tmp_path.glob("*.json"))
        assert "plot them apart" in invoke("plot", *files, "--out", tmp_path / "x.png", code=2)


def test_plots_read_on_light_and_on_dark_pages():
    """WCAG 2: lines and large text need a contrast of 3 to 1; grounds are GitHub's."""

    def luminance(color: str) -> float:
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for color in (INK, *PALETTE):
        for ground in ("#ffffff", "#0d1117"):
            low, high = sorted((luminance(color), luminance(ground)))
            assert (high + 0.05) / (low + 0.05) >= (4 if color == INK else 3), (color, ground)
    assert all(a != b for a, b in pairwise(PALETTE))
