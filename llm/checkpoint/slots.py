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
    """A part of a checkpoint's tensor, and the place that it fills.

    Attributes:
        source: the part, as indices into the converted tensor.
        target: the part of a parameter that it fills.
        repack: turns the part into what the target holds; None to copy it as it is.
    """

    source: tuple[slice, ...]
    target: torch.Tensor
    repack: Callable[[torch.Tensor], torch.Tensor] | None = None

    def fill(self, tensor: torch.Tensor) -> None:
        """Copy this piece's part of the converted tensor to the target."""
        part = tensor[self.source]
        self.target.copy_(part if self.repack is None else self.repack(part))


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one tensor of a checkpoint goes.

    Attributes:
        target: the part of a parameter that the tensor fills; None if it is not needed.
        shapes: the shapes that it may have.
        kinds: the types that it may have, as safetensors names them.
        convert: turns it into what the target holds, on the target's device; None to copy it as it is.
        companion: name of the tensor that `convert` gets as its second argument; None for none.
        is_optional: whether a checkpoint may lack it.
        pieces: the pieces that a rank takes if it holds a part of the model; `target` is then that of the whole model.
            None to take the whole tensor.
        stack: name of the tensor of all experts that a checkpoint may have in place of one tensor for each expert.
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
        """The pieces of the tensor that are copied."""
        if self.pieces is not None:
            return self.pieces
        return () if self.target is None else (Piece((), self.target),)


NOT_NEEDED = Slot(None, (), is_optional=True)
"""The slot of a tensor that says nothing new, or holds scales of activations: the engine keeps those in 16 bits, or
rounds them by scales that it computes itself."""
