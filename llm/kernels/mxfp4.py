"""Weights in MXFP4 as plain numbers: made in registers on their way to the tensor cores, or written to memory.

A number of MXFP4 is one of bfloat16 too, so nothing is rounded. See `llm.core.mxfp4` for how words hold codes.
"""

import torch
import triton
import triton.language as tl

from llm.core.weight_groups import WeightGroups
from llm.kernels.launch import launch_options, wait_for_inputs

TILE_K = tl.constexpr(64)
"""Inputs that one turn of the product takes: each quarter of them is what the tensor cores multiply at once."""
_BLOCK_SIZE = tl.constexpr(32)
_OUTPUTS = 32
"""Outputs that one program writes out."""
_LESS = tl.constexpr(64)
_MORE = tl.constexpr(2.0**_LESS.value)
"""Numbers in registers are made smaller by this power of two, and what is made of them is multiplied by it. Their
factor, up to 126 powers more than the scale because of how codes are read, is then a number of bfloat16 for scales up
to 2 to the 65th."""

_WORDS_TO_BF16 = tl.constexpr("""{
.reg .b32 t, u, zero;
mov.b32 zero, 0x80008000;
and.b32 $0, $4, 0x81c081c0;
shl.b32 t, $4, 3;
and.b32 $1, t, 0x81c081c0;
shr.u32 t, $4, 3;
shl.b32 u, $4, 1;
and.b32 u, u, 0x80008000;
lop3.b32 $2, t, 0x01c001c0, u, 0xea;
shl.b32 t, $4, 6;
shl.b32 u, $4, 2;
and.b32 u, u, 0x80008000;
lop3.b32 $3, t, 0x01c001c0, u, 0xea;
fma.rn.bf16x2 $0, $0, $5, zero;
fma.rn.bf16x2 $1, $1, $5, zero;
fma.rn.bf16x2 $2, $2, $6, zero;
fma.rn.bf16x2 $3, $3, $6, zero;
}""")
"""Two words and their factors to eight numbers. A code's exponent and fraction, in the lowest bits of a bfloat16's
exponent and the highest of its fraction, are its value over 2 to the 126th. The smallest one is subnormal there, which
these instructions and the tensor cores support."""


@triton.jit
def _factor(scale):
    """A scale, E8M0 as uint8, in float32: a power of two, or NaN."""
    bits = (scale.to(tl.int32) << 23) | tl.where((scale == 0) | (scale == 255), 1 << 22, 0)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _short_factor(scale):
    """What `_WORDS_TO_BF16` multiplies with: the scale times 2 to the power of 126 - `_LESS`, bfloat16."""
    bits = tl.minimum(scale.to(tl.int32) + (126 - _LESS), 255) << 7
    return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _value(words, sign: tl.constexpr, magnitude: tl.constexpr):
    """What the codes with these lowest bits in their words stand for, float32."""
    number = (words.to(tl.int32) >> magnitude) & 7
    twice = tl.where(number < 2, number, (2 + (number & 1)) << (tl.maximum(number >> 1, 1) - 1))
    value = twice.to(tl.float32) * 0.5
    return tl.where(((words.to(tl.int32) >> sign) & 1) != 0, -value, value)


