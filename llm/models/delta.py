"""The gated delta-net layer's own modules (Yang et al. 2024, arXiv:2412.06464), which families put behind a norm."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from llm.core.recurrent_state import DeltaSpec
from llm.models.layers import RMSNorm

_MULTIPLE = 64
"""Outputs that the kernels for few rows take at once."""


class ExactLinear(nn.Linear):
    """A projection whose weight is never rounded to fewer bits: small, but it decides what a state keeps.

    It has some outputs more than is asked for, which mean nothing, up to a number that kernels like.
    """

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__(num_inputs, -(-num_outputs // _MULTIPLE) * _MULTIPLE, bias=False)


class ShortConvolution(nn.Module):
    """Weights of a causal convolution of each channel by itself, (channels, 1, kernel_size), the last the newest's."""

    def __init__(self, num_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_channels, 1, kernel_size))


class DeltaMixer(nn.Module):
    """What stands between a delta-net layer's first projections and its last: convolution, decay, norm with a gate.

    Args:
        spec: of the rule.
        eps: of the norm.

    Attributes:
        conv1d: in front of the rule.
        A_log: (num_value_heads,) float32 whatever the model's format is, log of the rate of decay.
        dt_bias: (num_value_heads,), added to what the token says about its decay.
        norm: of each head's output, before it is gated.
    """

    def __init__(self, spec: DeltaSpec, eps: float) -> None:
        super().__init__()
        self.conv1d = ShortConvolution(spec.conv_size, spec.kernel_size)
        self.A_log = nn.Parameter(torch.zeros(spec.num_value_heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.zeros(spec.num_value_heads))
        self.norm = RMSNorm(spec.value_dim, eps)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "DeltaMixer":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.A_log.data = self.A_log.data.float()
        return self

    def log_decay(self, rate: torch.Tensor) -> torch.Tensor:
        """Log of the decay of each head, float32, at most 0, from what the token says, (…, num_value_heads)."""
        return -(self.A_log.exp() * F.softplus(rate.float() + self.dt_bias.float()))

    def gated_norm(self, output: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """The norm of each head's output, (…, value_dim), scaled by SiLU of its gate; in float32 behind the norm."""
        normed: torch.Tensor = self.norm(output)
        return (normed.float() * F.silu(gate.float())).to(output.dtype)
