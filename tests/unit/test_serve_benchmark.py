"""The load generator against a server on a real socket whose times are known, and its definitions on exact ones."""

import asyncio
import json
import time

import numpy as np
import pytest
from scripted_server import DONE, Answer, ScriptedServer, chunk, event, tokens, usage

from benchmarks.serve_overhead import measure
from deployments.bench.client import Client, Target, TargetError
from deployments.bench.load import LoadSpec, run_load
from deployments.bench.prompts import TokenSource
from deployments.bench.records import RequestRecord, distribution, is_good, parse_goodput, summarize
from deployments.bench.report import make_result
from deployments.bench.stream import AnswerReader
from deployments.bench.workload import PlannedRequest, with_arrivals


def read(*pieces: tuple[float, bytes], sent_s: float = 10.0) -> RequestRecord:
    """The record of an answer whose bytes came at these times."""
    record, reader = RequestRecord(index=0, sent_s=sent_s), AnswerReader()
    for received_at, data in pieces:
        reader.feed(data, received_at)
    reader.complete(record)
    return record


def send(url: str, num: int = 1, *, timeout_s: float = 30, api_key: str | None = None) -> list[RequestRecord]:
    """Records of requests sent one after the other by one client."""

    async def run() -> list[RequestRecord]:
        target = Target(url, "/chat/completions", api_key)
        client = Client(target, target.resolve(), timeout_s)
        try:
            return [await client.send(i, b'{"max_tokens": 3}', 5) for i in range(num)]
        finally:
            client.close()

    return asyncio.run(run())


def load_spec(url: str, num_requests: int, *, concurrency: int = 1, rate: float | None = None) -> LoadSpec:
    target = Target(url, "/completions")
    requests = [PlannedRequest(i, 8, 4) for i in range(num_requests)]
    return LoadSpec(
        target=target, address=target.resolve(), timeout_s=30, source=TokenSource.ids(0, 99), is_chat=False, model="m",
        seed=0, options={"temperature": 0.0}, concurrency=concurrency,
        requests=tuple(requests if rate is None else with_arrivals(requests, rate, 1.0, seed=0)),
    )  # fmt: skip


class TestDefinitions:
    def test_times_of_one_answer(self):
        """Five tokens in three chunks: TTFT and ITL are of chunks, TPOT is of tokens, usage ends nothing."""
        record = read(
            (10.1, chunk("", role="assistant")),
            (10.5, chunk("one")),
            (10.7, chunk("two three")),
            (11.3, chunk("four five", "length")),
            (15.0, usage(9, 5) + DONE),
        )
        assert record.error_kind is None
        assert record.ttft_s == pytest.approx(0.5)
        assert record.gaps_s == pytest.approx([0.2, 0.6])
        assert record.latency_s == pytest.approx(1.3)
        assert (record.num_input_tokens, record.num_output_tokens) == (9, 5)
        assert record.tpot_s == pytest.approx((1.3 - 0.5) / 4)

    def test_a_closing_without_text_ends_the_latency_and_is_no_chunk(self):
        record = read((10.5, chunk("a")), (10.6, chunk("b")), (10.9, chunk(None, "stop") + DONE))
        assert record.gaps_s == pytest.approx([0.1])
        assert record.latency_s == pytest.approx(0.9)
        assert (record.num_output_tokens, record.is_counted_by_server) == (2, False)

    def test_an_answer_of_one_token_without_text(self):
        record = read((10.1, chunk("", role="assistant")), (10.4, chunk("", "stop") + usage(9, 1) + DONE))
        assert record.error_kind is None
        assert record.ttft_s == record.latency_s == pytest.approx(0.4)
        assert record.tpot_s is None

    def test_a_chunk_in_the_middle_counts_without_text_too(self):
        """Part of a character, as vLLM sends it."""
        completion = [event({"choices": [{"index": 0, "text": text, "finish_reason": None}]}) for text in ("", "é")]
        record = read((10.1, completion[0]), (10.3, completion[1]), (10.3, DONE))
        assert record.ttft_s == pytest.approx(0.1)
        assert record.gaps_s == pytest.approx([0.2])

    @pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
    def test_wherever_the_bytes_are_cut(self, line_end):
        whole = b": ping\n\n" + chunk("a") + chunk("bé") + chunk(None, "stop") + usage(3, 2) + DONE
        whole = whole.replace(b"\n", line_end)
        for at in range(1, len(whole)):
            record = read((10.5, whole[:at]), (10.5, whole[at:]))
            assert (record.error_kind, record.num_output_tokens, record.gaps_s) == (None, 2, [0.0]), whole[:at]

    @pytest.mark.parametrize(
        ("data", "kind"),
        [
            (chunk("a"), "stream cut"),
            (b"", "stream cut"),
            (DONE, "no tokens"),
            (b"data: {oops}\n\n" + DONE, "invalid event"),
            (
                chunk("a") + event({"error": {"message": "gone", "code": "replica_died"}}) + DONE,
                "stream error replica_died",
            ),
            (b'{"choices": [{"text": "all at once"}]}', "not a stream"),
        ],
    )
    def test_what_is_no_whole_answer(self, data, kind):
        assert read((10.5, data)).error_kind == kind

    def test_goodput_by_hand(self):
        """Of four: one good, one late at first, one slow, one of a single token, whose TPOT is 0 as in vLLM."""
        rows = [(0.1, 1.1, 11), (0.6, 1.0, 11), (0.1, 2.1, 11), (0.2, 0.2, 1)]
        records = [
            RequestRecord(index=i, sent_s=0, ttft_s=ttft, latency_s=latency, num_output_tokens=num)
            for i, (ttft, latency, num) in enumerate(rows)
        ]
        limits = parse_goodput("ttft:500, tpot:150")
        assert [is_good(record, limits) for record in records] == [True, False, False, True]
        summary = summarize(records, 2.0, limits)
        assert summary["request_goodput"] == 1.0
        assert summary["request_throughput"] == 2.0
        assert summary["output_tokens_per_s"] == 17.0
        assert [is_good(record, parse_goodput("e2e:1100")) for record in records] == [True, True, False, True]
        for bad in ("ttft", "ttft:-1", "tbt:5", "ttft:nan"):
            with pytest.raises(ValueError, match="--goodput"):
                parse_goodput(bad)

    def test_distribution_is_numpys(self):
        """vLLM takes np.percentile, np.mean and np.std."""
        seconds = np.random.default_rng(0).exponential(size=101)
        row = distribution(seconds.tolist())
        assert row["p90"] == pytest.approx(np.percentile(seconds, 90) * 1e3, abs=1e-3)
        assert row["std"] == pytest.approx(np.std(seconds) * 1e3, abs=1e-3)
        assert distribution([]) is None


