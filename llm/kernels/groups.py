"""Products of weights in `WeightGroups` by tiles on tensor cores, which multiply codes less zeros: nothing is rounded.

Each group's part of a sum has to be multiplied with the group's scale. For few rows it is made by itself, multiplied
and added. For more that would take twice the registers; there the sum is kept in units of the scale of the group that
is being added, and changes its unit at a group's end.
"""

import triton
import triton.language as tl

from llm.kernels.group_codes import groups_in, quarters, scales_at, zeros_at

_LEAST_UNIT = tl.constexpr(2.0**-64)
"""Unit of a sum where a group's scale is smaller, such as nought: what it adds is as good as nothing then."""


@triton.jit
def columns_of(x, order, start, row, num_rows, num_inputs, SIZE: tl.constexpr):
    """The rows' numbers at the inputs of SIZE columns of codes: (SIZE, rows). Without `num_rows` every row exists."""
    column = start + tl.arange(0, SIZE)
    if order is not None:
        column = tl.load(order + column)
    pointers = x + row[None, :] * num_inputs + column[:, None]
    return tl.load(pointers) if num_rows is None else tl.load(pointers, mask=row[None, :] < num_rows, other=0.0)


@triton.jit
def unit_of(scale):
    """A scale as the unit of a sum."""
    return tl.where(tl.abs(scale) < _LEAST_UNIT, _LEAST_UNIT, scale)


@triton.jit
def _unit_at(groups, start, num_rows_of_weight, out, GROUP: tl.constexpr, IN_UNITS: tl.constexpr):
    """The scales there, as units of sums where these have units."""
    scale = scales_at(groups, start, num_rows_of_weight, out, GROUP)
    return unit_of(scale) if IN_UNITS else scale


@triton.jit
def _close(acc, part, unit, next_unit, IN_UNITS: tl.constexpr):
    """End a group: the sum, and the part of the next group to add to."""
    if IN_UNITS:
        acc = part * tl.fdiv(unit, next_unit)[:, None]
        part = acc
    else:
        acc += part * unit[:, None]
        part = tl.zeros_like(part)
    return acc, part


