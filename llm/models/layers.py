"""Modules that the layers of several families share."""

import torch
import torch.nn.functional as F
from torch import nn

from llm.config import Activation


class RMSNorm(nn.Module):
    """Root-mean-square normalization (Zhang & Sennrich 2019, arXiv:1910.07467).

    Args:
        size: size of the last dimension.
        eps: added to the mean square.
        offset: added to the weights, which then scale the result in float32 before it is rounded: 1 if weights are
            differences from 1 (Gemma), 0 if they are factors. None for scaling in the format of the input, after the
            rounding (Llama).
    """

    def __init__(self, size: int, eps: float, offset: float | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1 - (offset or 0.0)))
        self.eps = eps
        self.offset = offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize the last dimension. The result is computed in float32 and rounded where Hugging Face rounds."""
        # Spelled out: on a CPU F.rms_norm takes three times as long for a single token.
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.offset is None:
            return normed.to(x.dtype) * self.weight
        return (normed * (self.weight.float() + self.offset)).to(x.dtype)


def activate(gate: torch.Tensor, activation: Activation) -> torch.Tensor:
    """Apply the activation to the gate of a gated feed-forward, elementwise."""
    match activation:
        case Activation.SILU:
            return F.silu(gate)
        case Activation.GELU_TANH:
            return F.gelu(gate, approximate="tanh")
