"""Products of experts whose weights are in groups, such as MXFP4: codes become numbers on their way to tensor cores."""

import triton
import triton.language as tl

from llm.kernels.expert_adapters import add_adapters
from llm.kernels.expert_pairs import find_tile, load_pairs, store_pairs
from llm.kernels.groups import sum_of_groups
from llm.kernels.launch import wait_for_inputs
from llm.kernels.mxfp4 import product_of_floats
from llm.kernels.operands import GroupOperand


@triton.jit
def groups_tile_product(
    x, weights, groups, pairs, output, adapters, num_outputs, num_inputs, num_groups,
    COUNTS: tl.constexpr, TILE: tl.constexpr, SWIGLU: tl.constexpr, GROUP: tl.constexpr, LIMIT: tl.constexpr,
    ALPHA: tl.constexpr, IS_EVEN: tl.constexpr, IN_UNITS: tl.constexpr, RULE: tl.constexpr, IN_ASSEMBLY: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (block of outputs, tile of pairs of one expert). Weights are the left factor, as in `tile_product`.

    Args:
        weights, groups: codes, and the scales, zeros and order of inputs of all experts.
        num_groups: of an expert's inputs.
        GROUP, IN_UNITS, IN_ASSEMBLY: see `sum_of_groups`; MXFP4 has no use for the first two.
    """
    wait_for_inputs(PDL)
    mine, first, last = find_tile(pairs.starts, tl.program_id(1), COUNTS, TILE.rows)
    if mine >= COUNTS.block:
        return
    place, is_pair, pair, source = load_pairs(pairs, first, last, TILE.rows, COUNTS.per_token, SWIGLU)
    source = source.to(tl.int64)
    out = tl.program_id(0) * TILE.outputs + tl.arange(0, TILE.outputs)
    # Outputs past the last one read its weights, and are not written.
    weight_row = out if IS_EVEN else tl.minimum(out, num_outputs - 1)
    num_rows = (2 if SWIGLU else 1) * num_outputs
    codes_per_number: tl.constexpr = 2 if weights.numbers.dtype.element_ty == tl.uint8 else 1
    # Said so that the compiler sees that rows begin at multiples of a span, and loads are wide.
    row_size = num_inputs // TILE.k * (TILE.k // codes_per_number)
    gate_row = weights.numbers + mine.to(tl.int64) * num_rows * row_size + weight_row[:, None] * row_size
    up_row = gate_row + num_outputs * row_size
    scales, zeros, columns = groups.scales, groups.zeros, groups.order
    scales += mine.to(tl.int64) * num_groups * num_rows
    if zeros is not None:
        zeros += mine.to(tl.int64) * num_groups * num_rows
    if columns is not None:
        columns += mine * num_inputs
    own_groups = GroupOperand(scales, zeros, columns)
    if scales.dtype.element_ty == tl.uint8:
        acc, up = product_of_floats(
            x, gate_row, up_row, scales, weight_row, source, num_outputs, num_inputs, TILE.outputs, TILE.k, SWIGLU,
            IN_ASSEMBLY,
        )  # fmt: skip
    else:
        acc, up = sum_of_groups(
            x, gate_row, up_row, own_groups, weight_row, source, None, num_outputs, num_inputs, 0, num_inputs, TILE,
            GROUP, SWIGLU, IN_UNITS, IN_ASSEMBLY,
        )  # fmt: skip
    if adapters is not None:
        acc, up = add_adapters(
            acc, up, adapters, mine, place, is_pair, pair // COUNTS.per_token, weight_row, num_outputs, SWIGLU, RULE
        )
    store_pairs(
        acc, up, weights.bias, mine * num_rows + weight_row, place, pair, is_pair, out, pairs.weights, output,
        num_outputs, SWIGLU, LIMIT, ALPHA, IS_EVEN,
    )  # fmt: skip
