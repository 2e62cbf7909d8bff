"""The kernels behind `Linear`: products of few rows, bound by reading the weights."""

import triton
import triton.language as tl

from llm.kernels.activation import bounded_swiglu, gated
from llm.kernels.groups import sum_of_groups
from llm.kernels.launch import prefetch, wait_for_inputs, wait_then_launch


@triton.jit
def sum_of_products(
    x, gate_row, up_row, row, num_rows, num_inputs, begin, end,
    TILE: tl.constexpr, SWIGLU: tl.constexpr, IS_EVEN: tl.constexpr,
):  # fmt: skip
    """Weights times rows over the inputs from `begin` to `end`: (OUTPUTS, rows) float32, of gate and of up."""
    outputs: tl.constexpr = TILE.outputs
    k = tl.arange(0, TILE.k)
    acc = tl.zeros([outputs, row.shape[0]], tl.float32)
    up = tl.zeros([outputs, row.shape[0]], tl.float32)
    for start in range(begin, end, TILE.k):
        column = start + k
        pointers = x + row[None, :] * num_inputs + column[:, None]
        if IS_EVEN:
            columns = tl.load(pointers, mask=row[None, :] < num_rows, other=0.0)
            gate = tl.load(gate_row + column[None, :])
        else:
            exists = column < num_inputs
            columns = tl.load(pointers, mask=(row[None, :] < num_rows) & exists[:, None], other=0.0)
            gate = tl.load(gate_row + column[None, :], mask=exists[None, :], other=0.0)
        acc = tl.dot(gate.to(columns.dtype), columns, acc, input_precision="ieee")
        if SWIGLU:
            up = tl.dot(tl.load(up_row + column[None, :]).to(columns.dtype), columns, up, input_precision="ieee")
    return acc, up


