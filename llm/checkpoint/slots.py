"""`Slot`: where one tensor of a checkpoint goes, and what becomes of it on the way."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

Shape = tuple[int, ...]
Convert = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
INTEGERS = frozenset({"I32", "I64"})
BYTES = frozenset({"U8"})
"""Types that tensors of a file may have, as safetensors names them."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a tensor of a checkpoint, and where it goes.

    Attributes:
        source: where in the tensor it is, once that is converted.
        target: the part of a parameter that it fills.
        repack: makes what the target takes of it; None for as it is.
    """

    source: tuple[slice, ...]
    target: torch.Tensor
    repack: Callable[[torch.Tensor], torch.Tensor] | None = None

    def fill(self, tensor: torch.Tensor) -> None:
        """Copy the part of this tensor."""
        part = tensor[self.source]
        self.target.copy_(part if self.repack is None else self.repack(part))


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one tensor of a checkpoint goes.

    Attributes:
        target: the part of a parameter that it fills; None for nowhere.
        shapes: those that it may have.
        kinds: the types that it may have, as safetensors names them.
        convert: makes what the target takes of it, on the target's device; None to copy it as it is.
        companion: name of the tensor that `convert` gets beside it, where there is one.
        is_optional: whether a checkpoint may lack it.
        pieces: what is taken of the tensor where the model is a part of one; `target` is then that of a whole one. None
            for all of it.
        stack: name of the tensor that holds it, and that of the other experts, where a checkpoint has that instead.
    """

    target: torch.Tensor | None
    shapes: tuple[Shape, ...]
    kinds: frozenset[str] = FLOATS
    convert: Convert | None = None
    companion: str | None = None
    is_optional: bool = False
    pieces: tuple[Piece, ...] | None = None
    stack: str | None = None

    @property
    def filled(self) -> tuple[Piece, ...]:
        """What is taken, and where it goes."""
        if self.pieces is not None:
            return self.pieces
        return () if self.target is None else (Piece((), self.target),)


NOT_NEEDED = Slot(None, (), is_optional=True)
"""Of what says nothing that is not known, and of scales of activations: those are kept in 16 bits, or rounded by the
scales that they turn out to need."""
