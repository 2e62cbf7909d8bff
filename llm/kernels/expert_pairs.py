"""What kernels of experts do around a tile of pairs: find it, and write what an expert makes of it."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from llm.kernels.activation import bounded_swiglu, swiglu


class ExpertPairs(NamedTuple):
    """The pairs of tokens and experts, see `Routes`.

    Attributes:
        order: (pairs,) int32, the pairs ordered by expert.
        starts: (num_experts + 1,) int32, where the pairs of each expert begin in `order`, and where they end.
        weights: (pairs,) float32, the weight of each pair.
    """

    order: torch.Tensor
    starts: torch.Tensor
    weights: torch.Tensor


class PairCounts(NamedTuple):
    """How many experts there are, a constant of compiled kernels.

    Attributes:
        num_experts: of a layer.
        block: `num_experts` rounded up to a size that tiles have.
        per_token: experts of a token.
    """

    num_experts: int
    block: int
    per_token: int

    def most_tiles(self, num_tokens: int, rows: int) -> int:
        """Number of tiles, each of up to `rows` pairs of one expert, that hold a step's pairs however they spread."""
        num_pairs = num_tokens * self.per_token
        return min((num_pairs - 1) // rows + min(self.num_experts, num_pairs), num_pairs)


@triton.jit
def load_pairs(pairs, first, last, ROWS: tl.constexpr, PER_TOKEN: tl.constexpr, SWIGLU: tl.constexpr):
    """The pairs of a tile from `first` to `last`.

    Returns, (ROWS,) each: their places in the order of experts, which of these exist, their numbers in the order of
    tokens, and the row of the input that each one multiplies.
    """
    place = first + tl.arange(0, ROWS)
    is_pair = place < last
    pair = tl.load(pairs.order + place, mask=is_pair, other=0)
    return place, is_pair, pair, pair // PER_TOKEN if SWIGLU else tl.where(is_pair, place, first)


@triton.jit
def find_tile(starts, tile, COUNTS: tl.constexpr, ROWS: tl.constexpr):
    """The expert of a tile of up to ROWS pairs, and its first and last pair; no expert's number where there is none."""
    expert = tl.arange(0, COUNTS.block)
    exists = expert < COUNTS.num_experts
    first = tl.load(starts + expert, mask=exists, other=0)
    last = tl.load(starts + expert + 1, mask=exists, other=0)
    num_tiles = tl.cdiv(last - first, ROWS)
    last_tile = tl.cumsum(num_tiles, 0)
    mine = tl.sum((last_tile <= tile).to(tl.int32), 0)  # every expert before this one ends before this tile
    is_mine = expert == mine
    first = tl.sum(tl.where(is_mine, first + (tile - last_tile + num_tiles) * ROWS, 0), 0)
    return mine, first, tl.sum(tl.where(is_mine, last, 0), 0)


@triton.jit
def expert_swiglu(gate, up, dtype: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr):
    """What an expert makes of its gate and of what it gates: `swiglu`, or with a LIMIT `bounded_swiglu`."""
    return swiglu(gate, up, dtype) if LIMIT is None else bounded_swiglu(gate, up, dtype, LIMIT, ALPHA)


@triton.jit
def store_pairs(
    acc, up, bias, bias_row, place, pair, is_pair, out, pair_weights, output, num_outputs,
    SWIGLU: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, IS_EVEN: tl.constexpr,
):  # fmt: skip
    """Store sums, (outputs, pairs) float32, of gate and of up; see `ExpertMixture.product` for where and what.

    Args:
        bias_row: where in `bias` that of each output stands, and of a gate; the other's is `num_outputs` behind.
        place, pair: of each in the order of experts, and in that of tokens.
    """
    if bias is not None:
        acc += tl.load(bias + bias_row).to(tl.float32)[:, None]
        if SWIGLU:
            up += tl.load(bias + bias_row + num_outputs).to(tl.float32)[:, None]
    dtype: tl.constexpr = output.dtype.element_ty
    if SWIGLU:
        result = expert_swiglu(acc, up, dtype, LIMIT, ALPHA)
        to = place
    else:
        result = (acc * tl.load(pair_weights + pair, mask=is_pair, other=0.0)[None, :]).to(dtype)
        to = pair
    mask = is_pair[None, :]
    if not IS_EVEN:
        mask &= out[:, None] < num_outputs
    tl.store(output + to[None, :].to(tl.int64) * num_outputs + out[:, None], result, mask=mask)
