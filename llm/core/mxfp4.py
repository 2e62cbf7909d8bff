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
_PLACES = (15, 6), (12, 3), (14, 9), (13, 0)
"""Where a word has the sign, and the lowest bit of the magnitude, of its codes."""


def block_codes(blocks: torch.Tensor) -> torch.Tensor:
    """The codes of blocks (…, in // 32, 16) uint8 in the order of the inputs, (…, in) uint8."""
    return torch.stack((blocks & 15, blocks >> 4), -1).flatten(-3)


def pack_codes(codes: torch.Tensor, span: int) -> torch.Tensor:
    """Pack codes (out, in) uint8, two a byte: (out, in // 2).

    The codes of a span of inputs stand in words of 16 bits, each of which has one from each quarter of the span. Their
    bits stand where a GPU makes a bfloat16 of each in few instructions: see `llm.kernels.mxfp4`.
    """
    quarters = codes.view(len(codes), -1, 4, span // 4).int()
    words = sum(
        (quarters[:, :, i] >> 3 << sign) | ((quarters[:, :, i] & 7) << magnitude)
        for i, (sign, magnitude) in enumerate(_PLACES)
    )
    return torch.as_tensor(words).to(torch.int16).view(torch.uint8).flatten(1)


def unpack_codes(packed: torch.Tensor, span: int) -> torch.Tensor:
    """The reverse of `pack_codes`."""
    words = packed.contiguous().view(torch.int16).int().view(len(packed), -1, span // 4)
    quarters = [(words >> sign & 1) << 3 | (words >> magnitude & 7) for sign, magnitude in _PLACES]
    return torch.stack(quarters, 2).flatten(1).to(torch.uint8)


def code_values(codes: torch.Tensor) -> torch.Tensor:
    """What codes, uint8, stand for before they are scaled, float32."""
    values = torch.tensor([*_MAGNITUDES, *(-magnitude for magnitude in _MAGNITUDES)], device=codes.device)
    return F.embedding(codes.int(), values[:, None]).squeeze(-1)


def scale_values(scales: torch.Tensor) -> torch.Tensor:
    """What scales, uint8, stand for, float32."""
    return scales.contiguous().view(torch.float8_e8m0fnu).float()
