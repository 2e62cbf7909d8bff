"""Fills a `DecoderModel` from files of weights, tensor by tensor, straight into its memory."""

import logging
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress as ProgressBar, TextColumn, TransferSpeedColumn
from safetensors import SafetensorError, safe_open

from llm.checkpoint.gguf_directory import find_weights
from llm.checkpoint.gguf_weights import GGUFWeights
from llm.checkpoint.hub import is_gguf
from llm.checkpoint.json_files import read_json
from llm.checkpoint.model_config import load_model_config
from llm.config import ModelConfig
from llm.errors import CheckpointError
from llm.models.decoder import DecoderModel
from llm.models.registry import destinations

Progress = bool | Callable[[int, int], None]
"""Whether to show a progress bar; or what to call with the bytes done and their total."""

logger = logging.getLogger(__name__)

_NUM_THREADS = 4
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_NOT_OUR_WEIGHTS = ("consolidated", "adapter_")
_DOWNLOAD = "download the checkpoint again"


@dataclass(frozen=True, slots=True)
class _Copy:
    """One tensor of a file and the part of a parameter that it fills."""

    file: Any
    path: Path
    name: str
    target: torch.Tensor

    @property
    def num_bytes(self) -> int:
        return self.target.numel() * self.target.element_size()

    def run(self) -> int:
        """Copy; return the bytes filled."""
        try:
            # Modes are a thread's own, and a tensor made in inference mode can only be written there.
            with torch.inference_mode(self.target.is_inference()):
                self.target.copy_(self.file.get_tensor(self.name))
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: {self.name} cannot be read ({error}); {_DOWNLOAD}") from error
        return self.num_bytes


def load_decoder(
    directory: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress = True,
) -> DecoderModel:
    """Make the model that a Hugging Face directory describes and fill it from its weights.

    Args:
        device: where the parameters are made; weights go there directly.
        dtype: of the parameters, whatever the files hold.
        progress: show a progress bar in bytes; or what to call with the bytes done and their total.

    Raises:
        CheckpointError, ConfigError: what is wrong with which file, in one line.
    """
    config = load_model_config(directory)
    _weight_files(Path(directory))  # before memory is taken: are they all there?
    model = DecoderModel.from_config(config, device="meta", dtype=dtype).to_empty(device=device)
    load_checkpoint(model, directory, progress=progress)
    return model.eval().requires_grad_(False)


def check_checkpoint(directory: str | Path) -> ModelConfig:
    """See that a directory can be loaded, by its configuration and the headers of its files; no weight is read.

    Raises:
        CheckpointError, ConfigError: what is wrong with which file, in one line.
    """
    directory = Path(directory)
    config = load_model_config(directory)
    names_by_file = _weight_files(directory)
    with ExitStack() as stack:
        files = {path: stack.enter_context(_open(path)) for path in names_by_file}
        _plan(DecoderModel.from_config(config, device="meta"), directory, names_by_file, files)
    return config


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
    names_by_file = _weight_files(directory)
    with ExitStack() as stack:
        files = {path: stack.enter_context(_open(path)) for path in names_by_file}
        copies = _plan(model, directory, names_by_file, files)
        num_bytes = _run(copies, directory.name, progress=progress)
    elapsed = time.perf_counter() - start
    logger.info("loaded %s: %.2f GB from %d files in %.1f s", directory, num_bytes / 1e9, len(files), elapsed)


def _run(copies: list[_Copy], title: str, *, progress: Progress) -> int:
    """Make the copies, several at a time; return the bytes filled."""
    num_bytes = sum(copy.num_bytes for copy in copies)
    num_done = 0
    with _progress_bar(enabled=progress is True) as bar, ThreadPoolExecutor(_NUM_THREADS) as pool:
        task = bar.add_task(f"loading {title}", total=num_bytes)
        try:
            for done in pool.map(_Copy.run, copies):
                num_done += done
                bar.advance(task, done)
                if callable(progress):
                    progress(num_done, num_bytes)
        except CheckpointError:
            pool.shutdown(cancel_futures=True)
            raise
    return num_bytes


