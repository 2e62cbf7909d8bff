"""MXFP4 of the Open Compute Project's Microscaling Formats (MX) specification, version 1.0.

A block of 32 numbers is 32 codes of 4 bits (E2M1), two a byte, the first in the lower four bits, and a scale of 8 bits
(E8M0): a power of two, or NaN. Each number is its code's value times the block's scale.
"""

import torch
import torch.nn.functional as F

BLOCK_SIZE = 32
"""Numbers that share a scale."""
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of the codes from 0 to 7; those from 8 to 15 are negative."""


def block_codes(blocks: torch.Tensor) -> torch.Tensor:
    """The codes of blocks (…, in // 32, 16) uint8 in the order of the inputs, (…, in) uint8."""
    return torch.stack((blocks & 15, blocks >> 4), -1).flatten(-3)


def code_values(codes: torch.Tensor) -> torch.Tensor:
    """What codes, uint8, stand for before they are scaled, float32."""
    values = torch.tensor([*_MAGNITUDES, *(-magnitude for magnitude in _MAGNITUDES)], device=codes.device)
    return F.embedding(codes.int(), values[:, None]).squeeze(-1)


def scale_values(scales: torch.Tensor) -> torch.Tensor:
    """What scales, uint8, stand for, float32."""
    return scales.contiguous().view(torch.float8_e8m0fnu).float()
