"""OpenTelemetry traces: one per request, from HTTP through router and engine. Needs the extra `otel`.

Spans are made once a request has ended, from times that are measured anyway, so they delay no token. Attributes follow
OpenTelemetry's semantic conventions for HTTP and for generative AI, and never contain prompts or answers.
"""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from deployments.config import TracingConfig
from deployments.observe.finished_request import FinishedRequest
from llm.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.trace import Span

_EXPORT_TIMEOUT_S = 5


class RequestTracer:
    """Makes spans and sends them, from a thread of its own, to a collector by OTLP over HTTP.

    Args:
        config: where they go, and how many requests are traced.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """

    def __init__(self, config: TracingConfig) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        except ModuleNotFoundError as error:
            raise ConfigError(
                "tracing.endpoint needs opentelemetry-sdk and opentelemetry-exporter-otlp-proto-http: pip install them"
            ) from error
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(config.sample_ratio)),
            resource=Resource.create({"service.name": config.service_name}),
            shutdown_on_exit=False,
        )
        exporter = OTLPSpanExporter(endpoint=config.endpoint, timeout=_EXPORT_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("rayline")
        self._epoch_ns = time.time_ns() - time.monotonic_ns()

    def begin(self, scope: Mapping[str, Any]) -> "Span":
        """Open the span of an HTTP request (its ASGI scope), in the trace that its `traceparent` names, if any."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        attributes = {"http.request.method": scope["method"], "url.path": scope["path"]}
        return self._tracer.start_span(
            f"{scope['method']} {scope['path']}"[:200],
            TraceContextTextMapPropagator().extract(headers),
            SpanKind.SERVER,
            attributes,
        )

    def request_over(self, request: FinishedRequest, model: str) -> None:
        """Add what a generation of this model spent its time on to its HTTP request's span."""
        parent = request.span
        timeline = request.timeline
        # The HTTP request may be over before: it needs only the last token, not the engine's goodbye.
        if parent is None or not parent.get_span_context().trace_flags.sampled:
            return
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": "chat",
            "gen_ai.request.model": model,
            "gen_ai.response.id": request.generation_id,
            "gen_ai.usage.input_tokens": request.num_prompt_tokens,
            "gen_ai.usage.output_tokens": request.num_output_tokens,
            "rayline.times_moved": request.num_moves,
        }
        if request.finish_reason is not None:
            attributes["gen_ai.response.finish_reasons"] = [request.finish_reason]
        if request.error_type is not None:
            attributes["error.type"] = request.error_type
        last = timeline.ended_at or time.monotonic()
        span = self._span(f"generate {model}", parent, timeline.received_at, last, attributes)
        self._span("route", span, timeline.received_at, timeline.started_at)
        if timeline.placed_at is not None:
            self._span("router queue", span, timeline.started_at, timeline.placed_at)
        if timeline.placed_at is not None and timeline.engine_queue_s is not None:
            begun = timeline.placed_at + timeline.engine_queue_s
            self._span("engine queue", span, timeline.placed_at, begun)
            self._span("engine prefill", span, begun, begun + (timeline.engine_prefill_s or 0.0))
        if timeline.first_token_at is not None:
            self._span("engine decode", span, timeline.first_token_at, last)

    def _span(
        self, name: str, parent: "Span", start: float, end: float, attributes: dict[str, Any] | None = None
    ) -> "Span":
        """A finished span between two times of the monotonic clock."""
        from opentelemetry.trace import set_span_in_context

        span = self._tracer.start_span(
            name, set_span_in_context(parent), attributes=attributes, start_time=self._at_ns(start)
        )
        span.end(self._at_ns(max(start, end)))
        return span

    def _at_ns(self, monotonic_s: float) -> int:
        return self._epoch_ns + int(monotonic_s * 1e9)

    def close(self) -> None:
        """Send the spans that have not been sent."""
        self._provider.shutdown()
