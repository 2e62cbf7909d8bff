"""Orders pairs of token and expert by expert; those of one expert stay in their order.

Of few pairs, or for few experts, each expert's program reads all. Otherwise one kernel counts what each block of pairs
has of each expert, and another puts the pairs of each block where the counts say.
"""

import torch
import triton
import triton.language as tl

from llm.kernels.launch import launch_options, wait_for_inputs

_FEW_PAIRS, _FEW_EXPERTS = 8192, 64
_PAIRS_A_TURN = 8192
_BLOCK = 512
_BLOCKS_AT_ONCE, _PAIRS_AT_ONCE = 16, 64


def num_counts(num_pairs: int, num_experts: int) -> int:
    """Numbers of scratch memory that `order_by_expert` takes for up to so many pairs."""
    return 2 * -(-num_pairs // _BLOCK) * _bins(num_experts)


def order_by_expert(
    experts: torch.Tensor, num_experts: int, order: torch.Tensor, starts: torch.Tensor, counts: torch.Tensor
) -> None:
    """Write the order and where each expert's pairs begin in it.

    Args:
        experts: (pairs,) int32, expert of each pair.
        order: (pairs or more,) int32, of which the first are written.
        starts: (num_experts + 1,) int32; the last is the number of pairs.
        counts: int32 scratch memory, see `num_counts`.
    """
    num_pairs, options = len(experts), launch_options(experts.device)
    if num_pairs <= _FEW_PAIRS or num_experts <= _FEW_EXPERTS:
        block = min(max(triton.next_power_of_2(num_pairs), 128), _PAIRS_A_TURN)
        _order_pairs[(num_experts + 1,)](
            experts, order, starts, num_pairs, BLOCK=block, num_warps=min(max(block // 256, 4), 16), **options
        )
        return
    num_blocks, bins = triton.cdiv(num_pairs, _BLOCK), _bins(num_experts)
    _count_pairs[(num_blocks,)](experts, counts, num_pairs, BINS=bins, BLOCK=_BLOCK, num_warps=4, **options)
    _place_pairs[(num_blocks,)](
        experts, counts, order, starts, num_pairs, num_blocks, NUM_EXPERTS=num_experts, BINS=bins, BLOCK=_BLOCK,
        BLOCKS_AT_ONCE=_BLOCKS_AT_ONCE, PAIRS_AT_ONCE=_PAIRS_AT_ONCE, num_warps=8, **options,
    )  # fmt: skip


def _bins(num_experts: int) -> int:
    """One more than there are experts at least: the last is of what is no pair."""
    return 1 << num_experts.bit_length()


@triton.jit(do_not_specialize=["num_pairs"])
def _order_pairs(experts, order, starts, num_pairs, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Program: one expert; the last program is of an expert behind all, who has no pairs."""
    wait_for_inputs(PDL)
    expert = tl.program_id(0)
    num_before = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        num_before += (tl.load(experts + pair, mask=pair < num_pairs, other=1 << 30) < expert).to(tl.int32)
    first = tl.sum(num_before, 0)
    tl.store(starts + expert, first)
    for start in range(0, num_pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        is_here = (tl.load(experts + pair, mask=pair < num_pairs, other=1 << 30) == expert).to(tl.int32)
        tl.store(order + first + tl.cumsum(is_here, 0) - is_here, pair, mask=is_here > 0)
        first += tl.sum(is_here, 0)


@triton.jit(do_not_specialize=["num_pairs"])
def _count_pairs(experts, counts, num_pairs, BINS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Program: a block of pairs, whose experts it counts: (blocks, BINS)."""
    wait_for_inputs(PDL)
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(experts + pair, mask=pair < num_pairs, other=BINS - 1)
    tl.store(counts + tl.program_id(0) * BINS + tl.arange(0, BINS), tl.histogram(expert, BINS))


@triton.jit(do_not_specialize=["num_pairs", "num_blocks"])
def _place_pairs(
    experts, counts, order, starts, num_pairs, num_blocks,
    NUM_EXPERTS: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS_AT_ONCE: tl.constexpr,
    PAIRS_AT_ONCE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: a block of pairs; each expert's go behind those of the blocks before."""
    block = tl.program_id(0)
    number = tl.arange(0, BLOCK)
    pair = block * BLOCK + number
    bin = tl.arange(0, BINS)
    wait_for_inputs(PDL)
    expert = tl.load(experts + pair, mask=pair < num_pairs, other=BINS - 1)
    total = tl.zeros([BINS], tl.int32)
    before = tl.zeros([BINS], tl.int32)
    for first in range(0, num_blocks, BLOCKS_AT_ONCE):
        other = first + tl.arange(0, BLOCKS_AT_ONCE)
        found = tl.load(counts + other[:, None] * BINS + bin[None, :], mask=(other < num_blocks)[:, None], other=0)
        total += tl.sum(found, 0)
        before += tl.sum(tl.where((other < block)[:, None], found, 0), 0)
    start = tl.cumsum(total, 0) - total
    tl.store(starts + bin, start, mask=(bin <= NUM_EXPERTS) & (block == 0))
    # Through memory to the threads that want it, behind what all blocks count.
    first_places = counts + (num_blocks + block) * BINS
    tl.store(first_places + bin, start + before)
    tl.debug_barrier()
    rank = tl.zeros([BLOCK], tl.int32)
    for first in range(0, BLOCK, PAIRS_AT_ONCE):
        other_number = first + tl.arange(0, PAIRS_AT_ONCE)
        other_pair = block * BLOCK + other_number
        other_expert = tl.load(experts + other_pair, mask=other_pair < num_pairs, other=BINS - 1)
        is_before = (other_expert[None, :] == expert[:, None]) & (other_number[None, :] < number[:, None])
        rank += tl.sum(is_before.to(tl.int32), 1)
    tl.store(order + tl.load(first_places + expert) + rank, pair, mask=pair < num_pairs)
