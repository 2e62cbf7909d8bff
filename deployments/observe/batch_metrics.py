"""What a router counts of batches, for Prometheus. The label `model_name` is empty: a batch may ask several models."""

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from deployments.observe.exposition import ROUTER_LABELS, RouterFigures

_GAUGES: Mapping[str, tuple[str, str]] = {
    "num_running": ("rayline:batches_running", "Batches that this router runs."),
    "num_unfinished": ("rayline:batches_unfinished", "Batches that have not ended, as this router last saw."),
    "num_open_lines": ("rayline:batch_lines_running", "Lines of batches that this router has open."),
}


def batch_figures(router_id: str, batches: Mapping[str, Any]) -> RouterFigures:
    """A router's part that concerns batches.

    Args:
        router_id: value of the label `router`.
        batches: `BatchRunner.snapshot`.
    """
    return RouterFigures("", router_id, tuple(_families(("", router_id), batches)), {})


def _families(labels: tuple[str, str], batches: Mapping[str, Any]) -> Iterable[Metric]:
    for key, (name, text) in _GAUGES.items():
        gauge = GaugeMetricFamily(name, text, labels=ROUTER_LABELS)
        gauge.add_metric(labels, batches[key])
        yield gauge
    lines = CounterMetricFamily(
        "rayline:batch_lines",
        "Lines of batches, by `outcome`: completed or failed.",
        labels=(*ROUTER_LABELS, "outcome"),
    )
    for outcome in ("completed", "failed"):
        lines.add_metric((*labels, outcome), batches[f"num_{outcome}_lines"])
    yield lines
    ended = CounterMetricFamily(
        "rayline:batches_ended", "Batches that this router brought to an end, by `status`.",
        labels=(*ROUTER_LABELS, "status"),
    )  # fmt: skip
    for status, number in batches["num_ended"].items():
        ended.add_metric((*labels, status), number)
    yield ended
