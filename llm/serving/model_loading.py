"""Loads the model of a checkpoint, or a rank's part of it, for an engine."""

from pathlib import Path

import torch

from llm.checkpoint.adapter import load_lora
from llm.checkpoint.loading import Progress, load_decoder
from llm.checkpoint.model_config import load_model_config
from llm.core.partition import WHOLE, Partition
from llm.errors import ConfigError
from llm.models.decoder import DecoderModel


def load_model(
    directory: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    load_format: str = "auto",
    lora: str | Path | None = None,
    partition: Partition = WHOLE,
    progress: Progress = True,
) -> DecoderModel:
    """Load the model of a directory, with an adapter merged into its weights if there is one.

    Args:
        load_format: "auto" for the checkpoint's weights, "random" for random ones of its shape.

    Raises:
        CheckpointError, ConfigError: something is wrong with the checkpoint; the message says how to fix it.
    """
    if load_format == "random":
        config = load_model_config(directory)
        model = DecoderModel.from_config(config, device=device, dtype=dtype, partition=partition)
    elif load_format == "auto":
        model = load_decoder(directory, device=device, dtype=dtype, partition=partition, progress=progress)
    else:
        raise ConfigError(f"unknown load_format {load_format!r}; known: auto, random")
    if lora is not None:
        load_lora(model, lora)
        model.merge_lora()
    return model
