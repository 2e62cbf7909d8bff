"""Orders pairs of token and expert by expert; those of one expert stay in their order.

Each expert's program reads all pairs. More programs, each with a chunk of them, were slower (decision 14).
"""

import torch
import triton
import triton.language as tl

from llm.kernels.launch import launch_options, wait_for_inputs

_PAIRS_A_TURN = 8192


def order_by_expert(experts: torch.Tensor, num_experts: int, order: torch.Tensor, starts: torch.Tensor) -> None:
    """Write the order and where each expert's pairs begin in it.

    Args:
        experts: (pairs,) int32, expert of each pair.
        order: (pairs or more,) int32, of which the first are written.
        starts: (num_experts + 1,) int32; the last is the number of pairs.
    """
    num_pairs = len(experts)
    block = min(max(triton.next_power_of_2(num_pairs), 128), _PAIRS_A_TURN)
    _order_pairs[(num_experts + 1,)](
        experts, order, starts, num_pairs, BLOCK=block, num_warps=min(max(block // 256, 4), 16),
        **launch_options(experts.device),
    )  # fmt: skip


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
