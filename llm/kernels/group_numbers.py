"""Weights in `WeightGroups` as plain numbers of the activations' format: written to memory, or made in registers.

For many rows a weight is written out for the vendor's library or for the kernels of 16-bit experts to multiply: reading
and writing it once is little beside what these do then. For fewer, numbers are made on their way to the tensor cores,
rounded once as those written out are. `llm.kernels.mxfp4` does both for MXFP4.
"""

import torch
import triton
import triton.language as tl

from llm.core.weight_groups import FP8, WeightGroups
from llm.kernels.groups import columns_of, halves, meaning
from llm.kernels.launch import launch_options, wait_for_inputs
from llm.kernels.mxfp4 import floats_written_out
from llm.kernels.operands import GroupOperand

_MIDDLE = tl.constexpr(8)
_OUTPUTS = 32
"""Of a program that writes weights out."""


@triton.jit
def _numbers(packed, low_scale, low_zero, high_scale, high_zero, dtype: tl.constexpr, IN_ASSEMBLY: tl.constexpr):
    """Codes of 4 bits, (outputs, span / 2) bytes, and what their halves mean, to numbers in `dtype`: both halves."""
    low, high = halves(packed, dtype, IN_ASSEMBLY)
    low = (low.to(tl.float32) - (low_zero.to(tl.float32) - _MIDDLE)[:, None]) * low_scale.to(tl.float32)[:, None]
    high = (high.to(tl.float32) - (high_zero.to(tl.float32) - _MIDDLE)[:, None]) * high_scale.to(tl.float32)[:, None]
    return low.to(dtype), high.to(dtype)


@triton.jit
def _load_numbers(
    codes, groups, start, size, out, dtype: tl.constexpr, HALF: tl.constexpr, IN_ASSEMBLY: tl.constexpr
):  # fmt: skip
    """The weights of some outputs, at whose codes `codes` points, over the span from `start` on: both halves."""
    low_scale, low_zero = meaning(groups, start, size, out)
    high_scale, high_zero = meaning(groups, start + HALF, size, out)
    packed = tl.load(codes + (start // 2 + tl.arange(0, HALF))[None, :])
    return _numbers(packed, low_scale, low_zero, high_scale, high_zero, dtype, IN_ASSEMBLY)


@triton.jit
def product_of_numbers(
    x, gate_row, up_row, groups, weight_row, row, num_rows, num_outputs, num_inputs, begin, end,
    TILE: tl.constexpr, SWIGLU: tl.constexpr, IN_ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """The same as `sum_of_groups`, of weights that are rounded to the format of the rows."""
    outputs: tl.constexpr = TILE.outputs
    acc = tl.zeros([outputs, row.shape[0]], tl.float32)
    up = tl.zeros([outputs, row.shape[0]], tl.float32)
    size = 2 * num_outputs if SWIGLU else num_outputs
    dtype: tl.constexpr = x.dtype.element_ty
    half: tl.constexpr = TILE.k // 2
    for start in range(begin, end, TILE.k):
        if gate_row.dtype.element_ty == tl.uint8:
            low_x = columns_of(x, groups.order, start, row, num_rows, num_inputs, half)
            high_x = columns_of(x, groups.order, start + half, row, num_rows, num_inputs, half)
            low, high = _load_numbers(gate_row, groups, start, size, weight_row, dtype, half, IN_ASSEMBLY)
            acc = tl.dot(low, low_x, acc, input_precision="ieee")
            acc = tl.dot(high, high_x, acc, input_precision="ieee")
            if SWIGLU:
                up_out = weight_row + num_outputs
                low, high = _load_numbers(up_row, groups, start, size, up_out, dtype, half, IN_ASSEMBLY)
                up = tl.dot(low, low_x, up, input_precision="ieee")
                up = tl.dot(high, high_x, up, input_precision="ieee")
        else:
            rows = columns_of(x, groups.order, start, row, num_rows, num_inputs, TILE.k)
            column = start + tl.arange(0, TILE.k)
            scale, _ = meaning(groups, start, size, weight_row)
            gate = tl.load(gate_row + column[None, :]).to(tl.float32) * scale.to(tl.float32)[:, None]
            acc = tl.dot(gate.to(dtype), rows, acc, input_precision="ieee")
            if SWIGLU:
                scale, _ = meaning(groups, start, size, weight_row + num_outputs)
                above = tl.load(up_row + column[None, :]).to(tl.float32) * scale.to(tl.float32)[:, None]
                up = tl.dot(above.to(dtype), rows, up, input_precision="ieee")
    return acc, up


def written_out(codes: torch.Tensor, groups: WeightGroups, dtype: torch.dtype) -> torch.Tensor:
    """The weight (out, in), or stack of (experts, out, in), that codes mean, in `dtype`."""
    if groups.is_mxfp4:
        return floats_written_out(codes, groups, dtype)
    *stack, num_outputs, width = codes.shape
    num_inputs = width * (1 if codes.dtype == FP8 else 2)
    output = torch.empty(*stack, num_outputs, num_inputs, dtype=dtype, device=codes.device)
    grid = triton.cdiv(num_outputs, _OUTPUTS), num_inputs // groups.span, codes.shape[0] if stack else 1
    _write_out[grid](
        codes, GroupOperand(groups.scales, groups.zeros, groups.order, groups.size), output, num_outputs, num_inputs,
        groups.scales.shape[-2], OUTPUTS=_OUTPUTS, SPAN=groups.span,
        IN_ASSEMBLY=codes.device.type == "cuda" and dtype.itemsize == 2, num_warps=4, **launch_options(codes.device),
    )  # fmt: skip
    return output


@triton.jit
def _write_out(
    codes, groups, output, num_outputs, num_inputs, num_groups,
    OUTPUTS: tl.constexpr, SPAN: tl.constexpr, IN_ASSEMBLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (block of outputs, span of inputs, weight of a stack)."""
    wait_for_inputs(PDL)
    number = tl.program_id(2).to(tl.int64)
    out = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    mask = out[:, None] < num_outputs
    out = tl.minimum(out, num_outputs - 1)
    start = tl.program_id(1) * SPAN
    dtype: tl.constexpr = output.dtype.element_ty
    row = number * num_outputs + out
    rows = output + row[:, None] * num_inputs
    scales, zeros, order = groups.scales, groups.zeros, groups.order
    scales += number * num_groups * num_outputs
    if zeros is not None:
        zeros += number * num_groups * num_outputs
    own_groups = GroupOperand(scales, zeros, order, groups.size)
    if codes.dtype.element_ty == tl.uint8:
        half: tl.constexpr = SPAN // 2
        low, high = _load_numbers(
            codes + row[:, None] * (num_inputs // 2), own_groups, start, num_outputs, out, dtype, half, IN_ASSEMBLY
        )
        low_column = start + tl.arange(0, half)
        high_column = low_column + half
        if order is not None:
            order += number * num_inputs
            low_column, high_column = tl.load(order + low_column), tl.load(order + high_column)
        tl.store(rows + low_column[None, :], low, mask=mask)
        tl.store(rows + high_column[None, :], high, mask=mask)
    else:
        column = start + tl.arange(0, SPAN)
        scale, _ = meaning(own_groups, start, num_outputs, out)
        code = tl.load(codes + row[:, None] * num_inputs + column[None, :]).to(tl.float32)
        tl.store(rows + column[None, :], (code * scale.to(tl.float32)[:, None]).to(dtype), mask=mask)