class TestClient:
    def test_times_over_a_socket(self):
        """Within what a busy machine adds, the client's times are those at which the server wrote."""
        answer = Answer([
            (0.0, chunk("", role="assistant")), (0.3, chunk("a")), (0.2, chunk("b")), (0.4, chunk("c", "length")),
            (0.3, usage(9, 6) + DONE),
        ])  # fmt: skip
        with ScriptedServer(lambda _: answer) as server:
            (record,) = send(server.url)
        (seen,) = server.seen
        written = seen.written_s
        assert record.error_kind is None
        assert record.ttft_s == pytest.approx(written[1] - record.sent_s, abs=0.05)
        assert record.gaps_s == pytest.approx(np.diff(written[1:4]).tolist(), abs=0.05)
        assert record.latency_s == pytest.approx(written[3] - record.sent_s, abs=0.05)
        assert record.tpot_s == pytest.approx((written[3] - written[1]) / 5, abs=0.02)

    def test_connections_are_used_again_and_a_stale_one_is_replaced(self):
        """A server may hang up on a kept connection as it is used: the request goes out again, on a new one."""
        with ScriptedServer(lambda _: Answer([], is_dropped=True) if len(server.seen) == 3 else tokens(2)) as server:
            records = send(server.url, 5, api_key="secret")
        assert [record.error_kind for record in records] == [None] * 5
        # The first connection only found the address.
        assert [seen.connection for seen in server.seen] == [2, 2, 2, 3, 3, 3]
        assert {seen.headers["authorization"] for seen in server.seen} == {"Bearer secret"}
        assert server.seen[0].headers[""] == "POST /v1/chat/completions HTTP/1.1"

    @pytest.mark.parametrize(
        ("answer", "kind", "example", "retry_after_s"),
        [
            (Answer([(0, b'{"error": {"message": "full"}}')], "429 Too Many Requests", {"Retry-After": "3"}),
             "HTTP 429", "full", 3.0),
            (Answer([(0, b'{"error": {"message": "full"}}')], "429 Too Many Requests", {}), "HTTP 429", "full", None),
            (Answer([(0, b"oops")], "500 Internal Server Error", {}), "HTTP 500", "oops", None),
            (Answer([(0, chunk("a"))], is_cut=True), "stream cut", "the connection ended", None),
            (Answer([], is_dropped=True), "ConnectionError", "the connection ended", None),
            (Answer([(0, chunk("a")), (5, DONE)]), "timeout", "no whole answer within 1 s", None),
        ],
    )  # fmt: skip
    def test_errors_by_kind(self, answer, kind, example, retry_after_s):
        with ScriptedServer(lambda _: answer) as server:
            (record,) = send(server.url, timeout_s=1)
        assert record.error_kind == kind
        assert record.error_example.startswith(example)
        assert record.retry_after_s == retry_after_s

    def test_a_server_that_is_gone(self):
        with ScriptedServer(lambda _: tokens(1)) as server:
            target = Target(server.url, "/completions")
            address = target.resolve()
        record = asyncio.run(Client(target, address, 5).send(0, b"{}", 1))
        assert record.error_kind == "ConnectionRefusedError"
        with pytest.raises(TargetError, match="is the server running"):
            target.resolve()
        with pytest.raises(TargetError, match="http://127"):
            Target("127.0.0.1:8000", "/completions")


