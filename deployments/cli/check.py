"""`rayline check`: says what is wrong with a configuration and what it will need, before anything starts."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deployments.cli.output import make_console
from deployments.cli.settings import LOCAL_HOST, read_content, set_arguments
from deployments.config import resolve_paths
from deployments.model_config import ServedModelConfig
from deployments.replica.gpu_sharing import sharing_notes
from deployments.replica.model_memory import (
    GIB,
    GPUShare,
    fewest_gpus,
    fewest_slots,
    itemsize_of,
    num_snapshots_of,
    share_of,
    weight_bytes,
)
from deployments.serve.config_file import check_model, find_config_file, read_config
from deployments.serve.front_end import FrontEnd
from deployments.serve.ports import check_port
from llm.checkpoint.hub import find_local_checkpoint, is_gguf
from llm.config import ModelConfig, WeightLayout
from llm.errors import ConfigError


def check(
    config: Annotated[
        Path | None,
        typer.Argument(
            help="Configuration file, or the name of one that comes with Rayline; or a model that is here, for what "
            "rayline serve would do with it."
        ),
    ] = None,
    tp: Annotated[int | None, typer.Option(min=1, help="GPUs of each replica, which share the model.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any setting: engine.max_seq_len=8192.")] = None,
    gpu_memory: Annotated[str, typer.Option(help="Sizes of GPUs to compute slots for, in GiB.")] = "24,80,141",
) -> None:
    """Check a configuration or a model and its port without a GPU, and say what memory they need.

    The exit code is 1 if it cannot be served, with the reason and the fix in one line. A port in use is only noted.

        rayline check serve_config.yaml
        rayline check my.yaml --gpu-memory 48
        rayline check ~/models/Llama-3.3-70B-Instruct --tp 2
    """
    sizes = _sizes(gpu_memory)
    console = make_console()
    config, content = _asked_for(config, tp, settings or [])
    server = read_config(content, config)
    _print_port(console, server.front_end)
    for app in map(resolve_paths, server.apps.values()):
        for key, model in app.by_key.items():
            _print_model(console, config, key, model, sizes)
        for note in sharing_notes(app.by_key):
            _print_warning(console, note)


def _sizes(text: str) -> list[float]:
    """Sizes of GPUs in GiB."""
    try:
        sizes = [float(size) for size in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or not all(0 < size < math.inf for size in sizes):  # nan is neither
        raise typer.BadParameter("give sizes in GiB, separated by commas: 24,80", param_hint="--gpu-memory")
    return sizes


def _asked_for(given: Path | None, tp: int | None, settings: list[str]) -> tuple[Path, dict[str, Any]]:
    """The configuration file, and its content with what the command line says.

    A model counts as `rayline serve` takes it: it has the settings of the default file, and listens on this machine
    alone unless that says otherwise.

    Raises:
        ConfigError: there is no such file or model, or a setting is wrong.
        CheckpointError: a GGUF file cannot be read.
    """
    model = None
    if given is not None and (is_gguf(given) or not given.is_file()) and find_local_checkpoint(str(given)) is not None:
        given, model = None, str(given)
    path = find_config_file(given)
    content = read_content(path)
    if model is not None:
        content.setdefault("http_options", {}).setdefault("host", LOCAL_HOST)
    set_arguments(content["applications"][0]["args"], model, tp, settings)
    return path, content


def _print_model(console: Console, path: Path, key: str, app: ServedModelConfig, sizes: list[float]) -> None:
    """Check a model, and say what it will need."""
    report = check_model(app)
    aliases = f", also called {', '.join(app.aliases)}" if app.aliases else ""
    console.print(f"[green]✓[/] {path}: model [bold]{key}[/]{aliases}, {app.replicas.most_replicas} replica(s)")
    if find_local_checkpoint(app.model) is None:
        console.print(
            f"  {app.model} is neither a directory nor a GGUF file here: it is checked where it is loaded",
            style="dim",
        )
        return
    for warning in report.warnings:
        _print_warning(console, warning)
    if report.model is not None:
        console.print(_memory(app, report.model, sizes))
        console.print(_checklist(app, report.model))


def _print_warning(console: Console, warning: str) -> None:
    console.print(f"[yellow]![/] {escape(warning)}", soft_wrap=True)


def _print_port(console: Console, front_end: FrontEnd) -> None:
    """Say where it will listen; a port in use is not an error in the file."""
    try:
        check_port(front_end)
    except ConfigError as error:
        console.print(f"[yellow]![/] {error}", soft_wrap=True)
    else:
        who = "this machine alone" if front_end.is_local else "other machines too"
        console.print(f"[green]✓[/] port {front_end.port} of {front_end.host} is free; it lets in {who}")


def _width(model: ModelConfig, itemsize: int) -> str:
    """How many bits each weight takes."""
    width = f"{8 * itemsize} bits a number"
    if model.quantization is None:
        return width
    formats = model.quantization.formats
    bits = sorted({weight_format.num_bits for weight_format in formats})
    if all(weight_format.layout is WeightLayout.MXFP4 for weight_format in formats):
        return f"4 in the experts, elsewhere {width}"
    return f"{' and '.join(map(str, bits))} in the layers' projections, elsewhere {width}"


def _memory(app: ServedModelConfig, model: ModelConfig, sizes: list[float]) -> Table:
    itemsize, share = itemsize_of(app), share_of(app, model, app.engine.tensor_parallel_size)
    table = Table(box=None, pad_edge=False, show_header=False)
    on_each = f" on each of {share.num_gpus} GPUs" if share.num_gpus > 1 else ""
    weights = f"{weight_bytes(model, itemsize) / GIB:.2f} GiB"
    if on_each:
        weights += f", {share.weight_bytes / GIB:.2f} GiB{on_each}"
    table.add_row("  weights", f"{weights} ({_width(model, itemsize)})")
    if model.classifier is not None:
        what = "label" if model.num_labels == 1 else "labels"
        table.add_row("  classifies", f"texts, with {model.num_labels} {what}; it generates none and makes no vectors")
    table.add_row("  a slot", f"{share.slot_bytes / 1024:.1f} KiB of keys and values for one token{on_each}")
    if share.state_bytes:
        num_rows, num_snapshots = app.engine.batch_size("cuda"), num_snapshots_of(app, model)
        a_row, states = share.state_bytes / (num_rows + num_snapshots) / (1 << 20), share.state_bytes / GIB
        holders = f"{num_rows} rows" + (f" and {num_snapshots} snapshots for the prefix cache" if num_snapshots else "")
        table.add_row("  a row", f"{a_row:.1f} MiB of states, {states:.2f} GiB for {holders}{on_each}")
    if share.adapter_bytes:
        num_adapters, rank = app.engine.max_adapters, app.engine.max_adapter_rank
        each, whole = share.adapter_bytes / num_adapters / (1 << 20), share.adapter_bytes / GIB
        experts = ", routers and experts included" if app.engine.adapter_experts and model.num_experts else ""
        room = f"{each:.1f} MiB of rank {rank}{experts}, {whole:.2f} GiB for {num_adapters} of them{on_each}"
        table.add_row("  an adapter", room)
    for size in sizes:
        which = (
            f"{share.num_gpus} GPUs" if on_each else "a GPU" if app.gpu_share == 1 else f"{app.gpu_share:g} of a GPU"
        )
        table.add_row(f"  {which} of {size:g} GiB", _what_fits(app, model, share, size))
    return table


def _what_fits(app: ServedModelConfig, model: ModelConfig, share: GPUShare, size: float) -> str:
    """How much a replica's pool holds on GPUs of so many GiB; if nothing, how many GPUs the model needs."""
    usable = app.gpu_share * app.engine.gpu_memory_utilization
    slots = share.num_slots(size * GIB * usable)
    if slots >= fewest_slots(app, model):
        return f"about {slots:,} slots: {slots // 1000:,} sequences of 1,000 tokens"
    if app.gpu_share < 1:
        return f"too small for a replica with {app.gpu_share:g} of it"
    enough = fewest_gpus(app, model, size * GIB)
    if enough is None or enough.num_gpus <= share.num_gpus:
        return "too small"
    return f"too small; {enough.num_gpus} of them hold it: engine.tensor_parallel_size: {enough.num_gpus}"


