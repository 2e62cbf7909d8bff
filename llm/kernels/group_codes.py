"""Codes of 4 bits as numbers in registers: what every kernel for `WeightGroups` of whole numbers starts with.

A word of 16 bits holds one code from each quarter of a span of inputs, so that words, which come from shared memory as
tensor cores take numbers of 16 bits, become four operands of products without being reordered.
"""

import triton
import triton.language as tl

MIDDLE = tl.constexpr(8)
"""The zero of codes that have none of their own."""
_ZERO_BITS = tl.constexpr(255)
"""Bits of a scale and a zero in one word that the zero takes."""

_TO_BF16 = tl.constexpr("""{
.reg .b32 t, one;
mov.b32 one, 0x3f803f80;
lop3.b32 $0, $4, 0x000f000f, 0x43004300, 0xea;
shr.u32 t, $4, 4;
lop3.b32 $1, t, 0x000f000f, 0x43004300, 0xea;
shr.u32 t, $4, 8;
lop3.b32 $2, t, 0x000f000f, 0x43004300, 0xea;
shr.u32 t, $4, 12;
lop3.b32 $3, t, 0x000f000f, 0x43004300, 0xea;
fma.rn.bf16x2 $0, $0, one, $5;
fma.rn.bf16x2 $1, $1, one, $6;
fma.rn.bf16x2 $2, $2, one, $7;
fma.rn.bf16x2 $3, $3, one, $8;
}""")
"""Two words to eight numbers: a code of 4 bits in the lowest bits of 128 is 128 plus the code (Kim et al. 2022,
arXiv:2211.10017), to which minus 128 and minus the zero is added. Conversions from whole numbers run at a sixteenth of
the rate of these instructions."""
_TO_FP16 = tl.constexpr("""{
.reg .b32 t;
lop3.b32 $0, $4, 0x000f000f, 0x64006400, 0xea;
shr.u32 t, $4, 4;
lop3.b32 $1, t, 0x000f000f, 0x64006400, 0xea;
shr.u32 t, $4, 8;
lop3.b32 $2, t, 0x000f000f, 0x64006400, 0xea;
shr.u32 t, $4, 12;
lop3.b32 $3, t, 0x000f000f, 0x64006400, 0xea;
add.rn.f16x2 $0, $0, $5;
add.rn.f16x2 $1, $1, $6;
add.rn.f16x2 $2, $2, $7;
add.rn.f16x2 $3, $3, $8;
}""")
"""The same with 1024, which has its unit in the lowest bit of a float16."""

_FOUR_OF_BF16, _FOUR_OF_FP16 = tl.constexpr((tl.bfloat16,) * 4), tl.constexpr((tl.float16,) * 4)


@triton.jit
def _taken_off(zero, dtype: tl.constexpr):
    """Minus the zero, uint8 of less than 128, and minus what `_TO_BF16` or `_TO_FP16` has put its codes into."""
    minus: tl.constexpr = 0xC300 if dtype == tl.bfloat16 else 0xE400
    return (zero.to(tl.uint16) | minus).to(dtype, bitcast=True)


@triton.jit
def quarters(words, first_zero, second_zero, third_zero, fourth_zero, dtype: tl.constexpr, IN_ASSEMBLY: tl.constexpr):
    """The codes of these words, int16, less the zeros of each quarter, uint8: four tensors of whole numbers."""
    if IN_ASSEMBLY:
        first, second, third, fourth = tl.inline_asm_elementwise(
            _TO_BF16 if dtype == tl.bfloat16 else _TO_FP16, "=&r,=&r,=&r,=&r,r,r,r,r,r",
            [words, _taken_off(first_zero, dtype), _taken_off(second_zero, dtype), _taken_off(third_zero, dtype),
             _taken_off(fourth_zero, dtype)],
            dtype=_FOUR_OF_BF16 if dtype == tl.bfloat16 else _FOUR_OF_FP16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        first = (words & 15).to(dtype) - first_zero.to(dtype)
        second = (words >> 4 & 15).to(dtype) - second_zero.to(dtype)
        third = (words >> 8 & 15).to(dtype) - third_zero.to(dtype)
        fourth = (words >> 12 & 15).to(dtype) - fourth_zero.to(dtype)
    return first, second, third, fourth


@triton.jit
def scale_in(word):
    """The scale in a word that has a zero, too: float32."""
    return (word & ~_ZERO_BITS).to(tl.float32, bitcast=True)


@triton.jit
def zero_in(word):
    """The zero in such a word."""
    return word & _ZERO_BITS


@triton.jit
def scales_at(groups, start, num_rows_of_weight, out, GROUP: tl.constexpr):
    """Scales of some outputs in the group of the inputs from `start` on, float32."""
    scale = tl.load(groups.scales + start // GROUP * num_rows_of_weight + out)
    if groups.scales.dtype.element_ty == tl.int32:
        scale = scale_in(scale)
    return scale.to(tl.float32)


@triton.jit
def zeros_at(groups, start, num_rows_of_weight, out, GROUP: tl.constexpr):
    """Zeros of some outputs there, in some format of integers."""
    offsets = start // GROUP * num_rows_of_weight + out
    if groups.scales.dtype.element_ty == tl.int32:
        zero = zero_in(tl.load(groups.scales + offsets))
    elif groups.zeros is not None:
        zero = tl.load(groups.zeros + offsets)
    else:
        zero = tl.full(out.shape, MIDDLE, tl.uint8)
    return zero


@triton.constexpr_function
def groups_in(span: int, group: int) -> int:
    """How many groups a span is in: 1, 2, or 4, one for each quarter."""
    return 1 if group % span == 0 else 2 if 2 * group % span == 0 else 4
