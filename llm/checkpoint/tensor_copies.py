"""Pairs each tensor of a checkpoint's files with its place in a model, and copies it there."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llm.checkpoint.cut_slots import find_held_slots
from llm.checkpoint.gguf_weights import GGUFWeights
from llm.checkpoint.hub import is_gguf
from llm.checkpoint.json_files import is_pointer, pointer_fault
from llm.checkpoint.slots import FLOATS, Slot
from llm.checkpoint.weight_files import DOWNLOAD, Files, candidate_files
from llm.checkpoint.weight_names import EMBEDDINGS, HEAD, canonical_names, is_behind, is_never_needed, is_of_other_part
from llm.checkpoint.weight_slots import canonical_scale_name
from llm.errors import CheckpointError
from llm.models.decoder import DecoderModel
from llm.models.family import Family
from llm.models.registry import FAMILIES

_ROWS_COMPARED = 4096
_QUANTIZED_KINDS = frozenset({"U8", "I32", "F8_E4M3", "F8_E5M2"})
_QUANTIZED_LEAVES = (
    ".qweight", ".qzeros", ".scales", ".g_idx", ".weight_packed", ".weight_scale", ".weight_scale_inv",
    ".weight_zero_point", ".absmax", ".SCB", "_blocks", "_scales", ".biases",
)  # fmt: skip
"""Ends of the names of tensors that tools write only of quantized weights."""


class OtherHeadError(CheckpointError):
    """The configuration ties the output head to the embeddings, but the files hold another one."""


@dataclass(frozen=True, slots=True)
class TensorCopy:
    """One tensor of a file and its slot, with the companion that the slot asks for, if there is one."""

    file: Any
    path: Path
    name: str
    slot: Slot
    companion: "TensorCopy | None" = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the model that this copy fills."""
        return sum(piece.target.nbytes for piece in self.slot.filled)

    def run(self) -> int:
        """Read, convert and copy the tensor; return the bytes filled.

        Raises:
            CheckpointError: the tensor cannot be read, holds NaN, or does not fit into float16.
        """
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
                if any(_overflows(piece.target, tensor) for piece in pieces):
                    raise CheckpointError(
                        f"{self.path}: {self.name} holds numbers past the range of float16; set dtype to bfloat16, or "
                        "to float32"
                    )
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: {self.name} cannot be read ({error}); {DOWNLOAD}") from error
        return self.num_bytes

    def _read(self) -> torch.Tensor:
        tensor: torch.Tensor = self.file.get_tensor(self.name)
        return tensor


def find_copies(model: DecoderModel, directory: Path, files: ExitStack) -> list[TensorCopy]:
    """Pair each tensor of the first files that hold them all with its place.

    Args:
        files: keeps the files open.

    Raises:
        OtherHeadError: the files hold an output head that the configuration says is not there.
        CheckpointError: no files hold all tensors; the message says what is wrong with the likeliest ones.
    """
    failure: CheckpointError | None = None
    for candidate in candidate_files(directory):
        try:
            return _plan(model, directory, candidate, files)
        except OtherHeadError:
            raise
        except CheckpointError as error:
            failure = failure or error
    assert failure is not None, "there is a candidate"
    raise failure


def _plan(model: DecoderModel, directory: Path, candidate: Files, files: ExitStack) -> list[TensorCopy]:
    """Pair each tensor of some files with its place; each place is filled exactly once.

    Raises:
        OtherHeadError, CheckpointError: see `find_copies`.
    """
    slots = find_held_slots(model)
    found = [(path, file, name) for path, file, names in _open_all(candidate, files) for name in names]
    family = FAMILIES[model.config.architecture]
    names = canonical_names((name for _, _, name in found), slots, family.renamed)
    copies: dict[str, TensorCopy] = {}
    head: TensorCopy | None = None
    for path, file, name in found:
        place = canonical_scale_name(names[name])
        if place in slots:
            if place in copies:
                raise CheckpointError(f"{path} and {copies[place].path.name} both hold {name}; remove one of them")
            copies[place] = TensorCopy(file, path, name, slots[place])
            _check_tensor(copies[place])
        elif place == HEAD and model.score is not None:
            continue  # a leftover of the model that it was trained from, which transformers leaves out, too
        elif place == HEAD and model.lm_head is None:
            head = TensorCopy(file, path, name, slots[EMBEDDINGS])
        elif not is_never_needed(place) and not _is_left_out(family, name, place, model.num_layers):
            if place.removesuffix(".bias") + ".qweight" in slots and not file.get_tensor(name).any():
                continue  # older versions of AutoGPTQ wrote a bias of zeros for each projection
            if model.config.quantization is None and name.endswith(_QUANTIZED_LEAVES):
                raise CheckpointError(_unsaid_format(path, name))
            raise CheckpointError(_without_place(path, name))
    if head is not None:
        _settle_head(head, copies)
    _check_whole(directory, slots, copies)
    return [replace(copy, companion=copies.get(copy.slot.companion or "")) for copy in copies.values()]


