"""`PackedStep`: what a step runs, as tensors on the device."""

from dataclasses import dataclass

import torch

from llm.kernels.attention.work import StepParts
from llm.models.kernel_adapters import PackedAdapters


@dataclass(frozen=True, slots=True)
class StepTokens:
    """The step's tokens, (tokens,) int32 each. The tokens of one part are adjacent, in order of position.

    Attributes:
        token_ids: ids of the tokens; negative for the token that the row drew last.
        positions: positions in their sequences.
        rows: rows of their sequences.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    rows: torch.Tensor


@dataclass(frozen=True, slots=True)
class PackedStep:
    """The tokens that a step runs, and how they are grouped.

    Attributes:
        tokens: all tokens of the step.
        parts: how the tokens are grouped; a token outside every part must be on a row that is never read.
        kept: (kept,) int32, indices of the requested tokens.
        has_prefills: whether any part has more than one new token.
        num_gathered: the result of `KernelAttention.num_gathered_tokens` for these parts.
        adapters: those of the tokens, for `AdaptedOperations`; None if no token has one.
    """

    tokens: StepTokens
    parts: StepParts
    kept: torch.Tensor
    has_prefills: bool
    num_gathered: int = 0
    adapters: PackedAdapters | None = None
