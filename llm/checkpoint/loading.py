"""Fills a `DecoderModel` from files of weights, tensor by tensor, straight into its memory."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress as ProgressBar, TextColumn, TransferSpeedColumn
from safetensors import SafetensorError, safe_open

from llm.checkpoint.cut_slots import find_held_slots
from llm.checkpoint.gguf_weights import GGUFWeights
from llm.checkpoint.hub import is_gguf
from llm.checkpoint.json_files import is_pointer, pointer_fault
from llm.checkpoint.model_config import load_model_config
from llm.checkpoint.weight_files import DOWNLOAD, Files, candidate_files
from llm.checkpoint.weight_names import EMBEDDINGS, HEAD, canonical_names, is_behind, is_buffer, is_of_other_part
from llm.checkpoint.weight_slots import FLOATS, Slot, canonical_scale_name
from llm.config import ModelConfig
from llm.core.partition import WHOLE, Partition
from llm.errors import CheckpointError
from llm.models.decoder import DecoderModel
from llm.models.family import Family
from llm.models.quantized import quantized_modules
from llm.models.registry import FAMILIES

Progress = bool | Callable[[int, int], None]
"""Whether to show a progress bar; or what to call with the bytes done and their total."""

logger = logging.getLogger(__name__)

_NUM_THREADS = 4
_ROWS_COMPARED = 4096
_QUANTIZED_KINDS = frozenset({"U8", "I32", "F8_E4M3", "F8_E5M2"})
_QUANTIZED_LEAVES = (
    ".qweight", ".qzeros", ".scales", ".g_idx", ".weight_packed", ".weight_scale", ".weight_scale_inv",
    ".weight_zero_point", ".absmax", ".SCB", "_blocks", "_scales", ".biases",
)  # fmt: skip
"""Ends of the names of tensors that tools write only of quantized weights."""


class _OtherHeadError(CheckpointError):
    """The configuration ties the output head to the embeddings, but the files hold another one."""


@dataclass(frozen=True, slots=True)
class CheckedCheckpoint:
    """What can be known of a checkpoint without reading its weights.

    Attributes:
        config: shape of its model, as its files hold it.
        warnings: where its files disagree, each in one line.
    """

    config: ModelConfig
    warnings: tuple[str, ...] = ()


def _has_nan(numbers: torch.Tensor) -> bool:
    """Whether any of these numbers is none. Takes no memory; codes of 8 bits and less are not looked at."""
    if not numbers.is_floating_point() or numbers.element_size() == 1 or not numbers.numel():
        return False
    return bool(torch.aminmax(numbers)[0].isnan())


@dataclass(frozen=True, slots=True)
class _Copy:
    """One tensor of a file and where it goes, with the tensor that says how, if there is one."""

    file: Any
    path: Path
    name: str
    slot: Slot
    companion: "_Copy | None" = None

    @property
    def num_bytes(self) -> int:
        return sum(piece.target.nbytes for piece in self.slot.filled)

    def run(self) -> int:
        """Copy; return the bytes filled."""
        pieces, convert = self.slot.filled, self.slot.convert
        if not pieces:
            return 0
        target = pieces[0].target
        try:
            # Modes are a thread's own, and a tensor made in inference mode can only be written there.
            with torch.inference_mode(target.is_inference()):
                tensor = self._read()  # of a mapped file: what no piece takes of it is never read
                if convert is not None:
                    companion = None if self.companion is None else self.companion._read().to(target.device)
                    tensor = convert(tensor.to(target.device), companion)
                for piece in pieces:
                    piece.fill(tensor)
                if any(_has_nan(piece.target) for piece in pieces):
                    raise CheckpointError(
                        f"{self.path}: {self.name} holds NaN, and no answer can be computed with it; {DOWNLOAD}, or "
                        "an earlier state of the training"
                    )
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: {self.name} cannot be read ({error}); {DOWNLOAD}") from error
        return self.num_bytes

    def _read(self) -> torch.Tensor:
        tensor: torch.Tensor = self.file.get_tensor(self.name)
        return tensor


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
            _find_weights(DecoderModel.from_config(config, device="meta"), directory, files)
        except _OtherHeadError as error:
            untied = config.model_copy(update={"tie_embeddings": False})
            _find_weights(DecoderModel.from_config(untied, device="meta"), directory, files)
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
        copies = _find_weights(model, directory, files)
        num_bytes = _run(copies, directory.name, progress=progress)
    for _, module in quantized_modules(model):
        module.simplify()
    elapsed = time.perf_counter() - start
    num_files = len({copy.path for copy in copies})
    logger.info("loaded %s: %.2f GB from %d files in %.1f s", directory, num_bytes / 1e9, num_files, elapsed)


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


def _find_weights(model: DecoderModel, directory: Path, files: ExitStack) -> list[_Copy]:
    """Pair each tensor of the first files that hold them all with its place.

    Args:
        files: keeps them open.

    Raises:
        CheckpointError: there are no such files; what is wrong with the likeliest ones.
    """
    failure: CheckpointError | None = None
    for candidate in candidate_files(directory):
        try:
            return _plan(model, directory, candidate, files)
        except _OtherHeadError:
            raise
        except CheckpointError as error:
            failure = failure or error
    assert failure is not None, "there is a candidate"
    raise failure


def _plan(model: DecoderModel, directory: Path, candidate: Files, files: ExitStack) -> list[_Copy]:
    """Pair each tensor of some files with its place; each place is filled exactly once."""
    slots = find_held_slots(model)
    found = [(path, file, name) for path, file, names in _open_all(candidate, files) for name in names]
    names = canonical_names((name for _, _, name in found), slots)
    family = FAMILIES[model.config.architecture]
    copies: dict[str, _Copy] = {}
    head: _Copy | None = None
    for path, file, name in found:
        place = canonical_scale_name(names[name])
        if place in slots:
            if place in copies:
                raise CheckpointError(f"{path} and {copies[place].path.name} both hold {name}; remove one of them")
            copies[place] = _Copy(file, path, name, slots[place])
            _check_tensor(copies[place])
        elif place == HEAD and model.score is not None:
            continue  # a leftover of the model that it was trained from, which transformers leaves out, too
        elif place == HEAD and model.lm_head is None:
            head = _Copy(file, path, name, slots[EMBEDDINGS])
        elif not is_buffer(place) and not _is_left_out(family, name, place, model.num_layers):
            if place.removesuffix(".bias") + ".qweight" in slots and not file.get_tensor(name).any():
                continue  # older versions of AutoGPTQ wrote a bias of zeros for each projection
            if model.config.quantization is None and name.endswith(_QUANTIZED_LEAVES):
                raise CheckpointError(_unsaid_format(path, name))
            raise CheckpointError(f"{path} holds {name}, for which config.json has no place; is it the right one?")
    if head is not None:
        _settle_head(head, copies)
    _check_whole(directory, slots, copies)
    return [replace(copy, companion=copies.get(copy.slot.companion or "")) for copy in copies.values()]


def _check_whole(directory: Path, slots: Mapping[str, Slot], copies: Mapping[str, _Copy]) -> None:
    """See that each place is filled; those of experts either one by one or by their stack.

    Raises:
        CheckpointError: a tensor is missing, or an expert is there twice.
    """
    stacks = {slots[name].stack: name for name in copies if slots[name].stack is not None}
    twice = next((name for name in stacks if name in copies), None)
    if twice is not None:
        both = f"{copies[twice].name} and {copies[stacks[twice]].name}"
        raise CheckpointError(f"{directory} holds both {both}; {DOWNLOAD}")
    missing = {
        name
        for name, slot in slots.items()
        if not slot.is_optional and name not in copies and name not in stacks and slot.stack not in copies
    }
    if missing:
        raise CheckpointError(f"{directory} lacks {_some(missing)}; {DOWNLOAD}")


def _is_left_out(family: Family, name: str, place: str, num_layers: int) -> bool:
    """Whether a tensor is for what the engine cannot do."""
    if family.left_out is None:
        return False
    return is_of_other_part(name) or (family.has_layers_behind and is_behind(place, num_layers))


def _settle_head(head: _Copy, copies: dict[str, _Copy]) -> None:
    """See to an output head in the files of a model that has none of its own: embeddings that are missing are there.

    Raises:
        _OtherHeadError: it differs from the embeddings.
    """
    if EMBEDDINGS not in copies:
        _check_tensor(head)
        copies[EMBEDDINGS] = head
    elif _differ(head, copies[EMBEDDINGS]):
        raise _OtherHeadError(
            f"{head.path} holds {head.name}, which differs from the embeddings that config.json ties it to"
        )


def _differ(one: _Copy, other: _Copy) -> bool:
    """Whether two matrices of files are not the same."""
    first, second = (copy.file.get_tensor(copy.name) for copy in (one, other))
    return first.shape != second.shape or any(
        not torch.equal(rows.to(torch.float32), others.to(torch.float32))
        for rows, others in zip(first.split(_ROWS_COMPARED), second.split(_ROWS_COMPARED), strict=True)
    )


def _check_tensor(copy: _Copy) -> None:
    if copy.slot.target is None:
        return
    header = copy.file.get_slice(copy.name)
    shape, kind = tuple(header.get_shape()), header.get_dtype()
    if kind not in copy.slot.kinds:
        if kind in _QUANTIZED_KINDS and copy.slot.kinds == FLOATS:
            raise CheckpointError(_unsaid_format(copy.path, f"{copy.name} of type {kind}"))
        if copy.slot.kinds != FLOATS:
            raise CheckpointError(
                f"{copy.path}: {copy.name} has type {kind}, which is not what quantization_config says of it; name it "
                "among what is not quantized if that is so, or download both again"
            )
        raise CheckpointError(
            f"{copy.path}: {copy.name} has type {kind}; only float32, float16 and bfloat16 weights are supported"
        )
    if shape not in copy.slot.shapes:
        wanted = " or ".join(map(str, copy.slot.shapes))
        raise CheckpointError(
            f"{copy.path}: {copy.name} has shape {shape}, config.json asks for {wanted}; are both from the same "
            "checkpoint?"
        )


def _unsaid_format(path: Path, what: str) -> str:
    """Why a tensor cannot be read whose format nothing names."""
    return (
        f"{path} holds {what}, which is quantized, but config.json does not say so for it; use a checkpoint whose "
        "quantization_config says how, or one in bfloat16 or float16"
    )


def _open_all(candidate: Files, files: ExitStack) -> Iterator[tuple[Path, Any, list[str]]]:
    """Open files; each comes with the names of the tensors to take from it."""
    for path in candidate:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; {DOWNLOAD}")
    for path, listed in candidate.items():
        file = files.enter_context(_open(path))
        held = file.keys()
        absent = set(listed or ()).difference(held)
        if absent:
            raise CheckpointError(f"{path} lacks {_some(absent)}, which its index lists; {DOWNLOAD}")
        yield path, file, held if listed is None else listed


def _open(path: Path) -> Any:
    if is_gguf(path):
        return GGUFWeights(path)
    if is_pointer(path):
        raise CheckpointError(pointer_fault(path))
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or cut short ({error}); {DOWNLOAD}") from error


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