@triton.jit
def _add_span(
    acc, unit, word_row, groups, out, size, start, end, pieces,
    SPAN: tl.constexpr, GROUP: tl.constexpr, IN_UNITS: tl.constexpr, IN_ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Add what the weights of some outputs and the rows' numbers, see `_pieces_of`, make over one span.

    Returns the sum, and the unit or scale of the span's group that comes behind it, which is asked for a turn before it
    is needed.
    """
    quarter: tl.constexpr = SPAN // 4
    num_groups: tl.constexpr = groups_in(SPAN, GROUP)
    words = tl.load(word_row + (start // 4 + tl.arange(0, quarter))[None, :])
    next_unit = _unit_at(groups, tl.minimum(start + SPAN, end - SPAN), size, out, GROUP, IN_UNITS)
    first_zero = zeros_at(groups, start, size, out, GROUP)[:, None]
    second_zero, third_zero, fourth_zero = first_zero, first_zero, first_zero
    if num_groups > 1:
        third_zero = zeros_at(groups, start + 2 * quarter, size, out, GROUP)[:, None]
        fourth_zero = third_zero
        third_unit = _unit_at(groups, start + 2 * quarter, size, out, GROUP, IN_UNITS)
        second_unit, fourth_unit = unit, third_unit
    if num_groups > 2:
        second_zero = zeros_at(groups, start + quarter, size, out, GROUP)[:, None]
        fourth_zero = zeros_at(groups, start + 3 * quarter, size, out, GROUP)[:, None]
        second_unit = _unit_at(groups, start + quarter, size, out, GROUP, IN_UNITS)
        fourth_unit = _unit_at(groups, start + 3 * quarter, size, out, GROUP, IN_UNITS)
    first, second, third, fourth = quarters(
        words, first_zero, second_zero, third_zero, fourth_zero, pieces[0].dtype, IN_ASSEMBLY
    )
    part = acc if IN_UNITS else tl.zeros_like(acc)
    if num_groups == 1 and not IN_UNITS:
        numbers = behind(behind(first, second), behind(third, fourth))
        part = tl.dot(numbers, pieces[0], part, input_precision="ieee")
        acc, part = _close(acc, part, unit, next_unit, IN_UNITS)
    else:
        if num_groups == 1:
            fourth_unit = unit
        part = tl.dot(first, pieces[0], part, input_precision="ieee")
        if num_groups > 2:
            acc, part = _close(acc, part, unit, second_unit, IN_UNITS)
        part = tl.dot(second, pieces[1], part, input_precision="ieee")
        if num_groups > 1:
            acc, part = _close(acc, part, second_unit, third_unit, IN_UNITS)
        part = tl.dot(third, pieces[2], part, input_precision="ieee")
        if num_groups > 2:
            acc, part = _close(acc, part, third_unit, fourth_unit, IN_UNITS)
        part = tl.dot(fourth, pieces[3], part, input_precision="ieee")
        acc, part = _close(acc, part, fourth_unit, next_unit, IN_UNITS)
    return acc, next_unit


@triton.jit
def behind(early, late):
    """The columns of one tensor, and behind them those of another: in registers, no number goes to another thread."""
    return tl.join(early, late).permute(0, 2, 1).reshape(early.shape[0], 2 * early.shape[1])


@triton.jit
def _pieces_of(
    x, order, start, row, num_rows, num_inputs, SPAN: tl.constexpr, GROUP: tl.constexpr, IN_UNITS: tl.constexpr
):
    """The rows' numbers over a span, by what is multiplied at once: all of it, or each quarter.

    Each product is waited for, so one is faster than four. For many rows, where sums have units, it takes too many
    registers.
    """
    quarter: tl.constexpr = SPAN // 4
    if groups_in(SPAN, GROUP) == 1 and not IN_UNITS:
        whole = columns_of(x, order, start, row, num_rows, num_inputs, SPAN)
        first, second, third, fourth = whole, whole, whole, whole
    else:
        first = columns_of(x, order, start, row, num_rows, num_inputs, quarter)
        second = columns_of(x, order, start + quarter, row, num_rows, num_inputs, quarter)
        third = columns_of(x, order, start + 2 * quarter, row, num_rows, num_inputs, quarter)
        fourth = columns_of(x, order, start + 3 * quarter, row, num_rows, num_inputs, quarter)
    return first, second, third, fourth


@triton.jit
def sum_of_groups(
    x, gate_row, up_row, groups, weight_row, row, num_rows, num_outputs, num_inputs, begin, end,
    TILE: tl.constexpr, GROUP: tl.constexpr, SWIGLU: tl.constexpr, IN_UNITS: tl.constexpr, IN_ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Weights in groups times rows over the inputs from `begin` to `end`: (OUTPUTS, rows) float32, of gate and of up.

    Args:
        gate_row, up_row: (OUTPUTS, 1) pointers to the outputs' codes.
        TILE: with codes of 4 bits `k` is the span; with 8 bits it divides the size of a group.
        GROUP: the size of a group.
        IN_UNITS: sums have units, with codes of 4 bits.
    """
    if gate_row.dtype.element_ty == tl.uint8:
        acc, up = _sum_of_4_bits(
            x, gate_row.to(tl.pointer_type(tl.int16)), up_row.to(tl.pointer_type(tl.int16)), groups, weight_row, row,
            num_rows, num_outputs, num_inputs, begin, end, TILE, GROUP, SWIGLU, IN_UNITS, IN_ASSEMBLY,
        )  # fmt: skip
    else:
        acc, up = _sum_of_8_bits(
            x, gate_row, up_row, groups, weight_row, row, num_rows, num_outputs, num_inputs, begin, end, TILE, GROUP,
            SWIGLU,
        )  # fmt: skip
    return acc, up


@triton.jit
def _sum_of_4_bits(
    x, gate_row, up_row, groups, weight_row, row, num_rows, num_outputs, num_inputs, begin, end,
    TILE: tl.constexpr, GROUP: tl.constexpr, SWIGLU: tl.constexpr, IN_UNITS: tl.constexpr, IN_ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """See `sum_of_groups`; codes are read as words."""
    outputs: tl.constexpr = TILE.outputs
    acc = tl.zeros([outputs, row.shape[0]], tl.float32)
    up = tl.zeros([outputs, row.shape[0]], tl.float32)
    size = 2 * num_outputs if SWIGLU else num_outputs
    up_weight_row = weight_row + num_outputs
    in_assembly: tl.constexpr = IN_ASSEMBLY and x.dtype.element_ty != tl.float32
    unit = _unit_at(groups, begin, size, weight_row, GROUP, IN_UNITS)
    up_unit = _unit_at(groups, begin, size, up_weight_row, GROUP, IN_UNITS) if SWIGLU else unit
    for start in range(begin, end, TILE.k):
        pieces = _pieces_of(x, groups.order, start, row, num_rows, num_inputs, TILE.k, GROUP, IN_UNITS)
        acc, unit = _add_span(
            acc, unit, gate_row, groups, weight_row, size, start, end, pieces, TILE.k, GROUP, IN_UNITS, in_assembly
        )
        if SWIGLU:
            up, up_unit = _add_span(
                up, up_unit, up_row, groups, up_weight_row, size, start, end, pieces, TILE.k, GROUP, IN_UNITS,
                in_assembly,
            )  # fmt: skip
    if IN_UNITS:
        acc *= unit[:, None]
        up *= up_unit[:, None]
    return acc, up


@triton.jit
def _sum_of_8_bits(
    x, gate_row, up_row, groups, weight_row, row, num_rows, num_outputs, num_inputs, begin, end,
    TILE: tl.constexpr, GROUP: tl.constexpr, SWIGLU: tl.constexpr,
):  # fmt: skip
    """See `sum_of_groups`."""
    outputs: tl.constexpr = TILE.outputs
    acc = tl.zeros([outputs, row.shape[0]], tl.float32)
    up = tl.zeros([outputs, row.shape[0]], tl.float32)
    size = 2 * num_outputs if SWIGLU else num_outputs
    up_weight_row = weight_row + num_outputs
    # Asked for a turn before they are needed: nothing else hides the time they take.
    next_scale = scales_at(groups, begin, size, weight_row, GROUP)
    next_up_scale = scales_at(groups, begin, size, up_weight_row, GROUP) if SWIGLU else next_scale
    for start in range(begin, end, TILE.k):
        scale, up_scale = next_scale, next_up_scale
        then = tl.minimum(start + TILE.k, end - TILE.k)
        next_scale = scales_at(groups, then, size, weight_row, GROUP)
        if SWIGLU:
            next_up_scale = scales_at(groups, then, size, up_weight_row, GROUP)
        rows = columns_of(x, groups.order, start, row, num_rows, num_inputs, TILE.k)
        column = (start + tl.arange(0, TILE.k))[None, :]
        acc += tl.dot(tl.load(gate_row + column).to(rows.dtype), rows, input_precision="ieee") * scale[:, None]
        if SWIGLU:
            up += tl.dot(tl.load(up_row + column).to(rows.dtype), rows, input_precision="ieee") * up_scale[:, None]
    return acc, up
