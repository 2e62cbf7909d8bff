"""What a router counts and knows, for Prometheus. `exposition` writes the metrics of all routers together.

Names and buckets are vLLM's where the meaning is the same, so that existing boards work; ours begin with `rayline:`.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from deployments.observe.exposition import ROUTER_LABELS, RouterFigures
from deployments.observe.finished_request import FinishedRequest
from deployments.observe.history import RouterHistory
from deployments.observe.usage_counts import UsageCounts
from llm.serving.schemas import FinishReason

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

_MAX_ADAPTER_LABELS = 100
_OTHER_ADAPTERS = "other"

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
    "rayline:request_route_time_seconds": ("Parsing, tokenizing and admission.", _HOP_BUCKETS),
    "rayline:request_relay_time_seconds": (
        "The request's way to the engine, and the first token's way back.",
        _HOP_BUCKETS,
    ),
}


class RouterState(Protocol):
    """What the gauges are read from when Prometheus asks."""

    def snapshot(self) -> dict[str, Any]:
        """See `Router.snapshot`."""
        ...


class RouterPeers(Protocol):
    """The other routers of the same deployment. Each has one part of everything for each model."""

    @property
    def router_id(self) -> str:
        """Name of this router among them."""
        ...

    async def figures(self) -> list[RouterFigures]:
        """Metrics of all routers, with or without this one; none where they cannot be asked now."""
        ...

    async def histories(self) -> list[RouterHistory]:
        """What all routers saw in the last 15 minutes; as with `figures`."""
        ...


class NoPeers:
    """A router by itself."""

    router_id = "router"

    async def figures(self) -> list[RouterFigures]:
        """See `RouterPeers`."""
        return []

    async def histories(self) -> list[RouterHistory]:
        """See `RouterPeers`."""
        return []


class RouterMetrics:
    """Counts how a router's requests to one model end.

    Args:
        model: value of the label `model_name`.
        router_id: value of the label `router`.
        state: state of the router.
        min_replicas: number of replicas that the configuration keeps whatever the load.
        gpus_a_replica: GPUs that hold the model together; on a CPU, processes.
    """

    def __init__(
        self, model: str, router_id: str, state: RouterState, *, min_replicas: int = 1, gpus_a_replica: int = 1
    ) -> None:
        self._state = state
        self._labels = (model, router_id)
        self._registry = CollectorRegistry()
        self._registry.register(_StateCollector(self._labels, state, min_replicas, gpus_a_replica))
        self._histograms = {
            name: Histogram(name, text, ROUTER_LABELS, buckets=buckets, registry=self._registry).labels(*self._labels)
            for name, (text, buckets) in _HISTOGRAMS.items()
        }
        self._ended = Counter(
            "vllm:request_success",
            "Requests that ended, by `finished_reason`: stop, length, abort or error.",
            (*ROUTER_LABELS, "finished_reason"),
            registry=self._registry,
        )
        self._by_adapter = Counter(
            "rayline:adapter_requests",
            f"Requests with adapters that ended, by adapter; those beyond the first {_MAX_ADAPTER_LABELS} as `other`.",
            (*ROUTER_LABELS, "adapter"),
            registry=self._registry,
        )
        self._adapters: set[str] = set()
        for reason in FinishReason:
            self._ended.labels(*self._labels, reason)  # from 0: what begins at 1 has no rate

    def figures(self) -> RouterFigures:
        """This router's part."""
        model, router_id = self._labels
        return RouterFigures(model, router_id, tuple(self._registry.collect()), self._state.snapshot()["replicas"])

    def request_over(self, request: FinishedRequest) -> None:
        """A request has ended, in whatever way."""
        timeline = request.timeline
        reason = "error" if request.error_type else request.finish_reason or "abort"
        self._ended.labels(*self._labels, reason).inc()
        if request.adapter:
            self._by_adapter.labels(*self._labels, self._adapter_label(request.adapter)).inc()
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

    def _adapter_label(self, name: str) -> str:
        """The adapter's name, unless there are too many series already."""
        if len(self._adapters) < _MAX_ADAPTER_LABELS:
            self._adapters.add(name)
        return name if name in self._adapters else _OTHER_ADAPTERS


def key_figures(router_id: str, access: Mapping[str, Any], usage: UsageCounts) -> RouterFigures:
    """A router's part that concerns its keys.

    Args:
        router_id: value of the label `router`.
        access: `Access.snapshot`.
        usage: what each key has used.
    """
    gauges = [GaugeMetricFamily(name, text, labels=ROUTER_LABELS) for name, text in _OF_ALL_MODELS.values()]
    for gauge, key in zip(gauges, _OF_ALL_MODELS, strict=True):
        gauge.add_metric(("", router_id), access[key])
    return RouterFigures("", router_id, (*gauges, *usage.families(router_id)), {})


class _StateCollector(Collector):
    """Gauges and counters that are kept elsewhere and are read when Prometheus asks."""

    def __init__(self, labels: tuple[str, str], state: RouterState, min_replicas: int, gpus_a_replica: int) -> None:
        self._labels = labels
        self._state = state
        self._min_replicas = min_replicas
        self._gpus_a_replica = gpus_a_replica

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client."""
        snapshot = self._state.snapshot()
        router = snapshot["router"]
        serving = sum(1 for replica in snapshot["replicas"].values() if replica["is_serving"])
        gauges = {key: (name, text, router[key]) for key, (name, text) in _GAUGES.items()}
        gauges["serving"] = "rayline:router_replicas", "Replicas that get requests from this router.", serving
        gauges["min"] = "rayline:min_replicas", "Least number of replicas, whatever the load is.", self._min_replicas
        gauges["gpus"] = "rayline:gpus_per_replica", "GPUs that hold a replica's model together.", self._gpus_a_replica
        for name, text, value in gauges.values():
            gauge = GaugeMetricFamily(name, text, labels=ROUTER_LABELS)
            gauge.add_metric(self._labels, value)
            yield gauge
        for key, (name, text) in _COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=ROUTER_LABELS)
            counter.add_metric(self._labels, router[key])
            yield counter


_GAUGES: Mapping[str, tuple[str, str]] = {
    "num_live": ("rayline:router_live_requests", "Requests of this router that run or wait."),
    "num_waiting": (
        "rayline:router_waiting_requests",
        "Requests that wait in this router for a replica with room.",
    ),
    "num_waiting_tokens": ("rayline:router_waiting_tokens", "Tokens that these have to prefill."),
}
_OF_ALL_MODELS: Mapping[str, tuple[str, str]] = {
    "num_keys": ("rayline:api_keys", "Keys that clients may use."),
    "is_key_file_wrong": ("rayline:api_keys_file_wrong", "1 while the file with keys cannot be read or used."),
    "is_usage_record_away": (
        "rayline:usage_record_away",
        "1 while the record of usage cannot be reached; entries wait on the routers' nodes.",
    ),
    "is_accountant_away": ("rayline:accountant_away", "1 while the accountant of the keys' limits is away."),
}
"""What concerns a router's keys, not one of its models: the label `model_name` is empty."""
_COUNTERS: Mapping[str, tuple[str, str]] = {
    "num_requests": ("rayline:requests", "Requests begun."),
    "num_refused": ("rayline:requests_refused", "Requests refused with 429."),
    "num_resumes": ("rayline:failovers", "Times a request continued elsewhere after its replica failed or stalled."),
    "num_moves": ("rayline:moves", "Times a request continued elsewhere because its replica was removed."),
}
