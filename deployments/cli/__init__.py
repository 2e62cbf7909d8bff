"""`rayline`: the command line."""

import sys
from typing import Annotated

import typer

from deployments.bench.command import app as bench
from deployments.cli import chat, check, convert, doctor, local, pull, serve, status
from deployments.version import __version__
from llm.errors import LLMError

app = typer.Typer(
    name="rayline",
    help="Serve language models on Ray, and manage them.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(serve.serve)
app.command()(chat.chat)
app.command()(check.check)
app.command()(convert.convert)
app.command()(doctor.doctor)
app.command("list")(local.list_models)
app.command()(pull.pull)
app.command()(local.rm)
app.command()(status.status)
app.add_typer(bench, name="bench")


def _show_version(value: bool) -> None:
    if value:
        print(f"rayline {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; an error goes to standard error in one line, with exit code 1."""
    try:
        app()
    except LLMError as error:
        sys.exit(f"rayline: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
