"""Metrics of a router and, as they last reported, of its replicas, for Prometheus.

Names and buckets are vLLM's where the meaning is the same, so that existing boards work; ours begin with `rayline:`.
Everything is labelled `model_name`, a replica's figures with `engine` too. The same histograms and counters go to Ray's
own export (`ray.util.metrics`), which takes no colons: `vllm_time_to_first_token_seconds`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from deployments.observe.finished_request import FinishedRequest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_Kind = type[GaugeMetricFamily] | type[CounterMetricFamily]

_FIRST_TOKEN_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)  # fmt: skip
_TOKEN_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
_REQUEST_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0,
)  # fmt: skip
_HOP_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)
_LENGTH_BUCKETS = tuple(float(factor * 10**power) for power in range(6) for factor in (1, 2, 5))

_HISTOGRAMS: Mapping[str, tuple[str, tuple[float, ...]]] = {
    "vllm:time_to_first_token_seconds": ("From the request's arrival to its first token.", _FIRST_TOKEN_BUCKETS),
    "vllm:e2e_request_latency_seconds": ("From the request's arrival to its last token.", _REQUEST_BUCKETS),
    "vllm:request_time_per_output_token_seconds": ("Mean time between a request's tokens.", _TOKEN_BUCKETS),
    "vllm:request_queue_time_seconds": ("Waiting, in the router and in the engine.", _FIRST_TOKEN_BUCKETS),
    "vllm:request_prefill_time_seconds": (
        "From its first step to the first token.",
        _FIRST_TOKEN_BUCKETS,
    ),
    "vllm:request_decode_time_seconds": ("From the first token to the last.", _REQUEST_BUCKETS),
    "vllm:request_prompt_tokens": ("Tokens of a request's prompt.", _LENGTH_BUCKETS),
    "vllm:request_generation_tokens": ("Tokens of a request's answer.", _LENGTH_BUCKETS),
    "rayline:request_route_time_seconds": ("Parsing, tokenising and admission.", _HOP_BUCKETS),
    "rayline:request_relay_time_seconds": ("On the way to the engine, and of the first token back.", _HOP_BUCKETS),
}
_COUNTERS: Mapping[str, str] = {
    "vllm:request_success": "Requests that ended, by `finished_reason`: stop, length, abort or error.",
}


class RouterState(Protocol):
    """What the gauges are read from when Prometheus asks."""

    def snapshot(self) -> dict[str, Any]:
        """See `Router.snapshot`."""
        ...


class RouterMetrics:
    """Counts what becomes of a router's requests.

    Args:
        model: value of the label `model_name`.
        state: of the router.
        ray_export: also gives every histogram and counter to Ray's metrics.
    """

    def __init__(self, model: str, state: RouterState, *, ray_export: bool = False) -> None:
        self._model = model
        self._registry = CollectorRegistry()
        self._registry.register(_StateCollector(model, state))
        self._histograms = {
            name: Histogram(name, text, ["model_name"], buckets=buckets, registry=self._registry).labels(model)
            for name, (text, buckets) in _HISTOGRAMS.items()
        }
        self._counters = {
            name: Counter(name, text, ["model_name", "finished_reason"], registry=self._registry)
            for name, text in _COUNTERS.items()
        }
        self._export = _RayExport(model) if ray_export else None

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)

    def request_over(self, request: FinishedRequest) -> None:
        """A request has ended, in whatever way."""
        timeline = request.timeline
        reason = "error" if request.error_type else request.finish_reason or "abort"
        self._counters["vllm:request_success"].labels(self._model, reason).inc()
        if self._export is not None:
            self._export.count("vllm:request_success", finished_reason=reason)
        if request.finish_reason is None or timeline.first_token_at is None or timeline.ended_at is None:
            return
        num_output = request.num_output_tokens
        decode_s = timeline.ended_at - timeline.first_token_at
        phases = {name: duration / 1000 for name, duration in timeline.phases_ms().items()}
        values = {
            "vllm:time_to_first_token_seconds": timeline.first_token_at - timeline.received_at,
            "vllm:e2e_request_latency_seconds": timeline.ended_at - timeline.received_at,
            "vllm:request_queue_time_seconds": phases["queue"],
            "vllm:request_prefill_time_seconds": phases["prefill"],
            "vllm:request_decode_time_seconds": decode_s,
            "vllm:request_prompt_tokens": request.num_prompt_tokens,
            "vllm:request_generation_tokens": num_output,
            "rayline:request_route_time_seconds": phases["route"],
            "rayline:request_relay_time_seconds": phases["relay"],
        }
        if num_output > 1:
            values["vllm:request_time_per_output_token_seconds"] = decode_s / (num_output - 1)
        for name, value in values.items():
            self._histograms[name].observe(value)
            if self._export is not None:
                self._export.observe(name, value)


class _RayExport:
    """The same through `ray.util.metrics`, which Ray's agent on each node serves."""

    def __init__(self, model: str) -> None:
        from ray.util import metrics

        self._tags = {"model_name": model}
        self._histograms = {
            name: metrics.Histogram(_ray_name(name), text, list(buckets), ("model_name",))
            for name, (text, buckets) in _HISTOGRAMS.items()
        }
        self._counters = {
            name: metrics.Counter(_ray_name(name), text, ("model_name", "finished_reason"))
            for name, text in _COUNTERS.items()
        }

    def observe(self, name: str, value: float) -> None:
        self._histograms[name].observe(value, self._tags)

    def count(self, name: str, **tags: str) -> None:
        self._counters[name].inc(1, {**self._tags, **tags})


