"""Traces and the log of requests, with a collector that is a real HTTP server."""

import asyncio
import gzip
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from in_process import Service, ServiceFactory, emulated_config
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from ray._common.formatters import JSONFormatter

from deployments.config import AppConfig
from deployments.observe.finished_request import FinishedRequest

PROMPT = "a secret question"
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"


class Collector:
    """Takes OTLP over HTTP."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                outer.bodies.append(gzip.decompress(body) if self.headers["content-encoding"] == "gzip" else body)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}/v1/traces"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def spans(self) -> list[Span]:
        exported = [ExportTraceServiceRequest.FromString(body) for body in self.bodies]
        return [s for e in exported for r in e.resource_spans for scope in r.scope_spans for s in scope.spans]


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.server.shutdown()
    collector.server.server_close()


def traced(endpoint: str, sample_ratio: float = 1.0) -> AppConfig:
    return emulated_config(tracing={"endpoint": endpoint, "sample_ratio": sample_ratio})


async def ask(service: Service, headers: dict[str, str] | None = None, **fields):
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": 20, "ignore_eos": True, **fields}
    return await service.http.post("/v1/completions", json=body, headers=headers)


async def flush(service: Service) -> None:
    assert service.directory.tracer is not None
    # An answer is out before its engine has said goodbye.
    ending = [task for task in asyncio.all_tasks() if "Generation." in str(task.get_coro())]
    if ending:
        await asyncio.wait(ending, timeout=10)
    await asyncio.sleep(0)  # a generation is over in its task's callback, which comes behind the task
    await asyncio.to_thread(service.directory.tracer.close)


async def test_one_trace_from_http_to_engine(make_service: ServiceFactory, collector: Collector):
    service = await make_service(traced(collector.endpoint))
    answer = await ask(service, {"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01"})
    assert answer.status_code == 200
    await flush(service)
    spans = {span.name: span for span in collector.spans()}
    names = {"POST /v1/completions", "generate demo", "route", "router queue", "engine queue", "engine prefill",
             "engine decode"}  # fmt: skip
    assert set(spans) == names
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE_ID}, "the client's trace goes on"
    http, generate = spans["POST /v1/completions"], spans["generate demo"]
    assert http.parent_span_id.hex() == "b7ad6b7169203331"
    assert generate.parent_span_id == http.span_id
    assert {spans[name].parent_span_id for name in names - {http.name, generate.name}} == {generate.span_id}
    attributes = {pair.key: pair.value for pair in generate.attributes}
    assert attributes["gen_ai.usage.output_tokens"].int_value == 20
    assert attributes["gen_ai.response.finish_reasons"].array_value.values[0].string_value == "length"
    assert {pair.key: pair.value.int_value for pair in http.attributes}["http.response.status_code"] == 200
    decode = spans["engine decode"]
    assert (decode.end_time_unix_nano - decode.start_time_unix_nano) / 1e9 > 0.01, "19 tokens at 1,000 a second"
    assert http.start_time_unix_nano <= generate.start_time_unix_nano <= decode.start_time_unix_nano
    assert decode.end_time_unix_nano <= http.end_time_unix_nano
    assert not any(PROMPT.encode() in body for body in collector.bodies)


async def test_a_generation_may_be_over_after_its_http_request(
    make_service: ServiceFactory, collector: Collector, monkeypatch: pytest.MonkeyPatch
):
    service = await make_service(traced(collector.endpoint))
    tracer = service.directory.tracer
    assert tracer is not None
    request_over = tracer.request_over

    def late(request: FinishedRequest, model: str) -> None:
        assert request.span is not None
        request.span.end()
        request_over(request, model)

    monkeypatch.setattr(tracer, "request_over", late)
    await ask(service)
    await flush(service)
    assert {"generate demo", "engine decode"} <= {span.name for span in collector.spans()}


async def test_what_is_not_sampled_is_not_sent(make_service: ServiceFactory, collector: Collector):
    service = await make_service(traced(collector.endpoint, sample_ratio=0))
    await ask(service)
    await ask(service, {"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01"})
    await flush(service)
    assert {span.trace_id.hex() for span in collector.spans()} == {TRACE_ID}, "the client asked for this one"


async def test_a_refused_request_is_in_its_trace(make_service: ServiceFactory, collector: Collector):
    service = await make_service(traced(collector.endpoint))
    assert (await ask(service, max_tokens=-1)).status_code == 400
    await flush(service)
    (span,) = collector.spans()
    assert {pair.key: pair.value.int_value for pair in span.attributes}["http.response.status_code"] == 400


async def test_a_collector_that_is_not_there_harms_nothing(make_service: ServiceFactory):
    service = await make_service(traced("http://127.0.0.1:9/v1/traces"))
    assert [(await ask(service)).status_code for _ in range(3)] == [200] * 3


async def test_each_request_is_a_line_in_the_log(make_service: ServiceFactory, serve_log):
    service = await make_service()
    answer = await ask(service, {"x-request-id": "mine-1"})
    async with asyncio.timeout(5):
        while not (lines := [record for record in serve_log if "over:" in record.getMessage()]):
            await asyncio.sleep(0.01)
    assert f"request {answer.json()['id'].removeprefix('cmpl-')} over" in lines[0].getMessage()
    logged = json.loads(JSONFormatter().format(lines[0]))
    assert logged["request_id"] == "mine-1"
    fields = logged["rayline"]
    assert (fields["outcome"], fields["num_output_tokens"]) == ("length", 20)
    assert set(fields["phases_ms"]) == {"route", "queue", "prefill", "relay", "decode"}
    assert not any(PROMPT in record.getMessage() for record in serve_log)
