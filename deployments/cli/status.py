"""`rayline status`: the fleet as a live table."""

import json
import time
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from deployments.cli.output import make_console
from deployments.cli.server import DEFAULT_URL, KeyOption, UrlOption, connect, get

_STYLES = {"serving": "green", "stalled": "red", "broken": "red", "gone": "red"}
"""Colors of states; the others are yellow."""


def status(
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = None,
    once: Annotated[bool, typer.Option("--once", help="Print the table once and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON and exit.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between looks.")] = 1.0,
) -> None:
    """Show for every replica what runs, how full its slot pool is, and how fast it is.

    Where there are several models, each has a line with its state. The exit
    code is 0, or with --once and --json 2 if no replica serves.

        rayline status
        rayline status --json | jq .replicas
    """
    console = make_console()
    with connect(url, api_key) as client:
        stats = get(client, "/rayline/stats")
        if as_json:
            print(json.dumps(stats))
        elif once or not console.is_terminal:
            console.print(_table(stats, {}))
        else:
            _watch(client, interval)
        if (as_json or once) and not any(replica["is_serving"] for replica in stats["replicas"].values()):
            raise typer.Exit(2)


def _watch(client: Any, interval: float) -> None:
    totals: dict[str, tuple[float, int]] = {}
    with Live(screen=False, auto_refresh=False) as live:
        while True:
            stats = get(client, "/rayline/stats")
            now, rates = time.monotonic(), {}
            for name, replica in stats["replicas"].items():
                then, total = totals.get(name, (now, replica["num_generated_tokens"]))
                rates[name] = (replica["num_generated_tokens"] - total) / max(now - then, 1e-3)
                totals[name] = now, replica["num_generated_tokens"]
            live.update(_table(stats, rates), refresh=True)
            time.sleep(interval)


def _table(stats: dict[str, Any], rates: dict[str, float]) -> Group:
    models = stats["models"]
    owners = {replica: key for key, model in models.items() for replica in model["replicas"]}
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in (
        *(["model"] if len(models) > 1 else []),
        "replica",
        "state",
        "running",
        "waiting",
        "to prefill",
        "slot pool",
        "cached",
        "prefix hits",
        "tokens/s",
    ):
        table.add_column(name, justify="left" if name in ("model", "replica", "state") else "right")
    for name, replica in sorted(stats["replicas"].items(), key=lambda item: (owners[item[0]], item[0])):
        state = replica["state"]
        looked_up = replica["num_prompt_tokens"]
        table.add_row(
            *([owners[name]] if len(models) > 1 else []),
            name,
            Text(state, style=_STYLES.get(state, "yellow")),
            f"{replica['num_running']}/{replica['max_rows']}",
            str(replica["num_waiting"]),
            f"{replica['num_waiting_tokens']:,}",
            f"{replica['num_used_pages'] / max(replica['num_pages'], 1):.0%}",
            f"{replica['num_cached_pages'] / max(replica['num_pages'], 1):.0%}",
            f"{replica['num_cached_prompt_tokens'] / looked_up:.0%}" if looked_up else "-",
            f"{rates[name]:,.0f}" if name in rates else "-",
        )
    router = stats["router"]
    line = (
        f"router: {router['num_live']} live, {router['num_waiting']} waiting, {router['num_requests']:,} so far, "
        f"{router['num_resumes'] + router['num_moves']:,} moved, {router['num_refused']:,} refused"
    )
    lines = [Text(line, style="dim")]
    if len(models) > 1:
        states = ", ".join(f"{key} {model['state']}" for key, model in models.items())
        lines.insert(0, Text(f"models: {states}"))
    return Group(table, *lines)