class TestLoad:
    def test_a_closed_loop_keeps_its_concurrency(self):
        with ScriptedServer(lambda _: tokens(4, gap_s=0.01)) as server:
            result = run_load(load_spec(server.url, 40, concurrency=6), num_processes=2)
        assert server.most_at_once == 6
        assert [record.index for record in result.records] == list(range(40))
        assert all(record.is_completed for record in result.records)
        assert len(result.clients) == 2
        prompts = {tuple(seen.body["prompt"]) for seen in server.seen}
        assert len(prompts) == 40
        assert {(seen.body["max_tokens"], seen.body["stream"], len(seen.body["prompt"])) for seen in server.seen} == {
            (4, True, 8)
        }

    def test_an_open_loop_does_not_wait_for_answers(self):
        """60 requests in a second to a server that takes four: all are there before the first has its answer."""
        with ScriptedServer(lambda _: tokens(1, first_s=4.0)) as server:
            spec = load_spec(server.url, 60, rate=60)
            result = run_load(spec, num_processes=2)
        assert server.most_at_once == 60
        for request, record in zip(spec.requests, result.records, strict=True):
            assert record.scheduled_s == request.arrival_s
            assert record.sent_s - record.scheduled_s > -1e-3
        assert result.duration_s > 4.9

    def test_refused_requests_are_counted_apart(self):
        """Every third request is refused; in an open loop the next ones come all the same."""

        def script(_: dict) -> Answer:
            if len(server.seen) % 3 == 0:
                return Answer([(0, b'{"error": {"message": "full"}}')], "429 Too Many Requests", {"Retry-After": "9"})
            return tokens(2)

        with ScriptedServer(script) as server:
            started = time.monotonic()
            result = run_load(load_spec(server.url, 30, rate=100), num_processes=1)
            assert time.monotonic() - started < 9
        load, options = {"mode": "rate", "value": 100}, {"limits_ms": {"ttft": 9e9}, "save_requests": True}
        document = make_result(result, label="x", load=load, arguments={}, **options)
        assert (document["completed"], document["refused"], document["failed"]) == (20, 10, 0)
        assert document["errors"] == {"HTTP 429": {"count": 10, "example": "full"}}
        assert document["request_goodput"] == document["request_throughput"]
        assert len(json.loads(json.dumps(document))["requests"]) == 30
        assert document["output_tokens_counted_by"] == "usage"

    def test_a_closed_loop_waits_as_long_as_it_was_told(self):
        refusal = Answer([(0, b"{}")], "429 Too Many Requests", {"Retry-After": "0.3"})
        with ScriptedServer(lambda _: refusal) as server:
            run_load(load_spec(server.url, 3), num_processes=1)
        assert np.diff([seen.received_s for seen in server.seen]).min() > 0.29

    def test_a_client_that_cannot_keep_up_is_said(self):
        record = RequestRecord(index=0, sent_s=0.5, scheduled_s=0.2, ttft_s=0.1, latency_s=0.2, num_output_tokens=2)
        with ScriptedServer(lambda _: tokens(1)) as server:
            result = run_load(load_spec(server.url, 1), num_processes=1)
        result.records = [record]
        options = {"label": "x", "arguments": {}, "limits_ms": {}, "save_requests": False}
        late = make_result(result, load={"mode": "rate", "value": 1}, **options)
        assert late["client"]["lateness_ms"]["p50"] == pytest.approx(300)
        assert "sent late" in late["warnings"][0]
        assert "--processes" in late["warnings"][-1]


def test_what_the_client_adds(capsys):
    """Figures for the reader, bounds for a busy machine. The full load: python -m benchmarks.serve_overhead."""
    row = measure("rayline", num_streams=50, tokens_per_s=50, num_tokens=100)
    with capsys.disabled():
        print(f"\n{json.dumps(row)}")
    assert abs(float(row["overhead_tpot"].rstrip("%"))) < 20
    assert row["client_tokens_per_s"] > 0.5 * row["server_tokens_per_s"]
    assert row["cpu_us_per_token"] < 500
