"""Weights in `WeightGroups` as few rows multiply them: by sums over groups, each multiplied with the group's scale.

Few rows are bound by reading the weights, which is done once, in codes, and nothing is rounded but the result.
`llm.kernels.group_numbers` has the weights as plain numbers.
"""

import triton
import triton.language as tl

from llm.kernels.activation import gated
from llm.kernels.launch import wait_for_inputs

_MIDDLE = tl.constexpr(8)

_TO_BF16 = tl.constexpr("""{
.reg .b32 a, b, one, less;
mov.b32 one, 0x3f803f80;
mov.b32 less, 0xc308c308;
prmt.b32 a, $4, 0, 0x4140;
prmt.b32 b, $4, 0, 0x4342;
lop3.b32 $0, a, 0x000f000f, 0x43004300, 0xea;
lop3.b32 $1, b, 0x000f000f, 0x43004300, 0xea;
shr.u32 a, a, 4;
shr.u32 b, b, 4;
lop3.b32 $2, a, 0x000f000f, 0x43004300, 0xea;
lop3.b32 $3, b, 0x000f000f, 0x43004300, 0xea;
fma.rn.bf16x2 $0, $0, one, less;
fma.rn.bf16x2 $1, $1, one, less;
fma.rn.bf16x2 $2, $2, one, less;
fma.rn.bf16x2 $3, $3, one, less;
}""")
"""Four bytes to eight numbers: a code of 4 bits in the lowest bits of 128 is 128 plus the code (Kim et al. 2022,
arXiv:2211.10017), from which 136 is taken. Conversions from whole numbers run at a sixteenth of the rate of these
instructions."""
_TO_FP16 = tl.constexpr("""{
.reg .b32 a, b, less;
mov.b32 less, 0xe408e408;
prmt.b32 a, $4, 0, 0x4140;
prmt.b32 b, $4, 0, 0x4342;
lop3.b32 $0, a, 0x000f000f, 0x64006400, 0xea;
lop3.b32 $1, b, 0x000f000f, 0x64006400, 0xea;
shr.u32 a, a, 4;
shr.u32 b, b, 4;
lop3.b32 $2, a, 0x000f000f, 0x64006400, 0xea;
lop3.b32 $3, b, 0x000f000f, 0x64006400, 0xea;
add.rn.f16x2 $0, $0, less;
add.rn.f16x2 $1, $1, less;
add.rn.f16x2 $2, $2, less;
add.rn.f16x2 $3, $3, less;
}""")
"""The same with 1024, which has its unit in the lowest bit of a float16, and 1032."""
_TO_FP32 = tl.constexpr("""{
.reg .b32 t;
shl.b32 t, $8, 19;
lop3.b32 $0, t, 0x00780000, 0x41800000, 0xea;
shl.b32 t, $8, 11;
lop3.b32 $1, t, 0x00780000, 0x41800000, 0xea;
shl.b32 t, $8, 3;
lop3.b32 $2, t, 0x00780000, 0x41800000, 0xea;
shr.u32 t, $8, 5;
lop3.b32 $3, t, 0x00780000, 0x41800000, 0xea;
shl.b32 t, $8, 15;
lop3.b32 $4, t, 0x00780000, 0x41800000, 0xea;
shl.b32 t, $8, 7;
lop3.b32 $5, t, 0x00780000, 0x41800000, 0xea;
shr.u32 t, $8, 1;
lop3.b32 $6, t, 0x00780000, 0x41800000, 0xea;
shr.u32 t, $8, 9;
lop3.b32 $7, t, 0x00780000, 0x41800000, 0xea;
}""")
"""Four bytes to eight numbers in float32, each 16 more than its code: in the highest bits of 16's fraction it adds
itself."""
_PIECE = tl.constexpr(8)
"""Bytes that a thread reads at once: as many numbers of the row in 16 bits are what it can read at once of that."""


