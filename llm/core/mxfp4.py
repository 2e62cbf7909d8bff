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


def unpack_mxfp4(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers that blocks mean; exact in float32 and bfloat16 but for the very smallest, rounded in float16.

    Args:
        blocks: (experts, out, in // 32, 16) uint8.
        scales: (experts, out, in // 32) uint8.

    Returns:
        (experts, out, in).
    """
    num_experts, num_outputs, num_blocks, _ = blocks.shape
    values = torch.tensor([*_MAGNITUDES, *(-magnitude for magnitude in _MAGNITUDES)], device=blocks.device)
    byte = torch.arange(256, device=blocks.device)
    pairs = torch.stack((values[byte & 15], values[byte >> 4]), -1)
    output = torch.empty(num_experts, num_outputs, num_blocks * BLOCK_SIZE, dtype=dtype, device=blocks.device)
    for expert in range(num_experts):  # one by one, for what is between takes twice as much memory
        codes = F.embedding(blocks[expert].int(), pairs).flatten(-2)
        factors = scales[expert].contiguous().view(torch.float8_e8m0fnu).float()
        output[expert] = (codes * factors[..., None]).flatten(1)
    return output
