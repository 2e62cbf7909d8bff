"""Latency and throughput against load, as a picture that is legible on light and on dark pages."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deployments.bench.report import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#757575"
"""Text and axes: as far from white as from GitHub's dark background (4.6 and 4.1 to 1), on a transparent ground."""
PALETTE = ("#2f81f7", "#d9731a", "#1f9e6b", "#a763e6", "#e0457b", "#8a8a14")
_PANELS = (
    ("ttft_ms", "Time to first token, ms"),
    ("tpot_ms", "Time per output token, ms"),
    ("output_tokens_per_s", "Output tokens a second"),
)
_AXES = {"concurrency": "requests at once", "rate": "requests a second offered", "trace": "requests a second offered"}
_DPI = 200


def plot(documents: Sequence[Result], path: Path, title: str | None = None) -> None:
    """Draw TTFT, TPOT (solid p50, dashed p99) and throughput against load, a color for each label.

    Args:
        documents: results whose loads are all concurrencies or all rates.
        path: a PNG or SVG to write.
        title: heading of the picture.

    Raises:
        ValueError: the results mix concurrencies with rates, or none has completed requests.
        ModuleNotFoundError: matplotlib is not installed.
    """
    measured = [document for document in documents if document["completed"]]
    if not measured:
        raise ValueError("nothing to plot: no result has completed requests")
    axes_names = {_AXES[document["load"]["mode"]] for document in measured}
    if len(axes_names) > 1:
        raise ValueError("results with --concurrency and with --rate have no common axis: plot them apart")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: Any = {"font.size": 9, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
             "axes.edgecolor": INK, "svg.fonttype": "none"}  # fmt: skip
    labels = list(dict.fromkeys(document["label"] for document in measured))
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(1, len(_PANELS), figsize=(10.5, 3.2), layout="constrained")
        for panel, (key, name) in zip(axes, _PANELS, strict=True):
            for label, color in zip(labels, _colors(len(labels)), strict=True):
                curve = [d for d in measured if d["label"] == label]
                _draw(panel, curve, key, color, is_filled=len(labels) == 1)
            _dress(panel, axes_names.copy().pop(), name, {d["load"]["value"] for d in measured})
        legend_of = axes[0].get_legend_handles_labels()
        if len(labels) > 1 or title:
            figure.suptitle(title or "", fontsize=11, fontweight="bold", color=INK)
        figure.legend(*legend_of, loc="outside lower center", ncols=6, frameon=False, labelcolor=INK)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=_DPI, transparent=True)
        pyplot.close(figure)


def _colors(num: int) -> list[str]:
    return [PALETTE[i % len(PALETTE)] for i in range(num)]


def _draw(panel: "Axes", documents: Sequence[Result], key: str, color: str, *, is_filled: bool) -> None:
    """One label's curve; of latencies two, the room between them perhaps filled."""
    documents = [d for d in sorted(documents, key=lambda d: float(d["load"]["value"])) if d[key] is not None]
    if not documents:
        return
    label = documents[0]["label"]
    loads = [d["load"]["value"] for d in documents]
    mark: dict[str, Any] = {"color": color, "linewidth": 1.8, "marker": "o", "markersize": 4}
    if key == "output_tokens_per_s":
        panel.plot(loads, [d[key] for d in documents], **mark)
        return
    medians, tails = ([d[key][p] for d in documents] for p in ("p50", "p99"))
    panel.plot(loads, medians, label=f"{label}, p50", **mark)
    panel.plot(loads, tails, label=f"{label}, p99", linestyle="--", **{**mark, "linewidth": 1.2, "markersize": 3})
    if is_filled:
        panel.fill_between(loads, medians, tails, color=color, alpha=0.12, linewidth=0)


def _dress(panel: "Axes", x_name: str, title: str, loads: set[float]) -> None:
    panel.set_title(title, fontsize=9.5, color=INK, loc="left")
    panel.set_xlabel(x_name)
    panel.set_ylim(bottom=0)
    panel.grid(axis="y", color=INK, alpha=0.25, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    low, high = min(loads), max(loads)
    if low > 0 and high / low >= 8 and len(loads) > 2:  # doubled loads stand evenly on a logarithmic axis
        panel.set_xscale("log", base=2)
    panel.set_xticks(sorted(loads), [f"{load:g}" for load in sorted(loads)])
    panel.minorticks_off()
