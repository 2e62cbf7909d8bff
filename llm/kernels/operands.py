"""What products' kernels read of a weight: each a named tuple, which kernels take as one argument."""

from typing import NamedTuple

import torch


class WeightOperand(NamedTuple):
    """The weight of a product y = x Wᵀ + bias.

    Attributes:
        numbers: (out, in), contiguous: numbers or codes; of a stack of experts (experts, out, in), and what follows has
            their dimension in front too.
        scales: (out,) float32, what the rows of 8-bit weights are multiplied by; None for other weights.
        bias: (out,), or None for none.
    """

    numbers: torch.Tensor
    scales: torch.Tensor | None
    bias: torch.Tensor | None


class GroupOperand(NamedTuple):
    """What the codes of a weight mean, see `WeightGroups`; without scales the weight has no groups.

    Attributes:
        scales: (groups, out), in any format of floats; uint8, E8M0, for MXFP4; int32 where they hold the zeros too.
        zeros: (groups, out) uint8, or None.
        order: (in,) int32, the input that each column of codes belongs to; None where they stand in order.
    """

    scales: torch.Tensor | None
    zeros: torch.Tensor | None
    order: torch.Tensor | None


NO_GROUPS = GroupOperand(None, None, None)
"""The groups of a weight that has none."""
