"""Load tests of any server with OpenAI's API: latency, throughput and goodput by vLLM's definitions.

    rayline bench run --url http://127.0.0.1:8000/v1 --model NAME --concurrency 32 --num-requests 500
    rayline bench run … --rate 8 --goodput ttft:500,tpot:25 --out result.json
    rayline bench run … --trace FILE --trace-format mooncake --speed 2
    rayline bench sweep … --rates 1,2,4,8 --out results --plot latency.png
    rayline bench table results/*.json --markdown
    rayline bench plot results/*.json --out latency.png

What each number means and how the client was checked: docs/benchmarking.md.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from deployments.bench.load import LoadSpec, run_load, warm_up
from deployments.bench.options import BenchArguments, takes_arguments
from deployments.bench.plot import plot
from deployments.bench.records import RequestRecord
from deployments.bench.report import (
    Result,
    make_result,
    markdown,
    print_comparison,
    print_result,
    read_results,
    write_result,
)

app = typer.Typer(
    name="bench", no_args_is_help=True, help="Measure a server under load.", pretty_exceptions_show_locals=False
)
console = Console()
errors = Console(stderr=True)


@app.command()
@takes_arguments()
def run(
    out: Annotated[
        Path | None, typer.Option(help="Write the result into this file, as JSON.", rich_help_panel="Result")
    ] = None,
    **given: object,
) -> None:
    """Measure one load: --concurrency N, --rate R or --trace FILE."""
    result = _measure(_arguments(**given))
    print_result(result, console)
    if out is not None:
        write_result(result, out)
        console.print(f"Written to {out}", highlight=False)
    if result["interrupted"] or not result["completed"]:
        raise typer.Exit(130 if result["interrupted"] else 1)


@app.command()
@takes_arguments("concurrency", "rate", "trace", "trace_format", "speed", "max_input_tokens", "max_output_tokens")
def sweep(
    out: Annotated[
        Path, typer.Option(help="Folder for the results, one JSON file for each load.", rich_help_panel="Result")
    ],
    seed: int,
    rates: Annotated[str | None, typer.Option(help="Open loops: 1,2,4,8", rich_help_panel="Load")] = None,
    concurrencies: Annotated[str | None, typer.Option(help="Closed loops: 1,8,64", rich_help_panel="Load")] = None,
    picture: Annotated[
        Path | None, typer.Option("--plot", help="Draw latency against load into this file.", rich_help_panel="Result")
    ] = None,
    **given: object,
) -> None:
    """Measure several loads one after the other, each with prompts of its own."""
    if (rates is None) == (concurrencies is None):
        _fail("give either --rates or --concurrencies")
    mode = "rate" if rates is not None else "concurrency"
    loads = [{mode: load} for load in _numbers(rates or concurrencies or "", mode)]
    # Checked before the first one is run.
    all_arguments = [_arguments(**{**given, **load, "seed": seed + i}) for i, load in enumerate(loads)]
    results: list[Result] = []
    for arguments, load in zip(all_arguments, loads, strict=True):
        result = _measure(arguments)
        results.append(result)
        write_result(result, out / f"{_file_name(arguments.name)}-{mode}-{load[mode]:g}.json")
        if result["interrupted"]:
            break
    print_comparison(results, console)
    if picture is not None and any(result["completed"] for result in results):
        _plot(results, picture, None)
    if results[-1]["interrupted"] or not any(result["completed"] for result in results):
        raise typer.Exit(130 if results[-1]["interrupted"] else 1)


ResultFiles = Annotated[list[Path], typer.Argument(help="Results of run and sweep.", exists=True, dir_okay=False)]


@app.command("plot")
def plot_results(
    files: ResultFiles,
    out: Annotated[Path, typer.Option(help="PNG or SVG to write.")],
    title: Annotated[str | None, typer.Option(help="Above the picture.")] = None,
) -> None:
    """Draw latency and throughput against load, a color for each label."""
    _plot(_read(files), out, title)


@app.command()
def table(
    files: ResultFiles,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="For a README.")] = False,
) -> None:
    """Set results side by side."""
    results = _read(files)
    if as_markdown:
        typer.echo(markdown(results))
    else:
        print_comparison(results, console)


def _measure(arguments: BenchArguments) -> Result:
    """Warm up, run, summarise."""
    try:
        requests = arguments.requests()
        load = arguments.load(requests)
        spec = arguments.spec(requests)
    except (ValueError, OSError) as error:
        _fail(str(error))
    _warm_up(spec, arguments)
    with _progress() as progress:
        task = progress.add_task(arguments.name, total=len(requests), note="")
        counts = {"failed": 0, "tokens": 0}

        def show(records: list[RequestRecord]) -> None:
            counts["failed"] += sum(not record.is_completed for record in records)
            counts["tokens"] += sum(record.num_output_tokens for record in records)
            failed = f", [red]{counts['failed']} not answered[/]" if counts["failed"] else ""
            progress.update(task, advance=len(records), note=f"{counts['tokens']:,} tokens{failed}")

        outcome = run_load(spec, arguments.processes, show)
    return make_result(
        outcome,
        label=arguments.name,
        load=load,
        arguments=arguments.as_json(),
        limits_ms=arguments.limits_ms,
        save_requests=arguments.save_requests,
    )


def _warm_up(spec: LoadSpec, arguments: BenchArguments) -> None:
    """Send the warm-up requests; end here if the server does not answer the first one."""
    planned = arguments.warm_up_requests()
    if not planned:
        return
    with errors.status("warming up"):
        records = asyncio.run(warm_up(replace(spec, concurrency=arguments.concurrency or 8), planned))
    first = records[0]
    if first.is_completed:
        return
    hint = ""
    if first.error_kind == "HTTP 400" and arguments.tokenizer is None:
        hint = (
            "\nPrompts are token ids: keep them within the vocabulary with --token-ids, or send text with --tokenizer."
        )
    elif first.error_kind == "HTTP 401":
        hint = f"\nSet the API key in the environment variable {arguments.api_key_env} (--api-key-env names another)."
    elif first.error_kind == "HTTP 404":
        hint = "\n--model must be a name of GET /v1/models, and --url end in /v1 where the server's API does."
    _fail(f"the first request failed, {first.error_kind}: {first.error_example}{hint}")


def _arguments(**given: object) -> BenchArguments:
    try:
        return BenchArguments(**given)  # type: ignore[arg-type]
    except ValueError as error:
        _fail(str(error))


def _numbers(text: str, mode: str) -> list[float]:
    option = "--rates" if mode == "rate" else "--concurrencies"
    try:
        numbers: list[float] = [float(part) if mode == "rate" else int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) <= 0:
        _fail(f"{option} {text!r}: give numbers above 0, such as 1,2,4,8")
    return numbers


def _read(files: Iterable[Path]) -> list[Result]:
    try:
        return read_results(list(files))
    except (ValueError, OSError) as error:
        _fail(str(error))


def _plot(results: list[Result], out: Path, title: str | None) -> None:
    try:
        plot(results, out, title)
    except ModuleNotFoundError:
        _fail("plots need matplotlib: pip install 'rayline[bench]'")
    except ValueError as error:
        _fail(str(error))
    console.print(f"Drawn to {out}", highlight=False)


def _file_name(label: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in label)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"), console=errors, refresh_per_second=4,
    )  # fmt: skip


def _fail(message: str) -> NoReturn:
    errors.print(message, style="red", markup=False, highlight=False)
    raise typer.Exit(2)
