"""Weights in codes of 8 or 4 bits: `(code - zero) * scale`, a scale and a zero for each output and group of inputs.

Whatever layout a checkpoint has, this is ours. Codes of 8 bits are E4M3 (Micikevicius et al. 2022, arXiv:2209.05433)
and stand in a row as the inputs do. Codes of 4 bits are whole numbers from 0 to 15, four to a word of 16 bits, which
holds one from each quarter of a span of inputs, the first quarter's in its lowest bits: `llm.kernels.group_codes` says
why. With scales of E8M0 they are the floats of MXFP4, which are packed in another way (`llm.core.mxfp4`).

The weights of all experts of a layer are stacked: codes, scales, zeros and order then have a first dimension more.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch

from llm.core.mxfp4 import BLOCK_SIZE, code_values, pack_codes, scale_values, unpack_codes

FP8 = torch.float8_e4m3fn
MIDDLE = 8
"""The zero of 4-bit codes that have none of their own."""
_LARGEST_SPAN = 128
_MXFP4_SPAN = 64
_ZERO_BITS = 255
"""Bits of a scale and a zero in one word that the zero takes."""


@dataclass(frozen=True, slots=True)
class WeightGroups:
    """What the codes of a weight (out, in) mean.

    Attributes:
        scales: (groups, out), in any format of floats; or uint8, E8M0, for MXFP4; or int32, see `joined`.
        zeros: (groups, out) uint8; None for 8 with whole numbers, for 0 with floats, and where scales are joined.
        order: (in,) int32, the input that each column of codes belongs to; None where they stand in order.
        size: inputs a group; the last may have fewer.
        span: inputs whose codes of 4 bits are packed together; with 8 bits, any number that divides `in` and `size`.
    """

    scales: torch.Tensor
    zeros: torch.Tensor | None
    order: torch.Tensor | None
    size: int
    span: int

    @property
    def is_mxfp4(self) -> bool:
        """Whether codes are E2M1, and scales E8M0."""
        return self.scales.dtype == torch.uint8

    def joined(self) -> Self:
        """The same with a scale and its zero in one word, where that loses nothing; of codes of 4 bits.

        The lowest 8 bits of a scale in float32 are nought if it fits 16 bits; they hold the zero then. A kernel copies
        such words to shared memory ahead of time, which it cannot do with smaller ones.
        """
        if self.scales.dtype in (torch.uint8, torch.int32):
            return self
        words = self.scales.float().view(torch.int32)
        if (words & _ZERO_BITS).any():
            return self
        zeros = MIDDLE if self.zeros is None else self.zeros.int()
        return replace(self, scales=words | zeros, zeros=None)

    def apart(self) -> Self:
        """The reverse of `joined`."""
        if self.scales.dtype != torch.int32:
            return self
        scales, zeros = (self.scales & ~_ZERO_BITS).view(torch.float32), (self.scales & _ZERO_BITS).to(torch.uint8)
        return replace(self, scales=scales, zeros=zeros)

    def of_expert(self, expert: int) -> Self:
        """Those of one expert of a stack: views."""
        zeros, order = (None if each is None else each[expert] for each in (self.zeros, self.order))
        return replace(self, scales=self.scales[expert], zeros=zeros, order=order)

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes of 4 bits, (out, in) uint8, two a byte: (out, in // 2)."""
        return pack_codes(codes, self.span) if self.is_mxfp4 else pack(codes, self.span)

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """The reverse of `pack`."""
        return unpack_codes(packed, self.span) if self.is_mxfp4 else unpack(packed, self.span)


def span_of(num_inputs: int, group_size: int, num_bits: int) -> int:
    """The largest span, up to 128 inputs, of which no quarter, or with 8 bits no part at all, is in two groups."""
    parts = 1 if num_bits == 8 else 4
    span = _LARGEST_SPAN
    while num_inputs % span or group_size % (span // parts):
        span //= 2
    return span


def mxfp4_span_of(num_inputs: int) -> int:
    """The same for MXFP4, whose kernel takes 64 inputs at once."""
    return _MXFP4_SPAN if num_inputs % _MXFP4_SPAN == 0 else BLOCK_SIZE


def pack(codes: torch.Tensor, span: int) -> torch.Tensor:
    """Codes of whole numbers, (out, in) uint8, two a byte: (out, in // 2)."""
    first, second, third, fourth = codes.view(len(codes), -1, 4, span // 4).unbind(2)
    return torch.stack((first | second << 4, third | fourth << 4), -1).flatten(1)


def unpack(packed: torch.Tensor, span: int) -> torch.Tensor:
    """The reverse of `pack`."""
    early, late = packed.view(len(packed), -1, span // 4, 2).unbind(-1)
    return torch.stack((early & 15, early >> 4, late & 15, late >> 4), 2).flatten(1)


def dequantize(codes: torch.Tensor, groups: WeightGroups) -> torch.Tensor:
    """The weight (out, in) that is meant, in float32."""
    groups, has_8_bits = groups.apart(), codes.dtype == FP8
    if groups.is_mxfp4:
        values = code_values(groups.unpack(codes))
    else:
        values = codes.float() if has_8_bits else groups.unpack(codes).float()
    num_inputs = values.shape[1]

    def spread(numbers: torch.Tensor) -> torch.Tensor:
        return numbers.t().repeat_interleave(groups.size, 1)[:, :num_inputs]

    if groups.zeros is not None:
        values -= spread(groups.zeros.float())
    elif not has_8_bits and not groups.is_mxfp4:
        values -= MIDDLE
    values *= spread(scale_values(groups.scales) if groups.is_mxfp4 else groups.scales.float())
    if groups.order is None:
        return values
    return torch.empty_like(values).index_copy_(1, groups.order.long(), values)