def _adapters(app: ServedModelConfig) -> str:
    """How many adapters requests may choose, as far as the file says, and how many fit on the device."""
    if not app.may_have_adapters:
        return "no adapters, adapter_folder or adapter_roots given"
    num_named = f"{len(app.adapters)} named here; " if app.adapters else ""
    return f"{num_named}{app.engine.max_adapters} at once on the device, of rank {app.engine.max_adapter_rank} at most"


def _checklist(app: ServedModelConfig, model: ModelConfig) -> Table:
    """The inference checklist, ticked for this model."""
    group = model.num_heads // model.kv_heads
    table = Table(box=None, pad_edge=False, show_header=False)
    rows = [
        (True, "KV cache", "always on"),
        (
            group > 1,
            "grouped queries",
            f"{group} query heads share keys and values" if group > 1 else "this model has none",
        ),
        (
            model.window_size is not None,
            "sliding window",
            f"{model.window_size:,} tokens; pages behind it go back" if model.window_size else "this model has none",
        ),
        (app.dtype != "float32", "16-bit numbers", "on a GPU" if app.dtype == "auto" else str(app.dtype)),
        (app.lora is not None, "LoRA merged", str(app.lora) if app.lora else "no adapter given"),
        (app.may_have_adapters, "LoRA by request", _adapters(app)),
    ]
    for is_on, name, what in rows:
        table.add_row("  [green]✓[/]" if is_on else "  [dim]-[/]", name, f"[dim]{what}[/]")
    return table