@triton.jit
def _quarters(words, early, late, dtype: tl.constexpr, IN_ASSEMBLY: tl.constexpr):
    """Words and the scales of their first and last two codes to four numbers each in `dtype`.

    In assembly they are 2 to the power of `_LESS` times smaller.
    """
    if IN_ASSEMBLY:
        first, second, third, fourth = tl.inline_asm_elementwise(
            _WORDS_TO_BF16, "=&r,=&r,=&r,=&r,r,r,r", [words, _short_factor(early), _short_factor(late)],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        early_factor, late_factor = _factor(early), _factor(late)
        first = (_value(words, 15, 6) * early_factor).to(dtype)
        second = (_value(words, 12, 3) * early_factor).to(dtype)
        third = (_value(words, 14, 9) * late_factor).to(dtype)
        fourth = (_value(words, 13, 0) * late_factor).to(dtype)
    return first, second, third, fourth


@triton.jit
def _columns(start, quarter: tl.constexpr, SPAN: tl.constexpr):
    """The inputs that this quarter of the codes of a turn's words belongs to."""
    word, words_a_span = tl.arange(0, TILE_K // 4), SPAN // 4
    return start + word // words_a_span * SPAN + quarter * words_a_span + word % words_a_span


@triton.jit
def _load_words(word_row, start, num_inputs, SPAN: tl.constexpr):
    """The words of some outputs for one turn. A span of less than a turn may leave half of one at the end."""
    word = tl.arange(0, TILE_K // 4)
    pointers = word_row + (start // 4 + word)[None, :]
    return tl.load(pointers) if SPAN == TILE_K else tl.load(pointers, mask=(start + word * 4 < num_inputs)[None, :])


@triton.jit
def _load_scales(scales, out, size, start, num_inputs, SPAN: tl.constexpr):
    """The scales of the first and the last two codes of these words."""
    if SPAN == TILE_K:
        block = scales + start // _BLOCK_SIZE * size + out
        early = tl.load(block)[:, None]
        late = tl.load(block + size)[:, None]
    else:  # a span is a block
        word = tl.arange(0, TILE_K // 4)
        block = start // _BLOCK_SIZE + word // (SPAN // 4)
        exists = (start + word * 4 < num_inputs)[None, :]
        early = tl.load(scales + block[None, :] * size + out[:, None], mask=exists, other=0)
        late = early
    return early, late


@triton.jit
def _load_rows(x, row, start, num_inputs, quarter: tl.constexpr, SPAN: tl.constexpr):
    """The rows' numbers at the inputs of one quarter: (TILE_K / 4, rows)."""
    column = _columns(start, quarter, SPAN)[:, None]
    pointers = x + row[None, :] * num_inputs + column
    return tl.load(pointers) if SPAN == TILE_K else tl.load(pointers, mask=column < num_inputs, other=0.0)


@triton.jit
def _add_turn(
    acc, word_row, scales, out, size, start, num_inputs, first_x, second_x, third_x, fourth_x,
    SPAN: tl.constexpr, IN_ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Add what the weights of some outputs and the rows' numbers, by quarters, make in one turn."""
    words = _load_words(word_row, start, num_inputs, SPAN)
    early, late = _load_scales(scales, out, size, start, num_inputs, SPAN)
    first, second, third, fourth = _quarters(words, early, late, first_x.dtype, IN_ASSEMBLY)
    acc = tl.dot(first, first_x, acc, input_precision="ieee")
    acc = tl.dot(second, second_x, acc, input_precision="ieee")
    acc = tl.dot(third, third_x, acc, input_precision="ieee")
    return tl.dot(fourth, fourth_x, acc, input_precision="ieee")


@triton.jit
def product_of_floats(
    x, gate_row, up_row, scales, weight_row, row, num_outputs, num_inputs,
    OUTPUTS: tl.constexpr, SPAN: tl.constexpr, SWIGLU: tl.constexpr, IN_ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Weights times rows: (OUTPUTS, rows) float32, of gate and of up.

    Args:
        gate_row, up_row: (OUTPUTS, 1) pointers to the outputs' codes, as bytes.
        scales: (blocks, num_outputs or twice as many) of E8M0.
        SPAN: `TILE_K`, or the size of a block where that does not divide the inputs.
    """
    acc = tl.zeros([OUTPUTS, row.shape[0]], tl.float32)
    up = tl.zeros([OUTPUTS, row.shape[0]], tl.float32)
    size = 2 * num_outputs if SWIGLU else num_outputs
    dtype: tl.constexpr = x.dtype.element_ty
    in_assembly: tl.constexpr = IN_ASSEMBLY and dtype == tl.bfloat16
    gate_words = gate_row.to(tl.pointer_type(tl.int16))
    up_words = up_row.to(tl.pointer_type(tl.int16))
    for start in range(0, num_inputs, TILE_K):
        first_x = _load_rows(x, row, start, num_inputs, 0, SPAN)
        second_x = _load_rows(x, row, start, num_inputs, 1, SPAN)
        third_x = _load_rows(x, row, start, num_inputs, 2, SPAN)
        fourth_x = _load_rows(x, row, start, num_inputs, 3, SPAN)
        acc = _add_turn(
            acc, gate_words, scales, weight_row, size, start, num_inputs, first_x, second_x, third_x, fourth_x, SPAN,
            in_assembly,
        )  # fmt: skip
        if SWIGLU:
            up = _add_turn(
                up, up_words, scales, weight_row + num_outputs, size, start, num_inputs, first_x, second_x, third_x,
                fourth_x, SPAN, in_assembly,
            )  # fmt: skip
    if in_assembly:
        acc *= _MORE
        up *= _MORE
    return acc, up


def floats_written_out(codes: torch.Tensor, groups: WeightGroups, dtype: torch.dtype) -> torch.Tensor:
    """The weight (out, in), or stack of (experts, out, in), that codes mean, in `dtype`."""
    *stack, num_outputs, width = codes.shape
    num_inputs = 2 * width
    output = torch.empty(*stack, num_outputs, num_inputs, dtype=dtype, device=codes.device)
    grid = triton.cdiv(num_outputs, _OUTPUTS), triton.cdiv(num_inputs, TILE_K.value), codes.shape[0] if stack else 1
    _write_out[grid](
        codes, groups.scales, output, num_outputs, num_inputs, groups.scales.shape[-2], OUTPUTS=_OUTPUTS,
        SPAN=groups.span, IN_ASSEMBLY=codes.device.type == "cuda" and dtype == torch.bfloat16, num_warps=4,
        **launch_options(codes.device),
    )  # fmt: skip
    return output


@triton.jit
def _write_out(
    codes, scales, output, num_outputs, num_inputs, num_blocks,
    OUTPUTS: tl.constexpr, SPAN: tl.constexpr, IN_ASSEMBLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (block of outputs, turn, weight of a stack)."""
    wait_for_inputs(PDL)
    number = tl.program_id(2).to(tl.int64)
    out = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_output = out[:, None] < num_outputs
    out = tl.minimum(out, num_outputs - 1)
    start = tl.program_id(1) * TILE_K
    row = (number * num_outputs + out)[:, None]
    words = _load_words((codes + row * (num_inputs // 2)).to(tl.pointer_type(tl.int16)), start, num_inputs, SPAN)
    scales += number * num_blocks * num_outputs
    early, late = _load_scales(scales, out, num_outputs, start, num_inputs, SPAN)
    dtype: tl.constexpr = output.dtype.element_ty
    first, second, third, fourth = _quarters(words, early, late, dtype, IN_ASSEMBLY)
    if IN_ASSEMBLY:
        power = tl.full([], _MORE, dtype)
        first, second, third, fourth = first * power, second * power, third * power, fourth * power
    rows = output + row * num_inputs
    _store_quarter(rows, first, start, num_inputs, is_output, 0, SPAN)
    _store_quarter(rows, second, start, num_inputs, is_output, 1, SPAN)
    _store_quarter(rows, third, start, num_inputs, is_output, 2, SPAN)
    _store_quarter(rows, fourth, start, num_inputs, is_output, 3, SPAN)


@triton.jit
def _store_quarter(rows, numbers, start, num_inputs, is_output, quarter: tl.constexpr, SPAN: tl.constexpr):
    """Write one quarter of a turn."""
    column = _columns(start, quarter, SPAN)[None, :]
    tl.store(rows + column, numbers, mask=is_output & (column < num_inputs))
