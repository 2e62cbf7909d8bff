"""Products of experts with many pairs each, by tiles with the pairs on the left.

Instructions then have 256 columns, and read less shared memory.
"""

import triton
import triton.language as tl

from llm.kernels.expert_adapters import add_adapters_of_many
from llm.kernels.expert_pairs import expert_swiglu, find_tile, load_pairs
from llm.kernels.launch import wait_for_inputs
from llm.kernels.operands import WeightOperand


@triton.jit
def _tokens_times_weights(
    x, weights, pairs, output, adapters, expert, first, last, block, num_outputs, num_inputs,
    PER_TOKEN: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, TILE_K: tl.constexpr, SWIGLU: tl.constexpr,
    LIMIT: tl.constexpr, ALPHA: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """A tile of pairs times a block of one expert's outputs, written to `output`."""
    place, is_pair, pair, source = load_pairs(pairs, first, last, ROWS, PER_TOKEN, SWIGLU)
    row_of = x + source[:, None].to(tl.int64) * num_inputs
    num_columns: tl.constexpr = 2 * OUTPUTS if SWIGLU else OUTPUTS
    number = tl.arange(0, num_columns)
    weight_row = block * OUTPUTS + number % OUTPUTS + number // OUTPUTS * num_outputs  # of the gate, then of the other
    weight_of = weights.numbers + weight_row[None, :] * num_inputs
    k = tl.arange(0, TILE_K)
    acc = tl.zeros([ROWS, num_columns], tl.float32)
    for start in range(0, num_inputs, TILE_K):
        column = start + k
        rows = tl.load(row_of + column[None, :])
        acc = tl.dot(rows, tl.load(weight_of + column[:, None]).to(rows.dtype), acc)
    if weights.scales is not None:
        acc *= tl.load(weights.scales + weight_row)[None, :]
    if weights.bias is not None:
        acc += tl.load(weights.bias + weight_row).to(tl.float32)[None, :]
    if adapters is not None:
        num_rows = (2 if SWIGLU else 1) * num_outputs
        acc = add_adapters_of_many(
            acc, adapters, expert, place, is_pair, pair // PER_TOKEN, weight_row, number // OUTPUTS, num_rows, SWIGLU,
            RULE,
        )  # fmt: skip
    dtype: tl.constexpr = output.dtype.element_ty
    out = block * OUTPUTS + tl.arange(0, OUTPUTS)
    if SWIGLU:
        gate, up = tl.split(tl.permute(tl.reshape(acc, [ROWS, 2, OUTPUTS]), [0, 2, 1]))
        result = expert_swiglu(gate, up, dtype, LIMIT, ALPHA)
        to = place
    else:
        result = (acc * tl.load(pairs.weights + pair, mask=is_pair, other=0.0)[:, None]).to(dtype)
        to = pair
    tl.store(output + to[:, None].to(tl.int64) * num_outputs + out[None, :], result, mask=is_pair[:, None])


@triton.jit
def many_pairs_product(
    x, weights, pairs, output, adapters, num_outputs, num_inputs,
    COUNTS: tl.constexpr, TILE: tl.constexpr, SWIGLU: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr,
    RULE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (block of outputs, tile of pairs of one expert), of sizes that tiles divide.

    An expert's last tile is half as high if that is enough.
    """
    wait_for_inputs(PDL)
    mine, first, last = find_tile(pairs.starts, tl.program_id(1), COUNTS, TILE.rows)
    if mine >= COUNTS.block:
        return
    num_rows = (2 if SWIGLU else 1) * num_outputs
    numbers, scales, bias = weights.numbers, weights.scales, weights.bias
    numbers += mine.to(tl.int64) * num_rows * num_inputs
    if scales is not None:
        scales += mine * num_rows
    if bias is not None:
        bias += mine * num_rows
    own_weights = WeightOperand(numbers, scales, bias)
    if last - first > TILE.rows // 2:
        _tokens_times_weights(
            x, own_weights, pairs, output, adapters, mine, first, last, tl.program_id(0), num_outputs, num_inputs,
            COUNTS.per_token, TILE.rows, TILE.outputs, TILE.k, SWIGLU, LIMIT, ALPHA, RULE,
        )  # fmt: skip
    else:
        _tokens_times_weights(
            x, own_weights, pairs, output, adapters, mine, first, last, tl.program_id(0), num_outputs, num_inputs,
            COUNTS.per_token, TILE.rows // 2, TILE.outputs, TILE.k, SWIGLU, LIMIT, ALPHA, RULE,
        )  # fmt: skip
