"""Which experts each token goes to, and which tokens each expert gets: on the device, without a word to the host.

A token and one of its experts are a pair. Pairs are numbered token by token, best expert first, and ordered by expert
for the products behind.
"""

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
import triton
import triton.language as tl

from llm.kernels.launch import launch_options, wait_for_inputs
from llm.kernels.norm import Norm

_ROWS, _ROWS_OF_MANY = 16, 64
"""Tokens a program: for more than _MANY_TOKENS of them the router is read often enough that wider tiles pay."""
_MANY_TOKENS = 1024
_TILE_K = 128
_MOST_PARTS = 8
"""Programs that share the sums of few tokens. The router's shape alone says how sums are cut."""
_ORDER_BLOCK = 4096


class ExpertShape(NamedTuple):
    """Shape of a layer's experts.

    Attributes:
        num_experts: that there are.
        per_token: that a token goes to.
        size: width of each.
        hidden_size: of the residual stream.
        normalizes: whether the weights of a token's experts add up to 1; else those of all experts do.
    """

    num_experts: int
    per_token: int
    size: int
    hidden_size: int
    normalizes: bool


@dataclass(frozen=True, slots=True)
class Routes:
    """Where the tokens of a step go, and scratch memory to find out.

    Attributes:
        experts: (pairs,) int32, expert of each pair.
        weights: (pairs,) float32, weight of each pair.
        order: (pairs,) int32, the pairs ordered by expert.
        starts: (num_experts + 1,) int32, where the pairs of each expert begin in `order`, and where they end.
    """

    shape: ExpertShape
    experts: torch.Tensor
    weights: torch.Tensor
    order: torch.Tensor
    starts: torch.Tensor
    partial: torch.Tensor
    arrivals: torch.Tensor

    @classmethod
    def allocate(cls, shape: ExpertShape, max_tokens: int, device: torch.device) -> Self:
        """Room for steps of up to `max_tokens`."""
        num_pairs = max_tokens * shape.per_token
        experts, order, starts = (
            torch.zeros(size, dtype=torch.int32, device=device)
            for size in (num_pairs, num_pairs, shape.num_experts + 1)
        )
        num_blocks = triton.cdiv(min(max_tokens, _MANY_TOKENS), _ROWS)
        partial = torch.empty(num_blocks * _MOST_PARTS * (_block(shape.num_experts) + 1) * _ROWS, device=device)
        arrivals = torch.zeros(num_blocks, dtype=torch.int32, device=device)
        return cls(shape, experts, torch.zeros(num_pairs, device=device), order, starts, partial, arrivals)


def route(x: torch.Tensor, router: torch.Tensor, routes: Routes, norm: Norm | None = None) -> None:
    """Write experts and weights of each token's pairs: the largest of the router's logits, by softmax in float32.

    Args:
        x: (tokens, hidden_size), contiguous.
        router: (num_experts, hidden_size), contiguous.
        norm: of x, where x is not normalised yet.
    """
    (num_tokens, num_inputs), shape = x.shape, routes.shape
    is_many = num_tokens > _MANY_TOKENS
    tile_k = _TILE_K if x.dtype.itemsize == 2 else 32
    num_parts = 1
    while num_parts < _MOST_PARTS and num_inputs % (2 * num_parts * tile_k) == 0:
        num_parts *= 2
    rows = _ROWS_OF_MANY if is_many else _ROWS
    is_shared = num_parts > 1 and not is_many
    _route[(num_parts if is_shared else 1, triton.cdiv(num_tokens, rows))](
        x, None if norm is None else norm.weight, router, routes.experts, routes.weights, routes.partial,
        routes.arrivals, num_tokens, num_inputs, triton.cdiv(num_inputs, num_parts), 0.0 if norm is None else norm.eps,
        NUM_EXPERTS=shape.num_experts, EXPERT_BLOCK=_block(shape.num_experts), PER_TOKEN=shape.per_token,
        SLOTS=triton.next_power_of_2(shape.per_token), NORMALIZES=shape.normalizes, ROWS=rows, TILE_K=tile_k,
        NUM_PARTS=num_parts, IS_SHARED=is_shared, num_warps=4, num_stages=3,
        **launch_options(x.device),
    )  # fmt: skip


def order_pairs(routes: Routes, num_tokens: int) -> None:
    """Order the pairs of the first `num_tokens` by expert; those of one expert stay in their order."""
    num_pairs = num_tokens * routes.shape.per_token
    block = min(max(triton.next_power_of_2(num_pairs), 128), _ORDER_BLOCK)
    _order_pairs[(routes.shape.num_experts + 1,)](
        routes.experts, routes.order, routes.starts, num_pairs, BLOCK=block, num_warps=4 if block <= 1024 else 8,
        **launch_options(routes.order.device),
    )  # fmt: skip


def _block(num_experts: int) -> int:
    """Experts of a tile: a product on tensor cores has at least 64 rows on its left, others 16."""
    return max(1 << (num_experts - 1).bit_length(), 16)


