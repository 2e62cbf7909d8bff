"""Results of load tests: as JSON, as a table in the terminal, as Markdown."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from deployments.bench.load import LoadResult
from deployments.bench.records import distribution, summarize

_LATE_MS = 10.0
_BUSY_SHARE = 0.8
_LATENCIES = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "itl_ms": "ITL", "e2e_ms": "E2E"}
_COLUMNS = ("mean", "std", "p50", "p90", "p99", "max")

Result = dict[str, Any]


def make_result(
    result: LoadResult,
    *,
    label: str,
    load: Mapping[str, Any],
    arguments: Mapping[str, Any],
    limits_ms: Mapping[str, float],
    save_requests: bool,
) -> Result:
    """Everything about a run, ready for JSON.

    Args:
        result: the run.
        label: name of what was measured, for tables and plots.
        load: `mode` (`concurrency`, `rate` or `trace`) and `value`, the load offered.
        arguments: as given on the command line; no secrets.
        limits_ms: for goodput.
        save_requests: keep every request's numbers.
    """
    client = _client_stats(result)
    document = {
        "tool": "rayline bench",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "label": label,
        "load": dict(load),
        "interrupted": result.is_interrupted,
        **summarize(result.records, result.duration_s, limits_ms),
        "client": client,
        "warnings": _warnings(client),
        "arguments": dict(arguments),
    }
    if save_requests:
        document["requests"] = msgspec.to_builtins(result.records)
    return document


def _client_stats(result: LoadResult) -> dict[str, Any]:
    lateness = (r.sent_s - r.scheduled_s for r in result.records if r.scheduled_s is not None)
    return {
        "processes": len(result.clients),
        "cpu_share": [round(client.cpu_share, 3) for client in result.clients],
        "lateness_ms": distribution(lateness),
        "loop_lag_ms": distribution(lag for client in result.clients for lag in client.loop_lags_s),
    }


def _warnings(client: Mapping[str, Any]) -> list[str]:
    """Signs that the client, not the server, was measured."""
    warnings = []
    late, lag = client["lateness_ms"], client["loop_lag_ms"]
    if late and late["p99"] > _LATE_MS:
        warnings.append(f"requests were sent late (p99 {late['p99']:.0f} ms): the load was less even than asked for")
    if max(client["cpu_share"], default=0.0) > _BUSY_SHARE:
        warnings.append(f"a client process used {max(client['cpu_share']):.0%} of a core")
    if lag and lag["p99"] > _LATE_MS:
        warnings.append(f"the client's clock ran late (p99 {lag['p99']:.0f} ms), which adds to every latency")
    if warnings:
        warnings.append("the client is the bottleneck: give it more --processes, or a separate machine")
    return warnings


def write_result(document: Result, path: Path) -> None:
    """Write it as JSON, the folder too where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read_results(paths: Sequence[Path]) -> list[Result]:
    """Read results, in order of label and load.

    Raises:
        ValueError: a file is not a result; the message names it.
        OSError: it cannot be read.
    """
    documents = []
    for path in paths:
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            is_result = isinstance(document, dict) and document.get("tool") == "rayline bench"
        except ValueError:
            is_result = False
        if not is_result:
            raise ValueError(f"{path}: not a result of `run` or `sweep`")
        documents.append(document)
    return sorted(
        documents, key=lambda document: (document["label"], document["load"]["mode"], document["load"]["value"])
    )


def describe_load(load: Mapping[str, Any]) -> str:
    """The load in a word or two: `32 at once`, `8/s`."""
    if load["mode"] == "concurrency":
        return f"{load['value']} at once"
    offered = f"{load['value']:.4g}/s"
    return f"{offered}, {load['name']}" if load["mode"] == "trace" else offered


def print_result(document: Result, console: Console) -> None:
    """One run, in full."""
    title = f"{document['label']}: {describe_load(document['load'])}"
    if document["interrupted"]:
        title += " (interrupted: what was measured before)"
    table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD)
    table.add_column("ms")
    for name in _COLUMNS:
        table.add_column(name, justify="right")
    for key, name in _LATENCIES.items():
        values = document[key]
        table.add_row(name, *([f"{values[column]:,.2f}" for column in _COLUMNS] if values else ["-"] * len(_COLUMNS)))
    console.print(table)
    goodput = document["request_goodput"]
    counts = f"{document['completed']} completed, {document['refused']} refused, {document['failed']} failed"
    console.print(f"Requests         {counts} in {document['duration_s']:.2f} s", highlight=False)
    console.print(f"Throughput       {document['request_throughput']:.2f} requests/s", highlight=False)
    if goodput is not None:
        limits = ", ".join(f"{name} ≤ {limit:g} ms" for name, limit in document["goodput_limits_ms"].items())
        console.print(f"Goodput          {goodput:.2f} requests/s ({limits})", highlight=False)
    counted = "" if document["output_tokens_counted_by"] in ("usage", None) else " (chunks counted: no usage was sent)"
    tokens = f"{document['output_tokens_per_s']:,.1f} output{counted}, {document['total_tokens_per_s']:,.1f} in all"
    console.print(f"Tokens a second  {tokens}", highlight=False)
    late = document["client"]["lateness_ms"]
    if late:
        console.print(f"Sent late by     p50 {late['p50']:.2f} ms, p99 {late['p99']:.2f} ms", highlight=False)
    for kind, error in document["errors"].items():
        console.print(f"[red]{error['count']} of {kind}[/]: ", end="")
        console.print(error["example"], markup=False, highlight=False)
    for warning in document["warnings"]:
        console.print(f"[yellow]{warning}[/]")


def comparison_rows(documents: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table of several results; a goodput column where any has one."""
    has_goodput = any(document["request_goodput"] is not None for document in documents)
    goodput_head = ["goodput, requests/s"] if has_goodput else []
    head = ["server", "load", "requests/s", *goodput_head, "output tokens/s"]
    head += [f"{name}, ms p50/p99" for name in ("TTFT", "TPOT", "E2E")] + ["refused/failed"]
    rows = []
    for document in documents:
        goodput = document["request_goodput"]
        rows.append([
            document["label"],
            describe_load(document["load"]) + (", interrupted" if document["interrupted"] else ""),
            f"{document['request_throughput']:.2f}",
            *(["-" if goodput is None else f"{goodput:.2f}"] if has_goodput else []),
            f"{document['output_tokens_per_s']:,.0f}",
            *(_pair(document[key]) for key in ("ttft_ms", "tpot_ms", "e2e_ms")),
            f"{document['refused']}/{document['failed']}",
        ])  # fmt: skip
    return head, rows


def _pair(values: Mapping[str, float] | None) -> str:
    return "/".join(_short(values[name]) for name in ("p50", "p99")) if values else "-"


def _short(milliseconds: float) -> str:
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.1f}"


def print_comparison(documents: Sequence[Result], console: Console) -> None:
    """Several results, a row each; a label that is everywhere the same stands above."""
    head, rows = comparison_rows(documents)
    labels = {row[0] for row in rows}
    if len(labels) == 1:
        head, rows = head[1:], [row[1:] for row in rows]
    title = labels.pop() if len(labels) == 1 else None
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0))
    for name in head:
        brief = (
            name.replace("requests", "\nreq").replace("tokens", "\ntok").replace("p50", "\np50").replace("/f", "/\nf")
        )
        table.add_column(brief.strip(), justify="left" if name in ("server", "load") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def markdown(documents: Sequence[Result]) -> str:
    """Several results as a Markdown table."""
    head, rows = comparison_rows(documents)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))
