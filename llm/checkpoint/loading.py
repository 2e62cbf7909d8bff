"""Fills a `DecoderModel` from files of weights, tensor by tensor, straight into its memory."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress as ProgressBar, TextColumn, TransferSpeedColumn

from llm.checkpoint.model_config import load_model_config
from llm.checkpoint.tensor_copies import OtherHeadError, TensorCopy, find_copies
from llm.config import ModelConfig
from llm.core.partition import WHOLE, Partition
from llm.errors import CheckpointError
from llm.models.decoder import DecoderModel
from llm.models.quantized import quantized_modules
from llm.models.registry import FAMILIES

Progress = bool | Callable[[int, int], None]
"""Whether to show a progress bar; or what to call with the bytes done and their total."""

logger = logging.getLogger(__name__)

_NUM_THREADS = 4


@dataclass(frozen=True, slots=True)
class CheckedCheckpoint:
    """What can be known of a checkpoint without reading its weights.

    Attributes:
        config: shape of its model, as its files hold it.
        warnings: where its files disagree, each in one line.
    """

    config: ModelConfig
    warnings: tuple[str, ...] = ()


def load_decoder(
    directory: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    partition: Partition = WHOLE,
    progress: Progress = True,
) -> DecoderModel:
    """Make the model that a Hugging Face directory describes, or a part of it, and fill it from its weights.

    Args:
        device: where the parameters are made; weights go there directly.
        dtype: of the parameters, whatever the files hold.
        partition: which part to read; of the rest no more than the files' headers is.
        progress: show a progress bar in bytes; or what to call with the bytes done and their total.

    Raises:
        CheckpointError, ConfigError: what is wrong with which file, in one line.
    """
    checked = check_checkpoint(directory)  # before memory is taken: is everything there?
    for warning in checked.warnings:
        logger.warning(warning)
    model = DecoderModel.from_config(checked.config, device="meta", dtype=dtype, partition=partition)
    model = model.to_empty(device=device)
    load_checkpoint(model, directory, progress=progress)
    return model.eval().requires_grad_(False)


def check_checkpoint(directory: str | Path) -> CheckedCheckpoint:
    """See that a directory can be loaded, by its configuration and the headers of its files.

    No weight is read, but those of an output head that `tie_word_embeddings` says is not there: one that differs from
    the embeddings is what the model was trained with, and is used.

    Raises:
        CheckpointError, ConfigError: what is wrong with which file, in one line.
    """
    directory = Path(directory)
    config = load_model_config(directory)
    with ExitStack() as files:
        try:
            find_copies(DecoderModel.from_config(config, device="meta"), directory, files)
        except OtherHeadError as error:
            untied = config.model_copy(update={"tie_embeddings": False})
            find_copies(DecoderModel.from_config(untied, device="meta"), directory, files)
            warning = f"{error}; the file's is used; set tie_word_embeddings to false"
            return CheckedCheckpoint(untied, (*_notes(config, directory), warning))
    return CheckedCheckpoint(config, _notes(config, directory))


def _notes(config: ModelConfig, directory: Path) -> tuple[str, ...]:
    """What is to be said of what a checkpoint can do and the engine cannot."""
    left_out = FAMILIES[config.architecture].left_out
    return () if left_out is None else (f"{directory}: {config.architecture} is served without {left_out}",)


@torch.no_grad()
def load_checkpoint(model: DecoderModel, directory: str | Path, *, progress: Progress = True) -> None:
    """Overwrite every parameter of `model`, which is not on the meta device, with a checkpoint's weights.

    No copy of the weights is made on the way: files are mapped into memory and each tensor is converted as it is
    copied to its place. After an error some parameters hold new values and some do not.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of another shape or type, or a file cannot be read.
    """
    directory = Path(directory)
    start = time.perf_counter()
    if model.cache_scales is not None:
        model.cache_scales.fill_(1)
    with ExitStack() as files:
        copies = find_copies(model, directory, files)
        num_bytes = _run(copies, directory.name, progress=progress)
    for _, module in quantized_modules(model):
        module.simplify()
    elapsed = time.perf_counter() - start
    num_files = len({copy.path for copy in copies})
    logger.info("loaded %s: %.2f GB from %d files in %.1f s", directory, num_bytes / 1e9, num_files, elapsed)


def _run(copies: list[TensorCopy], title: str, *, progress: Progress) -> int:
    """Make the copies, several at a time; return the bytes filled."""
    num_bytes = sum(copy.num_bytes for copy in copies)
    num_done = 0
    with _progress_bar(enabled=progress is True) as bar, ThreadPoolExecutor(_NUM_THREADS) as pool:
        task = bar.add_task(f"loading {title}", total=num_bytes)
        try:
            for done in pool.map(TensorCopy.run, copies):
                num_done += done
                bar.advance(task, done)
                if callable(progress):
                    progress(num_done, num_bytes)
        except CheckpointError:
            pool.shutdown(cancel_futures=True)
            raise
    return num_bytes


def _progress_bar(*, enabled: bool) -> ProgressBar:
    return ProgressBar(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not enabled,
    )
