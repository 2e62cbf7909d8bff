"""The product of one row with weights in groups of 4 bits, without tensor cores, which would idle."""

import triton
import triton.language as tl

from llm.kernels.activation import gated
from llm.kernels.group_codes import groups_in, scales_at, zeros_at
from llm.kernels.launch import wait_for_inputs

_TO_FP32 = tl.constexpr("""{
.reg .b32 t;
shl.b32 t, $8, 19;
lop3.b32 $0, t, 0x00780000, 0x41800000, 0xea;
shl.b32 t, $8, 3;
lop3.b32 $1, t, 0x00780000, 0x41800000, 0xea;
shl.b32 t, $8, 15;
lop3.b32 $2, t, 0x00780000, 0x41800000, 0xea;
shr.u32 t, $8, 1;
lop3.b32 $3, t, 0x00780000, 0x41800000, 0xea;
shl.b32 t, $8, 11;
lop3.b32 $4, t, 0x00780000, 0x41800000, 0xea;
shr.u32 t, $8, 5;
lop3.b32 $5, t, 0x00780000, 0x41800000, 0xea;
shl.b32 t, $8, 7;
lop3.b32 $6, t, 0x00780000, 0x41800000, 0xea;
shr.u32 t, $8, 9;
lop3.b32 $7, t, 0x00780000, 0x41800000, 0xea;
}""")
"""Two words to eight numbers in float32, each 16 more than its code: in the highest bits of 16's fraction it adds
itself."""
_PIECE = tl.constexpr(4)
"""Words that a thread reads at once, 8 bytes."""