def _ray_name(name: str) -> str:
    return name.replace(":", "_")


class _StateCollector(Collector):
    """Gauges and counters that are kept elsewhere, read when they are asked for."""

    def __init__(self, model: str, state: RouterState) -> None:
        self._model = model
        self._state = state

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client."""
        snapshot = self._state.snapshot()
        router, replicas = snapshot["router"], snapshot["replicas"]
        own = [self._model]
        for name, text, key in _ROUTER_GAUGES:
            yield _family(GaugeMetricFamily, name, text, ["model_name"], [(own, router[key])])
        for name, text, key in _ROUTER_COUNTERS:
            yield _family(CounterMetricFamily, name, text, ["model_name"], [(own, router[key])])
        for kind, name, text, value in _REPLICA_METRICS:
            values = [([self._model, replica_id], value(stats)) for replica_id, stats in replicas.items()]
            yield _family(kind, name, text, ["model_name", "engine"], values)


def _family(kind: _Kind, name: str, text: str, labels: list[str], values: Iterable[tuple[list[str], float]]) -> Metric:
    family = kind(name, text, labels=labels)
    for label_values, value in values:
        family.add_metric(label_values, value)
    return family


_ROUTER_GAUGES = (
    ("rayline:router_live_requests", "Requests of this router that run or wait.", "num_live"),
    ("rayline:router_waiting_requests", "Requests that wait in this router for a replica with room.", "num_waiting"),
    ("rayline:router_waiting_tokens", "Tokens that these have to prefill.", "num_waiting_tokens"),
)
_ROUTER_COUNTERS = (
    ("rayline:requests", "Requests begun.", "num_requests"),
    ("rayline:requests_refused", "Requests refused with 429.", "num_refused"),
    ("rayline:failovers", "Times a request went on elsewhere after its replica failed.", "num_resumes"),
    ("rayline:moves", "Times a request went on elsewhere because its replica stalled or was taken away.", "num_moves"),
)


def _usage(stats: Mapping[str, Any]) -> float:
    return float(stats["num_used_pages"]) / max(int(stats["num_pages"]), 1)


def _field(name: str) -> Callable[[Mapping[str, Any]], float]:
    return lambda stats: float(stats[name])


_REPLICA_METRICS: tuple[tuple[_Kind, str, str, Callable[[Mapping[str, Any]], float]], ...] = (
    (GaugeMetricFamily, "vllm:num_requests_running", "Requests in the batch.", _field("num_running")),
    (GaugeMetricFamily, "vllm:num_requests_waiting", "Requests that wait in the engine.", _field("num_waiting")),
    (GaugeMetricFamily, "vllm:kv_cache_usage_perc", "Share of the slot pool in use, 0 to 1.", _usage),
    (CounterMetricFamily, "vllm:num_preemptions", "Requests preempted.", _field("num_preemptions")),
    (CounterMetricFamily, "vllm:prompt_tokens", "Prompt tokens.", _field("num_prompt_tokens")),
    (CounterMetricFamily, "vllm:generation_tokens", "Tokens generated.", _field("num_generated_tokens")),
    (CounterMetricFamily, "vllm:prefix_cache_queries", "Prompt tokens looked up.", _field("num_prompt_tokens")),
    (CounterMetricFamily, "vllm:prefix_cache_hits", "Prompt tokens found.", _field("num_cached_prompt_tokens")),
    (GaugeMetricFamily, "rayline:waiting_prefill_tokens", "Tokens still to prefill.", _field("num_waiting_tokens")),
    (GaugeMetricFamily, "rayline:replica_serving", "1 while the replica gets requests.", _field("is_serving")),
    (GaugeMetricFamily, "rayline:replica_report_age_seconds", "Since its last report.", _field("age_s")),
)
