"""Weights in `WeightGroups` as plain numbers of the activations' format, written to memory.

For many rows the vendor's library, or the kernels of 16-bit experts, multiply them: writing and reading a weight once
is little beside what these do then.
"""

import torch
import triton
import triton.language as tl

from llm.core.weight_groups import FP8, WeightGroups
from llm.kernels.group_codes import groups_in, quarters, scales_at, zeros_at
from llm.kernels.launch import launch_options, wait_for_inputs
from llm.kernels.mxfp4 import floats_written_out
from llm.kernels.operands import GroupOperand

_OUTPUTS = 32
"""Of a program that writes weights out."""


def written_out(codes: torch.Tensor, groups: WeightGroups, dtype: torch.dtype) -> torch.Tensor:
    """The weight (out, in), or stack of (experts, out, in), that codes mean, in `dtype`."""
    if groups.is_mxfp4:
        return floats_written_out(codes, groups, dtype)
    *stack, num_outputs, width = codes.shape
    num_inputs = width * (1 if codes.dtype == FP8 else 2)
    output = torch.empty(*stack, num_outputs, num_inputs, dtype=dtype, device=codes.device)
    grid = triton.cdiv(num_outputs, _OUTPUTS), num_inputs // groups.span, codes.shape[0] if stack else 1
    _write_out[grid](
        codes, GroupOperand(groups.scales, groups.zeros, groups.order), output, num_outputs, num_inputs,
        groups.scales.shape[-2], OUTPUTS=_OUTPUTS, SPAN=groups.span, GROUP=groups.size,
        IN_ASSEMBLY=codes.device.type == "cuda" and dtype.itemsize == 2, num_warps=4, **launch_options(codes.device),
    )  # fmt: skip
    return output


@triton.jit
def _write_out(
    codes, groups, output, num_outputs, num_inputs, num_groups,
    OUTPUTS: tl.constexpr, SPAN: tl.constexpr, GROUP: tl.constexpr, IN_ASSEMBLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (block of outputs, span of inputs, weight of a stack)."""
    wait_for_inputs(PDL)
    number = tl.program_id(2).to(tl.int64)
    out = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_output = out[:, None] < num_outputs
    out = tl.minimum(out, num_outputs - 1)
    start = tl.program_id(1) * SPAN
    row = (number * num_outputs + out)[:, None]
    rows = output + row * num_inputs
    scales, zeros, order = groups.scales, groups.zeros, groups.order
    scales += number * num_groups * num_outputs
    if zeros is not None:
        zeros += number * num_groups * num_outputs
    if order is not None:
        order += number * num_inputs
    own_groups = GroupOperand(scales, zeros, order)
    if codes.dtype.element_ty == tl.uint8:
        words = codes.to(tl.pointer_type(tl.int16)) + row * (num_inputs // 4)
        _write_quarters(rows, words, own_groups, start, num_outputs, out, is_output, SPAN, GROUP, IN_ASSEMBLY)
    else:
        column = (start + tl.arange(0, SPAN))[None, :]
        scale = scales_at(own_groups, start, num_outputs, out, GROUP)[:, None]
        code = tl.load(codes + row * num_inputs + column).to(tl.float32)
        tl.store(rows + column, (code * scale).to(output.dtype.element_ty), mask=is_output)


@triton.jit
def _write_quarters(
    rows, words, groups, start, size, out, is_output,
    SPAN: tl.constexpr, GROUP: tl.constexpr, IN_ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Write what the codes of a span mean."""
    quarter: tl.constexpr = SPAN // 4
    num_groups: tl.constexpr = groups_in(SPAN, GROUP)
    word = tl.arange(0, quarter)
    first_zero = zeros_at(groups, start, size, out, GROUP)[:, None]
    first_scale = scales_at(groups, start, size, out, GROUP)[:, None]
    second_zero, third_zero, fourth_zero = first_zero, first_zero, first_zero
    second_scale, third_scale, fourth_scale = first_scale, first_scale, first_scale
    if num_groups > 1:
        third_zero = zeros_at(groups, start + 2 * quarter, size, out, GROUP)[:, None]
        third_scale = scales_at(groups, start + 2 * quarter, size, out, GROUP)[:, None]
        fourth_zero, fourth_scale = third_zero, third_scale
    if num_groups > 2:
        second_zero = zeros_at(groups, start + quarter, size, out, GROUP)[:, None]
        second_scale = scales_at(groups, start + quarter, size, out, GROUP)[:, None]
        fourth_zero = zeros_at(groups, start + 3 * quarter, size, out, GROUP)[:, None]
        fourth_scale = scales_at(groups, start + 3 * quarter, size, out, GROUP)[:, None]
    dtype: tl.constexpr = rows.dtype.element_ty
    first, second, third, fourth = quarters(
        tl.load(words + (start // 4 + word)[None, :]), first_zero, second_zero, third_zero, fourth_zero, dtype,
        IN_ASSEMBLY,
    )  # fmt: skip
    column = start + word
    _write(rows, groups.order, column, first, first_scale, is_output)
    _write(rows, groups.order, column + quarter, second, second_scale, is_output)
    _write(rows, groups.order, column + 2 * quarter, third, third_scale, is_output)
    _write(rows, groups.order, column + 3 * quarter, fourth, fourth_scale, is_output)


@triton.jit
def _write(rows, order, column, numbers, scale, is_output):
    """Write the numbers of one quarter, rounded once."""
    if order is not None:
        column = tl.load(order + column)
    tl.store(rows + column[None, :], (numbers.to(tl.float32) * scale).to(rows.dtype.element_ty), mask=is_output)
