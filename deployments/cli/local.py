"""`rayline list` and `rayline rm`: the models that are on this machine."""

import sys
from typing import Annotated

import typer
from rich.table import Table

from deployments.cli.output import make_console
from llm.checkpoint.local_models import local_models, remove_local_model


def list_models() -> None:
    """List the downloaded models, by the names that rayline serve accepts.

    Directories and files that you placed somewhere yourself are not listed.

        rayline list
    """
    models = local_models()
    if not models:
        print("rayline: no model has been downloaded; try: rayline pull smollm2", file=sys.stderr)
        return
    table = Table("model", "from", "size", "where", box=None, header_style="bold")
    for model in models:
        table.add_row(model.name, model.origin, size_text(model.num_bytes), str(model.path))
    make_console().print(table)


def rm(models: Annotated[list[str], typer.Argument(help="Names, as rayline list shows them.")]) -> None:
    """Remove downloaded models, with all of their revisions.

    rayline rm smollm2
    """
    for model in models:
        print(f"{model}: {size_text(remove_local_model(model))} freed")


def size_text(num_bytes: int) -> str:
    """A number of bytes in readable form."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