def _check_whole(directory: Path, slots: Mapping[str, Slot], copies: Mapping[str, TensorCopy]) -> None:
    """Check that each place is filled, those of experts either one by one or by their stack.

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
        fix = "set 'tie_word_embeddings' to true in config.json if the embeddings serve as the head"
        fix = fix if missing == {HEAD} else DOWNLOAD
        raise CheckpointError(f"{directory} lacks {_some(missing)}; {fix}")


def _is_left_out(family: Family, name: str, place: str, num_layers: int) -> bool:
    """Whether a tensor belongs to a part of the checkpoint that the engine does not run."""
    if family.left_out is None:
        return False
    return is_of_other_part(name) or (family.has_layers_behind and is_behind(place, num_layers))


def _settle_head(head: TensorCopy, copies: dict[str, TensorCopy]) -> None:
    """Decide what to do with an output head if the model has none: it fills the embeddings if the files lack those.

    Raises:
        OtherHeadError: it differs from the embeddings.
    """
    if EMBEDDINGS not in copies:
        _check_tensor(head)
        copies[EMBEDDINGS] = head
    elif _differ(head, copies[EMBEDDINGS]):
        raise OtherHeadError(
            f"{head.path} holds {head.name}, which differs from the embeddings that config.json ties it to"
        )


def _differ(one: TensorCopy, other: TensorCopy) -> bool:
    """Whether two matrices differ in shape or in any number."""
    first, second = (copy.file.get_tensor(copy.name) for copy in (one, other))
    return first.shape != second.shape or any(
        not torch.equal(rows.to(torch.float32), others.to(torch.float32))
        for rows, others in zip(first.split(_ROWS_COMPARED), second.split(_ROWS_COMPARED), strict=True)
    )


def _check_tensor(copy: TensorCopy) -> None:
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
    """The message for a quantized tensor whose format the configuration does not name."""
    return (
        f"{path} holds {what}, which is quantized, but config.json does not say so for it; use a checkpoint whose "
        "quantization_config says how, or one in bfloat16 or float16"
    )


def _without_place(path: Path, name: str) -> str:
    """The message for a tensor that the model has no place for."""
    if ".base_layer." in name or ".lora_" in name:
        return f"{path} holds {name}, of an adapter that is not merged; save the model behind PEFT's merge_and_unload()"
    return f"{path} holds {name}, for which config.json has no place; is it the right one?"


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
    """The first three names, and the number of the others."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return ", ".join(ordered[:3]) + more


def _has_nan(numbers: torch.Tensor) -> bool:
    """Whether any number is NaN. Allocates no memory; codes of 8 bits and fewer are not examined."""
    if not numbers.is_floating_point() or numbers.element_size() == 1 or not numbers.numel():
        return False
    return bool(torch.aminmax(numbers)[0].isnan())


def _overflows(target: torch.Tensor, tensor: torch.Tensor) -> bool:
    """Whether numbers of a tensor have become infinite in the place that they were copied to."""
    if target.dtype is not torch.float16 or not tensor.is_floating_point() or tensor.element_size() == 1:
        return False
    return _has_infinity(target) and not _has_infinity(tensor)


def _has_infinity(numbers: torch.Tensor) -> bool:
    return bool(numbers.numel()) and any(bool(bound.isinf()) for bound in torch.aminmax(numbers))