@triton.jit
def _floats(words, IN_ASSEMBLY: tl.constexpr):
    """The codes of these words, each 16 more, float32: one tensor for each quarter."""
    if IN_ASSEMBLY:
        first, second, third, fourth = tl.inline_asm_elementwise(
            _TO_FP32, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r", [words],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        first, second = (words & 15).to(tl.float32) + 16, (words >> 4 & 15).to(tl.float32) + 16
        third, fourth = (words >> 8 & 15).to(tl.float32) + 16, (words >> 12 & 15).to(tl.float32) + 16
    return first, second, third, fourth


@triton.jit
def _scaled(product, row_sum, groups, start, size, out, GROUP: tl.constexpr):
    """Sums of (code + 16) x in the group of the inputs from `start` on, (pieces, outputs), as what is meant."""
    zero = zeros_at(groups, start[:, None], size, out[None, :], GROUP).to(tl.float32) + 16
    return (product - zero * row_sum[:, None]) * scales_at(groups, start[:, None], size, out[None, :], GROUP)


@triton.jit
def _piece_sums(
    codes, groups, out, word, start, first_x, second_x, third_x, fourth_x, row_size, size,
    SPAN: tl.constexpr, GROUP: tl.constexpr, IN_ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Some outputs' weights times one row, over pieces of 4 words: (pieces, outputs) float32.

    In this order of dimensions the compiler gives each thread a piece of all outputs. Pieces past the last one read the
    first one's weights; their numbers of the row are zero.
    """
    offset = tl.arange(0, _PIECE)
    words = tl.load(codes + out[None, :, None].to(tl.int64) * row_size + word[:, None, None] + offset[None, None, :])
    first, second, third, fourth = _floats(words, IN_ASSEMBLY)
    quarter: tl.constexpr = SPAN // 4
    num_groups: tl.constexpr = groups_in(SPAN, GROUP)
    first, second = first * first_x[:, None, :], second * second_x[:, None, :]
    third, fourth = third * third_x[:, None, :], fourth * fourth_x[:, None, :]
    if num_groups == 1:
        row_sum = tl.sum(first_x + second_x + third_x + fourth_x, 1)
        total = _scaled(tl.sum(first + second + third + fourth, 2), row_sum, groups, start, size, out, GROUP)
    elif num_groups == 2:
        early, late = tl.sum(first + second, 2), tl.sum(third + fourth, 2)
        total = _scaled(early, tl.sum(first_x + second_x, 1), groups, start, size, out, GROUP)
        total += _scaled(late, tl.sum(third_x + fourth_x, 1), groups, start + 2 * quarter, size, out, GROUP)
    else:
        total = _scaled(tl.sum(first, 2), tl.sum(first_x, 1), groups, start, size, out, GROUP)
        total += _scaled(tl.sum(second, 2), tl.sum(second_x, 1), groups, start + quarter, size, out, GROUP)
        total += _scaled(tl.sum(third, 2), tl.sum(third_x, 1), groups, start + 2 * quarter, size, out, GROUP)
        total += _scaled(tl.sum(fourth, 2), tl.sum(fourth_x, 1), groups, start + 3 * quarter, size, out, GROUP)
    return total


@triton.jit
def _load_quarter(x, norm, order, column, exists, OFFSET: tl.constexpr):
    """The row's numbers at some inputs, (pieces, 4) float32, as they are and multiplied with the norm's weights."""
    column += tl.arange(0, _PIECE)[None, :]
    if order is not None:
        column = tl.load(order + column, mask=exists, other=0)
    plain = tl.load(x + column, mask=exists, other=0.0).to(tl.float32)
    values = plain
    if norm is not None:
        factor = tl.load(norm + column, mask=exists, other=0.0).to(tl.float32)
        values *= factor if OFFSET is None else factor + OFFSET
    return plain, values


@triton.jit
def single_row_of_groups(
    x, norm, weights, groups, output, num_outputs, num_inputs, norm_eps,
    OUTPUTS: tl.constexpr, PIECES: tl.constexpr, SPAN: tl.constexpr, GROUP: tl.constexpr, SWIGLU: tl.constexpr,
    GELU: tl.constexpr, OFFSET: tl.constexpr, ADDS: tl.constexpr, IN_ASSEMBLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: a block of outputs of one row, gates and what they gate or both halves. See `single_row_product`.

    Each thread reads 8 bytes of each output, so it needs one scale and zero for each of the groups that these are in.
    """
    out = tl.program_id(0) * (OUTPUTS if SWIGLU else 2 * OUTPUTS) + tl.arange(0, OUTPUTS)
    other_out = out + (num_outputs if SWIGLU else OUTPUTS)
    quarter: tl.constexpr = SPAN // 4
    row_size = num_inputs // 4
    size = 2 * num_outputs if SWIGLU else num_outputs
    codes = weights.numbers.to(tl.pointer_type(tl.int16))
    wait_for_inputs(PDL)
    acc = tl.zeros([PIECES, OUTPUTS], tl.float32)
    other = tl.zeros([PIECES, OUTPUTS], tl.float32)
    squares = tl.zeros([PIECES], tl.float32)
    for begin in range(0, row_size, PIECES * _PIECE):
        word = begin + tl.arange(0, PIECES) * _PIECE
        exists = (word < row_size)[:, None]
        word = tl.where(word < row_size, word, 0)
        start = word // quarter * SPAN
        column = (start + word % quarter)[:, None]
        first, first_x = _load_quarter(x, norm, groups.order, column, exists, OFFSET)
        second, second_x = _load_quarter(x, norm, groups.order, column + quarter, exists, OFFSET)
        third, third_x = _load_quarter(x, norm, groups.order, column + 2 * quarter, exists, OFFSET)
        fourth, fourth_x = _load_quarter(x, norm, groups.order, column + 3 * quarter, exists, OFFSET)
        if norm is not None:
            squares += tl.sum(first * first + second * second + third * third + fourth * fourth, 1)
        acc += _piece_sums(
            codes, groups, out, word, start, first_x, second_x, third_x, fourth_x, row_size, size, SPAN, GROUP,
            IN_ASSEMBLY,
        )  # fmt: skip
        other += _piece_sums(
            codes, groups, other_out, word, start, first_x, second_x, third_x, fourth_x, row_size, size, SPAN, GROUP,
            IN_ASSEMBLY,
        )  # fmt: skip
    result, other_result = tl.sum(acc, 0), tl.sum(other, 0)
    if norm is not None:
        inverse = tl.rsqrt(tl.sum(squares, 0) / num_inputs + norm_eps)
        result *= inverse
        other_result *= inverse
    if SWIGLU:
        tl.store(output + out, gated(result, other_result, output.dtype.element_ty, GELU))
    else:
        _store(result, weights.bias, output, out, ADDS)
        _store(other_result, weights.bias, output, other_out, ADDS)


@triton.jit
def _store(result, bias, output, out, ADDS: tl.constexpr):
    """Write some outputs, or add them to what is there."""
    if bias is not None:
        result += tl.load(bias + out).to(tl.float32)
    rounded = result.to(output.dtype.element_ty)
    if ADDS:
        rounded += tl.load(output + out)
    tl.store(output + out, rounded)