@triton.jit
def _sum(
    x, gate_row, up_row, groups, weight_row, row, num_rows, num_outputs, num_inputs, begin, end, TILE: tl.constexpr,
    GROUP: tl.constexpr, SWIGLU: tl.constexpr, IS_EVEN: tl.constexpr, IN_UNITS: tl.constexpr, IN_ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Weights, plain or in groups, times rows over the inputs from `begin` to `end`: of gate and of up."""
    if groups.scales is None:
        acc, up = sum_of_products(x, gate_row, up_row, row, num_rows, num_inputs, begin, end, TILE, SWIGLU, IS_EVEN)
    else:
        acc, up = sum_of_groups(
            x, gate_row, up_row, groups, weight_row, row, num_rows, num_outputs, num_inputs, begin, end, TILE, GROUP,
            SWIGLU, IN_UNITS, IN_ASSEMBLY,
        )  # fmt: skip
    return acc, up


@triton.jit
def shared_sum(acc, up, partial, arrivals, place, part, row, TILE: tl.constexpr, SWIGLU: tl.constexpr):
    """Put a part of a sum to the others of its tile: the whole sum, and whether this program arrived last, as
    otherwise there is none."""
    rows: tl.constexpr = TILE.rows
    outputs: tl.constexpr = TILE.outputs
    size: tl.constexpr = 2 * outputs * rows if SWIGLU else outputs * rows
    tile = tl.arange(0, outputs)[:, None] * rows + row[None, :]
    tiles = partial + place.to(tl.int64) * (TILE.num_parts * size)
    tl.store(tiles + part * size + tile, acc)
    if SWIGLU:
        tl.store(tiles + part * size + outputs * rows + tile, up)
    tl.debug_barrier()  # every thread's share is written before this program counts as arrived
    is_last = tl.atomic_add(arrivals + place, 1, sem="acq_rel") == TILE.num_parts - 1
    if is_last:
        tl.store(arrivals + place, 0)
        acc = tl.zeros([outputs, rows], tl.float32)
        up = tl.zeros([outputs, rows], tl.float32)
        for other in range(TILE.num_parts):
            # Past the first-level cache, which does not see other multiprocessors' writes.
            acc += tl.load(tiles + other * size + tile, cache_modifier=".cg")
            if SWIGLU:
                up += tl.load(tiles + other * size + outputs * rows + tile, cache_modifier=".cg")
    return acc, up, is_last


@triton.jit(do_not_specialize=["num_rows"])
def tile_product(
    x, weights, groups, output, partial, arrivals, num_rows, num_outputs, num_inputs, inputs_per_part,
    TILE: tl.constexpr, GROUP: tl.constexpr, SWIGLU: tl.constexpr, GELU: tl.constexpr, ADDS: tl.constexpr,
    IS_EVEN: tl.constexpr, IN_UNITS: tl.constexpr, CAN_PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (block of rows in its turn, block of outputs, turn and part of the sum).

    The weights are the left factor: a tensor-core product has at least 64 rows on its left, but as few as 8 columns on
    its right. Where the sum's parts are shared out, the program that arrives last adds them up, always in the same
    order; where not, each program adds up all parts in that order. GROUP and IN_UNITS: see `sum_of_groups`.
    """
    rows: tl.constexpr = TILE.rows
    outputs: tl.constexpr = TILE.outputs
    num_shares: tl.constexpr = TILE.num_parts if TILE.is_shared else 1
    row_block = tl.program_id(2) // num_shares * tl.num_programs(0) + tl.program_id(0)
    block = tl.program_id(1)
    part = tl.program_id(2) % num_shares
    num_rows -= row_block * rows
    if num_rows <= 0:
        return
    out = block * outputs + tl.arange(0, outputs)
    row = tl.arange(0, rows)
    begin = part * inputs_per_part
    # Outputs past the last one read its weights, and are not written.
    weight_row = out if IS_EVEN else tl.minimum(out, num_outputs - 1)
    codes_per_number: tl.constexpr = 2 if weights.numbers.dtype.element_ty == tl.uint8 else 1
    row_size = num_inputs // codes_per_number
    if groups.scales is not None:  # a way to say that rows begin at multiples of a span, so that loads are wide
        row_size = num_inputs // TILE.k * (TILE.k // codes_per_number)
    gate_row = weights.numbers + weight_row[:, None].to(tl.int64) * row_size
    up_row = gate_row + num_outputs.to(tl.int64) * row_size
    if CAN_PREFETCH:  # weights depend on nobody: fetch the first tiles while the kernel before drains
        line_size: tl.constexpr = 1024 // weights.numbers.dtype.element_ty.primitive_bitwidth
        num_lines: tl.constexpr = max(2 * TILE.k // codes_per_number // line_size, 1)
        line = begin // codes_per_number + tl.arange(0, num_lines) * line_size
        prefetch(gate_row + line[None, :])
        if SWIGLU:
            prefetch(up_row + line[None, :])
    wait_for_inputs(PDL)
    x += row_block.to(tl.int64) * rows * num_inputs
    if TILE.num_parts == 1 or TILE.is_shared:
        acc, up = _sum(
            x, gate_row, up_row, groups, weight_row, row, num_rows, num_outputs, num_inputs, begin,
            begin + inputs_per_part, TILE, GROUP, SWIGLU, IS_EVEN, IN_UNITS, CAN_PREFETCH,
        )  # fmt: skip
    else:
        tl.static_assert(not SWIGLU)
        acc = tl.zeros([outputs, rows], tl.float32)
        for other in range(TILE.num_parts):
            start = other * inputs_per_part
            share, up = _sum(
                x, gate_row, up_row, groups, weight_row, row, num_rows, num_outputs, num_inputs, start,
                start + inputs_per_part, TILE, GROUP, SWIGLU, IS_EVEN, IN_UNITS, CAN_PREFETCH,
            )  # fmt: skip
            acc += share
    is_last = True
    if TILE.is_shared:
        place = row_block * tl.num_programs(1) + block
        acc, up, is_last = shared_sum(acc, up, partial, arrivals, place, part, row, TILE, SWIGLU)
    if is_last:
        dtype: tl.constexpr = output.dtype.element_ty
        if weights.scales is not None:
            acc *= tl.load(weights.scales + weight_row)[:, None]
            if SWIGLU:
                up *= tl.load(weights.scales + num_outputs + weight_row)[:, None]
        if weights.bias is not None:
            acc += tl.load(weights.bias + weight_row).to(tl.float32)[:, None]
        result = gated(acc, up, dtype, GELU) if SWIGLU else acc.to(dtype)
        offsets = row[None, :] * num_outputs.to(tl.int64) + out[:, None]
        mask = row[None, :] < num_rows
        if not IS_EVEN:
            mask &= out[:, None] < num_outputs
        pointers = output + row_block.to(tl.int64) * rows * num_outputs + offsets
        if ADDS:
            result += tl.load(pointers, mask=mask, other=0.0)
        tl.store(pointers, result, mask=mask)


@triton.jit
def _load(pointers, exists, IS_EVEN: tl.constexpr):
    """What is there; zeros where nothing exists, which is nowhere if IS_EVEN."""
    return tl.load(pointers) if IS_EVEN else tl.load(pointers, mask=exists, other=0.0)


@triton.jit
def single_row_product(
    x, norm, weights, output, experts, num_outputs, num_inputs, norm_eps,
    OUTPUTS: tl.constexpr, TILE_K: tl.constexpr, SWIGLU: tl.constexpr, GELU: tl.constexpr, OFFSET: tl.constexpr,
    ADDS: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, IS_EVEN: tl.constexpr, CAN_PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (block of outputs of one row, one of `experts`), without tensor cores, which would idle.

    With `experts` the weights are a stack of several products', of which each row of the output gets one.
    With a norm's weights it is the product of RMSNorm(x): each program works out the mean square for itself, which it
    reads all of x for anyway, and divides by its root in the end. With a LIMIT the SwiGLU is `bounded_swiglu`.
    """
    out = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    k = tl.arange(0, TILE_K)
    weight, scales, bias = weights.numbers, weights.scales, weights.bias
    if experts is not None:
        wait_then_launch(PDL)
        expert = tl.load(experts + tl.program_id(1)).to(tl.int64)
        num_rows = (2 if SWIGLU else 1) * num_outputs
        weight += expert * num_rows * num_inputs
        output += tl.program_id(1) * num_outputs
        if scales is not None:
            scales += expert * num_rows
        if bias is not None:
            bias += expert * num_rows
    gate_row = weight + out[:, None].to(tl.int64) * num_inputs
    up_row = gate_row + num_outputs.to(tl.int64) * num_inputs
    if experts is None:
        if CAN_PREFETCH:  # weights depend on nobody: fetch the first tile while the kernel before drains
            line = tl.arange(0, TILE_K // 64) * 64
            prefetch(gate_row + line[None, :])
            if SWIGLU:
                prefetch(up_row + line[None, :])
        wait_for_inputs(PDL)
    acc = tl.zeros([OUTPUTS, TILE_K], tl.float32)
    up = tl.zeros([OUTPUTS, TILE_K], tl.float32)
    squares = tl.zeros([TILE_K], tl.float32)
    for start in tl.range(0, num_inputs, TILE_K, num_stages=3):
        column = start + k
        exists = column < num_inputs
        values = _load(x + column, exists, IS_EVEN).to(tl.float32)
        if norm is not None:
            squares += values * values
            factor = _load(norm + column, exists, IS_EVEN).to(tl.float32)
            values *= factor if OFFSET is None else factor + OFFSET
        acc += _load(gate_row + column[None, :], exists[None, :], IS_EVEN).to(tl.float32) * values[None, :]
        if SWIGLU:
            up += _load(up_row + column[None, :], exists[None, :], IS_EVEN).to(tl.float32) * values[None, :]
    result, up_result = tl.sum(acc, 1), tl.sum(up, 1)
    if norm is not None:
        inverse = tl.rsqrt(tl.sum(squares, 0) / num_inputs + norm_eps)
        result *= inverse
        up_result *= inverse
    dtype: tl.constexpr = output.dtype.element_ty
    if scales is not None:
        result *= tl.load(scales + out)
        if SWIGLU:
            up_result *= tl.load(scales + num_outputs + out)
    if bias is not None:
        result += tl.load(bias + out).to(tl.float32)
        if SWIGLU:
            up_result += tl.load(bias + num_outputs + out).to(tl.float32)
    if LIMIT is not None:
        rounded = bounded_swiglu(result, up_result, dtype, LIMIT, ALPHA)
    else:
        rounded = gated(result, up_result, dtype, GELU) if SWIGLU else result.to(dtype)
    if ADDS:
        rounded += tl.load(output + out)
    tl.store(output + out, rounded)