def _plan(
    model: DecoderModel, directory: Path, names_by_file: dict[Path, list[str] | None], files: dict[Path, Any]
) -> list[_Copy]:
    """Pair each tensor of the files with its place; each place is filled exactly once."""
    targets = _targets(model)
    copies: dict[str, _Copy] = {}
    for path, listed in names_by_file.items():
        file = files[path]
        held = file.keys()
        absent = set(listed or ()).difference(held)
        if absent:
            raise CheckpointError(f"{path} lacks {_some(absent)}, which its index lists; {_DOWNLOAD}")
        for name in held if listed is None else listed:
            if name in targets:
                if name in copies:
                    raise CheckpointError(f"{path} and {copies[name].path.name} both hold {name}; remove one of them")
                copies[name] = _Copy(file, path, name, targets[name])
                _check_tensor(copies[name])
            elif not _IGNORED.fullmatch(name) and not (name == "lm_head.weight" and model.lm_head is None):
                raise CheckpointError(f"{path} holds {name}, which config.json gives no place; is it the right one?")
    missing = targets.keys() - copies.keys()
    if missing:
        raise CheckpointError(f"{directory} lacks {_some(missing)}; {_DOWNLOAD}")
    return list(copies.values())


def _targets(model: DecoderModel) -> dict[str, torch.Tensor]:
    """The part of a parameter that each tensor of a checkpoint fills."""
    targets = {}
    for theirs, destination in destinations(model.config).items():
        module = model.get_submodule(destination.module)
        for leaf in ("weight", "bias"):
            parameter = getattr(module, leaf, None)
            if parameter is not None:
                targets[f"{theirs}.{leaf}"] = destination.part_of(parameter.detach())
    return targets


def _check_tensor(copy: _Copy) -> None:
    header = copy.file.get_slice(copy.name)
    shape, kind = tuple(header.get_shape()), header.get_dtype()
    if shape != tuple(copy.target.shape):
        raise CheckpointError(
            f"{copy.path}: {copy.name} has shape {shape}, config.json asks for {tuple(copy.target.shape)}; "
            "are both from the same checkpoint?"
        )
    if kind not in _FLOATS:
        raise CheckpointError(
            f"{copy.path}: {copy.name} has type {kind}; only float32, float16 and bfloat16 weights are supported"
        )


def _weight_files(directory: Path) -> dict[Path, list[str] | None]:
    """The files to read, each with the tensors to take from it: None for all of them."""
    index_path, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    gguf_path = find_weights(directory)
    if gguf_path is not None:
        files: dict[Path, list[str] | None] = {gguf_path: None}
    elif index_path.exists():
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index_path} has no weight_map; {_DOWNLOAD}")
        files = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise CheckpointError(f"{index_path} puts {name} in {file!r}, which is no file name; {_DOWNLOAD}")
            names = files.setdefault(directory / file, [])
            assert names is not None
            names.append(name)
    elif single.exists():
        files = {single: None}
    else:
        found = sorted(directory.glob("*.safetensors"))
        files = {path: None for path in found if not path.name.startswith(_NOT_OUR_WEIGHTS)}
    for path in files:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; {_DOWNLOAD}")
    if not files:
        pickles = [path for pattern in ("*.bin", "*.pt", "*.pth") for path in sorted(directory.glob(pattern))]
        if pickles:
            raise CheckpointError(
                f"{pickles[0]} is a pickle, which can run code when loaded and is not read; convert the checkpoint to "
                "safetensors with transformers' save_pretrained"
            )
        raise CheckpointError(f"{directory} holds no .safetensors file; {_DOWNLOAD}")
    return files


def _open(path: Path) -> Any:
    if is_gguf(path):
        return GGUFWeights(path)
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or cut short ({error}); {_DOWNLOAD}") from error


def _some(names: Iterable[str]) -> str:
    """A few of the names, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return ", ".join(ordered[:3]) + more


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
