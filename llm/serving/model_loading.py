"""Loads the model of a checkpoint, or a rank's part of it, for an engine."""

from pathlib import Path

import msgspec
import torch

from llm.checkpoint.adapter import load_lora
from llm.checkpoint.loading import Progress, load_decoder
from llm.checkpoint.model_config import load_model_config
from llm.core.partition import WHOLE, Partition
from llm.models.decoder import DecoderModel


class ModelSource(msgspec.Struct, frozen=True, kw_only=True):
    """Where the weights of an engine's model come from, and how they are held. All ranks are given the same one."""

    directory: str
    """Directory of the checkpoint."""
    device: str
    """Where rank 0 holds its part: "cpu", or a GPU with its number; the other ranks take the GPUs after it."""
    dtype: str
    """Data type of parameters and activations, by its name in torch."""
    lora: str | None = None
    """Directory of a PEFT adapter to merge into the weights; None for none."""
    random_weights: bool = False
    """Whether the weights are random ones of the checkpoint's shape."""

    def device_of(self, rank: int) -> torch.device:
        """Where a rank's part lives."""
        device = torch.device(self.device)
        return device if device.type != "cuda" else torch.device("cuda", device.index + rank)


def load_model(source: ModelSource, partition: Partition = WHOLE, *, progress: Progress = True) -> DecoderModel:
    """Load a model, with its adapter merged if there is one, in evaluation mode.

    Args:
        partition: which part to load.
        progress: see `load_decoder`.

    Raises:
        CheckpointError, ConfigError: something is wrong with the checkpoint; the message says how to fix it.
    """
    directory, device, dtype = Path(source.directory), source.device_of(partition.rank), getattr(torch, source.dtype)
    if source.random_weights:
        config = load_model_config(directory)
        model = DecoderModel.from_config(config, device=device, dtype=dtype, partition=partition)
    else:
        model = load_decoder(directory, device=device, dtype=dtype, partition=partition, progress=progress)
    if source.lora is not None:
        load_lora(model, source.lora)
        model.merge_lora()
    return model.eval()
