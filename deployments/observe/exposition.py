"""The metrics of a whole deployment in Prometheus' text format, from what each of its routers knows.

One scrape reaches one router, behind a proxy any of them. It answers for all: each router's own series carry its name,
and a replica's figures come from the router that heard it last.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
ROUTER_LABELS = ("model_name", "router")
"""Labels of everything that a router counts itself."""

_REPLICA_LABELS = ("model_name", "engine")
_MAX_REPORT_AGE_S = 2.0
"""Replicas report ten times a second. Older figures are left out: another router may have told later ones already, and
a counter must never fall."""

_Kind = type[GaugeMetricFamily] | type[CounterMetricFamily]
_Stats = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RouterFigures:
    """One router's part of the metrics; travels between routers."""

    model: str
    router_id: str
    families: tuple[Metric, ...]
    """What the router counts itself, with `ROUTER_LABELS`."""
    replicas: Mapping[str, _Stats]
    """What it last heard of each replica, by id: see `FleetWatch.snapshot`."""


def write_metrics(figures: Sequence[RouterFigures]) -> bytes:
    """Everything that these routers and their replicas count, each series once."""
    registry = CollectorRegistry()
    registry.register(_Families([*_merged(figures), *_seen_by_routers(figures), *_of_replicas(figures)]))
    return generate_latest(registry)


class _Families(Collector):
    """Families that are at hand already."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client."""
        return self._families


def _merged(figures: Sequence[RouterFigures]) -> Iterable[Metric]:
    """The routers' own families: the format wants all series of a family together."""
    families: dict[str, Metric] = {}
    for family in (family for one in figures for family in one.families):
        merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
        merged.samples.extend(family.samples)
    return families.values()


def _seen_by_routers(figures: Sequence[RouterFigures]) -> Iterable[Metric]:
    """How each router sees each replica."""
    for name, text, value in _VIEWS:
        family = GaugeMetricFamily(name, text, labels=(*ROUTER_LABELS, "engine"))
        for one in figures:
            for replica_id, stats in one.replicas.items():
                family.add_metric((one.model, one.router_id, replica_id), value(stats))
        yield family


def _of_replicas(figures: Sequence[RouterFigures]) -> Iterable[Metric]:
    """What replicas count themselves, as whoever heard it last says."""
    latest: dict[tuple[str, str], _Stats] = {}
    for one in figures:
        for replica_id, stats in one.replicas.items():
            known = latest.get((one.model, replica_id))
            if stats["age_s"] <= _MAX_REPORT_AGE_S and (known is None or stats["age_s"] < known["age_s"]):
                latest[one.model, replica_id] = stats
    for kind, name, text, value in _REPLICA_METRICS:
        family = kind(name, text, labels=_REPLICA_LABELS)
        for labels, stats in latest.items():
            family.add_metric(labels, value(stats))
        yield family


def _field(name: str) -> Callable[[_Stats], float]:
    return lambda stats: float(stats[name])


def _usage(stats: _Stats) -> float:
    return float(stats["num_used_pages"] / max(stats["num_pages"], 1))


def _num_adapters(stats: _Stats) -> float:
    return float(len(stats.get("adapters", ())))  # routers of an earlier version do not tell


def _is_silent(stats: _Stats) -> float:
    return float(stats["state"] == "silent")


_VIEWS: tuple[tuple[str, str, Callable[[_Stats], float]], ...] = (
    ("rayline:replica_serving", "1 while the replica gets requests from this router.", _field("is_serving")),
    ("rayline:replica_silent", "1 while Serve lists the replica and this router does not hear it.", _is_silent),
    ("rayline:replica_report_age_seconds", "Since its last report to this router.", _field("age_s")),
)
_REPLICA_METRICS: tuple[tuple[_Kind, str, str, Callable[[_Stats], float]], ...] = (
    (GaugeMetricFamily, "vllm:num_requests_running", "Requests in the batch.", _field("num_running")),
    (GaugeMetricFamily, "vllm:num_requests_waiting", "Requests that wait in the engine.", _field("num_waiting")),
    (GaugeMetricFamily, "vllm:kv_cache_usage_perc", "Share of the slot pool in use, 0 to 1.", _usage),
    (CounterMetricFamily, "vllm:num_preemptions", "Requests preempted.", _field("num_preemptions")),
    (CounterMetricFamily, "vllm:prompt_tokens", "Prompt tokens.", _field("num_prompt_tokens")),
    (CounterMetricFamily, "vllm:generation_tokens", "Tokens generated.", _field("num_generated_tokens")),
    (CounterMetricFamily, "vllm:prefix_cache_queries", "Prompt tokens looked up.", _field("num_prompt_tokens")),
    (CounterMetricFamily, "vllm:prefix_cache_hits", "Prompt tokens found.", _field("num_cached_prompt_tokens")),
    (GaugeMetricFamily, "rayline:waiting_prefill_tokens", "Tokens still to prefill.", _field("num_waiting_tokens")),
    (GaugeMetricFamily, "rayline:adapters_held", "Adapters on the device or in host memory.", _num_adapters),
)