@triton.jit
def _logits(
    x, norm, router_row, source, begin, end, num_inputs, TILE_K: tl.constexpr,
):  # fmt: skip
    """Router times rows over the inputs from `begin` to `end`: (experts, rows) float32; and the rows' squares."""
    k = tl.arange(0, TILE_K)
    acc = tl.zeros([router_row.shape[0], source.shape[1]], tl.float32)
    squares = tl.zeros([source.shape[1]], tl.float32)
    for start in range(begin, end, TILE_K):
        column = start + k
        exists = column < end
        columns = tl.load(x + source * num_inputs + column[:, None], mask=exists[:, None], other=0.0)
        if norm is not None:
            wide = columns.to(tl.float32)
            squares += tl.sum(wide * wide, 0)
            factor = tl.load(norm + column, mask=exists, other=0.0).to(tl.float32)
            columns = (wide * factor[:, None]).to(columns.dtype)
        weights = tl.load(router_row + column[None, :], mask=exists[None, :], other=0.0)
        acc = tl.dot(weights, columns, acc, input_precision="ieee")
    return acc, squares


@triton.jit(do_not_specialize=["num_tokens"])
def _route(
    x, norm, router, experts, weights, partial, arrivals, num_tokens, num_inputs, inputs_per_part, norm_eps,
    NUM_EXPERTS: tl.constexpr, EXPERT_BLOCK: tl.constexpr, PER_TOKEN: tl.constexpr, SLOTS: tl.constexpr,
    NORMALIZES: tl.constexpr, ROWS: tl.constexpr, TILE_K: tl.constexpr, NUM_PARTS: tl.constexpr,
    IS_SHARED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (part of the sum, block of tokens). The program that arrives last adds up the parts, in order."""
    part = tl.program_id(0)
    block = tl.program_id(1)
    expert = tl.arange(0, EXPERT_BLOCK)
    router_row = router + tl.minimum(expert, NUM_EXPERTS - 1)[:, None] * num_inputs
    row = block * ROWS + tl.arange(0, ROWS)
    source = tl.where(row < num_tokens, row, 0)[None, :].to(tl.int64)
    wait_for_inputs(PDL)
    logits = tl.zeros([EXPERT_BLOCK, ROWS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    is_last = True
    if IS_SHARED:
        begin = part * inputs_per_part
        share, more = _logits(x, norm, router_row, source, begin, begin + inputs_per_part, num_inputs, TILE_K)
        size: tl.constexpr = (EXPERT_BLOCK + 1) * ROWS
        tile = expert[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        tail = EXPERT_BLOCK * ROWS + tl.arange(0, ROWS)
        tiles = partial + block * (NUM_PARTS * size)
        tl.store(tiles + part * size + tile, share)
        tl.store(tiles + part * size + tail, more)
        tl.debug_barrier()  # every thread's share is written before this program counts as arrived
        is_last = tl.atomic_add(arrivals + block, 1, sem="acq_rel") == NUM_PARTS - 1
        if is_last:
            tl.store(arrivals + block, 0)
            for other in range(NUM_PARTS):
                # Past the first-level cache, which does not see other multiprocessors' writes.
                logits += tl.load(tiles + other * size + tile, cache_modifier=".cg")
                squares += tl.load(tiles + other * size + tail, cache_modifier=".cg")
    else:
        for other in range(NUM_PARTS):
            begin = other * inputs_per_part
            share, more = _logits(x, norm, router_row, source, begin, begin + inputs_per_part, num_inputs, TILE_K)
            logits += share
            squares += more
    if is_last:
        if norm is not None:
            logits *= tl.rsqrt(squares / num_inputs + norm_eps)[None, :]
        logits = tl.where(expert[:, None] < NUM_EXPERTS, logits, -float("inf"))
        highest = tl.max(logits, 0)
        slot = tl.arange(0, SLOTS)
        values = tl.full([SLOTS, ROWS], -float("inf"), tl.float32)
        chosen = tl.zeros([SLOTS, ROWS], tl.int32)
        left = logits
        for i in range(PER_TOKEN):
            best = tl.max(left, 0)
            # One that exists, even of logits that are NaN.
            found = tl.min(tl.where(left == best[None, :], expert[:, None], NUM_EXPERTS - 1), 0)
            left = tl.where(expert[:, None] == found[None, :], -float("inf"), left)
            values = tl.where(slot[:, None] == i, best[None, :], values)
            chosen = tl.where(slot[:, None] == i, found[None, :], chosen)
        shares = tl.exp(values - highest[None, :])
        total = tl.sum(shares, 0) if NORMALIZES else tl.sum(tl.exp(logits - highest[None, :]), 0)
        pair = row[None, :] * PER_TOKEN + slot[:, None]
        mask = (row < num_tokens)[None, :] & (slot < PER_TOKEN)[:, None]
        tl.store(weights + pair, shares / total[None, :], mask=mask)
        tl.store(experts + pair, chosen, mask=mask)


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
