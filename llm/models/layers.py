"""Modules that the layers of several families consist of."""

import torch
import torch.nn.functional as F
from torch import nn

from llm.config import Activation


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang & Sennrich 2019, arXiv:1910.07467).

    Args:
        size: of the last dimension.
        eps: added to the mean square.
        offset: added to the weights, in float32, by which the result is then scaled before it is rounded: 1 where
            weights are differences from 1 (Gemma), 0 where they are factors. None for scaling in the format of the
            input, behind the rounding (Llama).
    """

    def __init__(self, size: int, eps: float, offset: float | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1 - (offset or 0.0)))
        self.eps = eps
        self.offset = offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension; computed in float32, rounded where Hugging Face rounds."""
        # Spelled out: on a CPU F.rms_norm takes three times as long for a single token.
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.offset is None:
            return normed.to(x.dtype) * self.weight
        return (normed * (self.weight.float() + self.offset)).to(x.dtype)


def activate(gate: torch.Tensor, activation: Activation) -> torch.Tensor:
    """The gate of a gated feed-forward, elementwise."""
    match activation:
        case Activation.SILU:
            return F.silu(gate)
        case Activation.GELU_TANH:
            return F.gelu(gate, approximate="tanh")
