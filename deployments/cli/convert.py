"""`rayline convert`: a GGUF file as a Hugging Face checkpoint."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from llm.checkpoint.hub import is_gguf
from llm.errors import CheckpointError


class WeightType(StrEnum):
    """Number format of the written weights."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


def convert(
    file: Annotated[Path, typer.Argument(help="GGUF file.")],
    directory: Annotated[Path, typer.Argument(help="New directory.")],
    dtype: Annotated[WeightType, typer.Option(help="Number format of the weights.")] = WeightType.BFLOAT16,
) -> None:
    """Write a GGUF file as a Hugging Face checkpoint in safetensors.

    GGUF files are served as they are. A checkpoint starts faster, and can be
    used where the package gguf is not, by transformers too.

        rayline convert Qwen3-0.6B-Q8_0.gguf Qwen3-0.6B
    """
    import torch

    from llm.checkpoint.gguf_convert import convert as write

    if not is_gguf(file):
        raise CheckpointError(f"{file} is not a GGUF file; name one that is")
    write(file, directory, getattr(torch, dtype))