@triton.jit
def halves(packed, dtype: tl.constexpr, IN_ASSEMBLY: tl.constexpr):
    """Codes of 4 bits less 8, (outputs, span / 2) each: the lower and the upper half of a span."""
    if IN_ASSEMBLY:
        low, high = tl.inline_asm_elementwise(
            _TO_BF16 if dtype == tl.bfloat16 else _TO_FP16, "=&r,=&r,=&r,=&r,r", [packed],
            dtype=(tl.bfloat16, tl.bfloat16) if dtype == tl.bfloat16 else (tl.float16, tl.float16), is_pure=True,
            pack=4,
        )  # fmt: skip
    else:
        low, high = (packed & 15).to(dtype) - 8, (packed >> 4).to(dtype) - 8
    return low, high


@triton.jit
def _scaled(total, row_sums, scale, zero, HAS_ZEROS: tl.constexpr):
    """Sums of (code - 8) x to those of (code - zero) scale x."""
    if HAS_ZEROS:
        total -= row_sums * (zero.to(tl.float32) - _MIDDLE)[:, None]
    return total * scale.to(tl.float32)[:, None]


@triton.jit
def meaning(groups, start, num_rows_of_weight, out):
    """Scales and zeros of some outputs, as they are stored, in the group of the inputs from `start` on."""
    offsets = start // groups.size * num_rows_of_weight + out
    zero = tl.full(out.shape, _MIDDLE, tl.uint8)
    if groups.zeros is not None:
        zero = tl.load(groups.zeros + offsets)
    return tl.load(groups.scales + offsets), zero


@triton.jit
def columns_of(x, order, start, row, num_rows, num_inputs, SIZE: tl.constexpr):
    """The rows' numbers at the inputs of SIZE columns of codes: (SIZE, rows). Without `num_rows` every row exists."""
    column = start + tl.arange(0, SIZE)
    if order is not None:
        column = tl.load(order + column)
    pointers = x + row[None, :] * num_inputs + column[:, None]
    return tl.load(pointers) if num_rows is None else tl.load(pointers, mask=row[None, :] < num_rows, other=0.0)


