"""How the products of a mixture of experts are cut up: rules of the shape alone, found by measuring (decision 14)."""

from functools import cache
from typing import NamedTuple

import triton

WRITTEN_OUT_PAIRS, WRITTEN_OUT_PAIRS_OF_MXFP4 = 512, 128
"""Pairs an expert, in the mean, from which on weights in groups are written out for the kernels of 16 bits."""
MAX_SUMMED_ROWS = 32
"""Most rows of a tile whose sums over groups are scaled one by one; beyond it there are no registers for that."""


class ExpertTile(NamedTuple):
    """How an expert's product is cut up.

    Attributes:
        rows, outputs, k: size of a tile; of a SwiGLU, `outputs` of the gate and as many of what it gates.
    """

    rows: int
    outputs: int
    k: int
    num_warps: int
    num_stages: int


@cache
def expert_tile(num_pairs: int, num_experts: int, itemsize: int, deterministic: bool, swiglu: bool) -> ExpertTile:
    """What is fast where pairs spread evenly over experts. Deterministic: `k`, which orders sums, never changes."""
    if itemsize == 4:  # without tensor cores: no shape is fast
        return ExpertTile(16 if num_pairs < 32 * num_experts else 32, 32, 32, 4, 2)
    pairs_an_expert = num_pairs / num_experts
    if pairs_an_expert > 64:
        return ExpertTile(128, 128 if swiglu else 256, 64, 8, 4)
    rows = min(max(triton.next_power_of_2(int(1.5 * pairs_an_expert) + 1), 16), 64)
    if deterministic:
        return ExpertTile(rows, 64, 64, 4, 4)
    if rows == 16:
        return ExpertTile(rows, 64, 128, 4, 3)
    if swiglu:
        return ExpertTile(rows, 128, 128, 8, 3) if rows == 32 else ExpertTile(rows, 128, 64, 8, 4)
    return ExpertTile(rows, 128, 64, 4, 3)


@cache
def expert_group_tile(
    num_pairs: int, num_experts: int, k: int, itemsize: int, deterministic: bool, swiglu: bool
) -> ExpertTile:
    """The same for weights in groups, `k` inputs at a time."""
    if itemsize == 4:
        return ExpertTile(16 if num_pairs < 32 * num_experts else 32, 32, k, 4, 2)
    most_rows = 64 if swiglu or deterministic else 128
    rows = min(max(triton.next_power_of_2(int(1.5 * num_pairs / num_experts) + 1), 16), most_rows)
    is_wide = rows > 32 and not deterministic
    return ExpertTile(rows, 128 if is_wide else 64, k, 8 if is_wide else 4, 3)
