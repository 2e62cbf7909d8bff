"""The modules of a gated delta-net layer (Yang et al. 2024, arXiv:2412.06464), which families put after a norm."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from llm.core.recurrent_state import DeltaSpec
from llm.models.layers import RMSNorm

_MULTIPLE = 64
"""Number of outputs that the kernels for few rows process at once."""


class ExactLinear(nn.Linear):
    """A projection whose weight is never rounded to fewer bits. It is small, but it decides what a state keeps.

    It is padded with unused outputs up to a number that suits the kernels.
    """

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__(num_inputs, -(-num_outputs // _MULTIPLE) * _MULTIPLE, bias=False)


class ShortConvolution(nn.Module):
    """Weights of a causal convolution over each channel separately, (channels, 1, kernel_size), the newest token's
    last."""

    def __init__(self, num_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_channels, 1, kernel_size))


class DeltaMixer(nn.Module):
    """The modules between a delta-net layer's first projections and its last: convolution, decay, and gated norm.

    Args:
        spec: shape of the rule.
        eps: epsilon of the norm.

    Attributes:
        conv1d: the convolution before the rule.
        A_log: (num_value_heads,) log of the rate of decay, float32 whatever the model's format.
        dt_bias: (num_value_heads,), added to each token's projected decay.
        norm: norm of each head's output, applied before the gate.
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
        """Log of each head's decay, float32 and at most 0, from each token's projection, (…, num_value_heads)."""
        return -(self.A_log.exp() * F.softplus(rate.float() + self.dt_bias.float()))

    def gated_norm(self, output: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """The norm of each head's output, (…, value_dim), scaled by SiLU of its gate; in float32 after the norm."""
        normed: torch.Tensor = self.norm(output)
        return (normed.float() * F.silu(gate.float())).to(output.dtype)