@triton.jit
def sum_of_groups(
    x, gate_row, up_row, groups, weight_row, row, num_rows, num_outputs, num_inputs, begin, end,
    TILE: tl.constexpr, SWIGLU: tl.constexpr, IN_ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Weights in groups times rows over the inputs from `begin` to `end`: (OUTPUTS, rows) float32, of gate and of up.

    With codes of 4 bits `TILE.k` is the span, with 8 bits it divides the size of a group.
    """
    outputs: tl.constexpr = TILE.outputs
    acc = tl.zeros([outputs, row.shape[0]], tl.float32)
    up = tl.zeros([outputs, row.shape[0]], tl.float32)
    size = 2 * num_outputs if SWIGLU else num_outputs
    dtype: tl.constexpr = x.dtype.element_ty
    has_4_bits: tl.constexpr = gate_row.dtype.element_ty == tl.uint8
    half: tl.constexpr = TILE.k // 2 if has_4_bits else 0
    # Asked for a turn before they are needed: nothing else hides the time they take.
    next_scale, next_zero = meaning(groups, begin, size, weight_row)
    next_high_scale, next_high_zero = next_scale, next_zero
    if has_4_bits:
        next_high_scale, next_high_zero = meaning(groups, begin + half, size, weight_row)
    next_up_scale, next_up_zero = next_scale, next_zero
    next_high_up_scale, next_high_up_zero = next_scale, next_zero
    if SWIGLU:
        up_out = weight_row + num_outputs
        next_up_scale, next_up_zero = meaning(groups, begin, size, up_out)
        if has_4_bits:
            next_high_up_scale, next_high_up_zero = meaning(groups, begin + half, size, up_out)
    for start in range(begin, end, TILE.k):
        scale, zero, high_scale, high_zero = next_scale, next_zero, next_high_scale, next_high_zero
        up_scale, up_zero, high_up_scale, high_up_zero = (
            next_up_scale, next_up_zero, next_high_up_scale, next_high_up_zero,
        )  # fmt: skip
        then = tl.minimum(start + TILE.k, end - TILE.k)
        next_scale, next_zero = meaning(groups, then, size, weight_row)
        if has_4_bits:
            next_high_scale, next_high_zero = meaning(groups, then + half, size, weight_row)
        if SWIGLU:
            next_up_scale, next_up_zero = meaning(groups, then, size, up_out)
            if has_4_bits:
                next_high_up_scale, next_high_up_zero = meaning(groups, then + half, size, up_out)
        if has_4_bits:
            low_x = columns_of(x, groups.order, start, row, num_rows, num_inputs, half)
            high_x = columns_of(x, groups.order, start + half, row, num_rows, num_inputs, half)
            byte = start // 2 + tl.arange(0, half)
            low_sums, high_sums = acc, acc
            if groups.zeros is not None:  # by tensor cores, which have time
                ones = tl.full([outputs, half], 1.0, dtype)
                low_sums = tl.dot(ones, low_x, input_precision="ieee")
                high_sums = tl.dot(ones, high_x, input_precision="ieee")
            low, high = halves(tl.load(gate_row + byte[None, :]), dtype, IN_ASSEMBLY)
            low_total = tl.dot(low, low_x, input_precision="ieee")
            high_total = tl.dot(high, high_x, input_precision="ieee")
            acc += _scaled(low_total, low_sums, scale, zero, groups.zeros is not None)
            acc += _scaled(high_total, high_sums, high_scale, high_zero, groups.zeros is not None)
            if SWIGLU:
                low, high = halves(tl.load(up_row + byte[None, :]), dtype, IN_ASSEMBLY)
                low_total = tl.dot(low, low_x, input_precision="ieee")
                high_total = tl.dot(high, high_x, input_precision="ieee")
                up += _scaled(low_total, low_sums, up_scale, up_zero, groups.zeros is not None)
                up += _scaled(high_total, high_sums, high_up_scale, high_up_zero, groups.zeros is not None)
        else:
            rows = columns_of(x, groups.order, start, row, num_rows, num_inputs, TILE.k)
            column = start + tl.arange(0, TILE.k)
            gate = tl.load(gate_row + column[None, :]).to(dtype)
            acc += tl.dot(gate, rows, input_precision="ieee") * scale.to(tl.float32)[:, None]
            if SWIGLU:
                above = tl.load(up_row + column[None, :]).to(dtype)
                up += tl.dot(above, rows, input_precision="ieee") * up_scale.to(tl.float32)[:, None]
    return acc, up


@triton.jit
def _piece_sums(
    codes, groups, out, byte, low_group, high_group, low_x, high_x, low_sum, high_sum, row_size, size, exists,
    IN_ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Some outputs' weights times one row, over pieces of 8 bytes: (pieces, outputs) float32.

    In this order of dimensions the compiler gives each thread a piece of all outputs.
    """
    offset = tl.arange(0, _PIECE)
    packed = tl.load(
        codes + out[None, :, None].to(tl.int64) * row_size + byte[:, None, None] + offset[None, None, :],
        mask=exists[:, None, None], other=0,
    )  # fmt: skip
    low_at, high_at = low_group[:, None] * size + out[None, :], high_group[:, None] * size + out[None, :]
    mask = exists[:, None]
    low_scale = tl.load(groups.scales + low_at, mask=mask, other=0.0).to(tl.float32)
    high_scale = tl.load(groups.scales + high_at, mask=mask, other=0.0).to(tl.float32)
    low_zero = tl.full(low_at.shape, _MIDDLE, tl.float32)
    high_zero = low_zero
    if groups.zeros is not None:
        low_zero = tl.load(groups.zeros + low_at, mask=mask, other=0).to(tl.float32)
        high_zero = tl.load(groups.zeros + high_at, mask=mask, other=0).to(tl.float32)
    if IN_ASSEMBLY:
        low, high = tl.inline_asm_elementwise(
            _TO_FP32, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r", [packed], dtype=(low_x.dtype, high_x.dtype), is_pure=True,
            pack=4,
        )  # fmt: skip
    else:
        low, high = (packed & 15).to(tl.float32) + 16, (packed >> 4).to(tl.float32) + 16
    low_dot = tl.sum(low * low_x[:, None, :], 2) - (low_zero + 16) * low_sum[:, None]
    high_dot = tl.sum(high * high_x[:, None, :], 2) - (high_zero + 16) * high_sum[:, None]
    return low_dot * low_scale + high_dot * high_scale


@triton.jit
def single_row_of_groups(
    x, norm, weights, groups, output, num_outputs, num_inputs, norm_eps,
    OUTPUTS: tl.constexpr, PIECES: tl.constexpr, SPAN: tl.constexpr, SWIGLU: tl.constexpr, GELU: tl.constexpr,
    OFFSET: tl.constexpr, ADDS: tl.constexpr, IN_ASSEMBLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: a block of outputs of one row, of codes of 4 bits, without tensor cores, which would idle.

    See `single_row_product`. Each thread reads 8 bytes of each output, so it needs one scale and zero for each half.
    """
    out = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    half: tl.constexpr = SPAN // 2
    offset = tl.arange(0, _PIECE)
    row_size = num_inputs // 2
    size = 2 * num_outputs if SWIGLU else num_outputs
    wait_for_inputs(PDL)
    acc = tl.zeros([PIECES, OUTPUTS], tl.float32)
    up = tl.zeros([PIECES, OUTPUTS], tl.float32)
    squares = tl.zeros([PIECES], tl.float32)
    for start in range(0, row_size, PIECES * _PIECE):
        byte = start + tl.arange(0, PIECES) * _PIECE
        exists = byte < row_size
        first = byte // half * SPAN + byte % half
        low_group, high_group = first // groups.size, (first + half) // groups.size
        column = first[:, None] + offset[None, :]
        high_column = column + half
        mask = exists[:, None] & (offset[None, :] >= 0)
        if groups.order is not None:
            high_column = tl.load(groups.order + high_column, mask=mask, other=0)
            column = tl.load(groups.order + column, mask=mask, other=0)
        low_x = tl.load(x + column, mask=mask, other=0.0).to(tl.float32)
        high_x = tl.load(x + high_column, mask=mask, other=0.0).to(tl.float32)
        if norm is not None:
            squares += tl.sum(low_x * low_x + high_x * high_x, 1)
            low_factor = tl.load(norm + column, mask=mask, other=0.0).to(tl.float32)
            high_factor = tl.load(norm + high_column, mask=mask, other=0.0).to(tl.float32)
            low_x *= low_factor if OFFSET is None else low_factor + OFFSET
            high_x *= high_factor if OFFSET is None else high_factor + OFFSET
        low_sum, high_sum = tl.sum(low_x, 1), tl.sum(high_x, 1)
        acc += _piece_sums(
            weights.numbers, groups, out, byte, low_group, high_group, low_x, high_x, low_sum, high_sum, row_size, size,
            exists, IN_ASSEMBLY,
        )  # fmt: skip
        if SWIGLU:
            up += _piece_sums(
                weights.numbers, groups, out + num_outputs, byte, low_group, high_group, low_x, high_x, low_sum,
                high_sum, row_size, size, exists, IN_ASSEMBLY,
            )  # fmt: skip
    result, up_result = tl.sum(acc, 0), tl.sum(up, 0)
    if norm is not None:
        inverse = tl.rsqrt(tl.sum(squares, 0) / num_inputs + norm_eps)
        result *= inverse
        up_result *= inverse
    if weights.bias is not None:
        result += tl.load(weights.bias + out).to(tl.float32)
    dtype: tl.constexpr = output.dtype.element_ty
    rounded = gated(result, up_result, dtype, GELU) if SWIGLU else result.to(dtype)
    if ADDS:
        rounded += tl.load(output + out)
    tl.store(output + out, rounded)
