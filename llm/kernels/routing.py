"""Which experts each token goes to, and which tokens each expert gets: on the device, without a word to the host.

A token and one of its experts are a pair. Pairs are numbered token by token, best expert first, and ordered by expert
for the products behind.
"""

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
import triton
import triton.language as tl

from llm.config import RoutingConfig
from llm.kernels.expert_pairs import ExpertPairs, PairCounts
from llm.kernels.launch import launch_options, most_stages, prefetch, wait_for_inputs
from llm.kernels.norm import Norm
from llm.kernels.pair_order import order_by_expert

_ROWS, _ROWS_OF_MANY = 16, 64
"""Tokens a program: for more than _MANY_TOKENS of them the router is read often enough that wider tiles pay."""
_MANY_TOKENS = 1024
_TILE_K, _TILE_K_OF_MANY_EXPERTS, _WIDE_TILE_K = 128, 64, 32
"""Inputs of a tile: in 16 bits, in 16 bits where experts are more than _MANY_EXPERTS, and in 32."""
_MANY_EXPERTS = 256
_MOST_PARTS = 8
"""Programs that share the sums of few tokens. The router's shape alone says how sums are cut."""
_NUM_STAGES = 3


class ExpertShape(NamedTuple):
    """Shape of a layer's experts.

    Attributes:
        num_experts: that there are.
        per_token: that a token goes to.
        size: width of each.
        hidden_size: of the residual stream.
        normalizes: whether the weights of a token's experts add up to 1; else those of all experts do.
        swiglu_limit, swiglu_alpha: of what `bounded_swiglu` says; without a limit experts have a plain SwiGLU.
        routing: how experts are chosen.
    """

    num_experts: int
    per_token: int
    size: int
    hidden_size: int
    normalizes: bool
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.702
    routing: RoutingConfig = RoutingConfig()

    @property
    def pair_counts(self) -> PairCounts:
        """What kernels of pairs have to know of it."""
        return PairCounts(self.num_experts, triton.next_power_of_2(self.num_experts), self.per_token)


class _Choice(NamedTuple):
    """How experts are chosen, a constant of compiled kernels.

    Attributes:
        per_token: experts of a token.
        slots: `per_token` rounded up to a size that tiles have.
        normalizes: whether the weights of a token's experts add up to 1; else those of all experts do.
        uses_sigmoid, num_groups, num_top_groups, scale: see `RoutingConfig`.
    """

    per_token: int
    slots: int
    normalizes: bool
    uses_sigmoid: bool
    num_groups: int
    num_top_groups: int
    scale: float


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
    squares: torch.Tensor

    @classmethod
    def allocate(cls, shape: ExpertShape, max_tokens: int, device: torch.device) -> Self:
        """Room for steps of up to `max_tokens`."""
        num_pairs = max_tokens * shape.per_token
        experts, order, starts = (
            torch.zeros(size, dtype=torch.int32, device=device)
            for size in (num_pairs, num_pairs, shape.num_experts + 1)
        )
        num_parts = min(max_tokens, _MANY_TOKENS) * _MOST_PARTS
        partial = torch.empty(num_parts * _block(shape.num_experts), device=device)
        squares = torch.empty(num_parts, device=device)
        return cls(shape, experts, torch.zeros(num_pairs, device=device), order, starts, partial, squares)

    @property
    def pairs(self) -> ExpertPairs:
        """The pairs as products' kernels take them."""
        return ExpertPairs(self.order, self.starts, self.weights)

    def order_pairs(self, num_tokens: int) -> None:
        """Order the pairs of the first `num_tokens` by expert; those of one expert stay in their order."""
        num_pairs, num_experts = num_tokens * self.shape.per_token, self.shape.num_experts
        order_by_expert(self.experts[:num_pairs], num_experts, self.order, self.starts)


def route(
    x: torch.Tensor,
    router: torch.Tensor,
    routes: Routes,
    norm: Norm | None = None,
    bias: torch.Tensor | None = None,
    correction: torch.Tensor | None = None,
    more: torch.Tensor | None = None,
) -> None:
    """Write experts and weights of each token's pairs, as `llm.models.experts.Router` says, in float32.

    Args:
        x: (tokens, hidden_size), contiguous.
        router: (num_experts, hidden_size), contiguous.
        norm: of x, where x is not normalised yet; one whose weights are factors.
        bias: (num_experts,), added to the logits; None for none.
        correction: (num_experts,) float32, added to what experts are chosen by; None for none.
        more: (tokens, num_experts) float32, added to the logits of each token; None for none.
    """
    (num_tokens, num_inputs), shape, options = x.shape, routes.shape, launch_options(x.device)
    block = _block(shape.num_experts)
    tile_k = _TILE_K_OF_MANY_EXPERTS if block > _MANY_EXPERTS else _TILE_K
    tile_k = tile_k if x.dtype.itemsize == 2 else _WIDE_TILE_K
    num_parts = 1
    while num_parts < _MOST_PARTS and num_inputs % (2 * num_parts * tile_k) == 0:
        num_parts *= 2
    if num_parts == 1:  # no whole tiles, but whole lines of memory perhaps
        num_parts = max((parts for parts in range(1, _MOST_PARTS + 1) if num_inputs % (64 * parts) == 0), default=1)
    inputs_per_part = triton.cdiv(num_inputs, num_parts)
    sizes = {"NUM_EXPERTS": shape.num_experts, "EXPERT_BLOCK": block, "NUM_PARTS": num_parts}
    routing = shape.routing
    choice = _Choice(
        shape.per_token, triton.next_power_of_2(shape.per_token), shape.normalizes, routing.uses_sigmoid,
        routing.num_groups, routing.num_top_groups, routing.scale,
    )  # fmt: skip
    if num_tokens > _MANY_TOKENS:
        assert norm is None, "of one token alone"
        _route_many[(triton.cdiv(num_tokens, _ROWS_OF_MANY),)](
            x, router, bias, more, correction, routes.experts, routes.weights, num_tokens, num_inputs, inputs_per_part,
            **sizes, CHOICE=choice, ROWS=_ROWS_OF_MANY, TILE_K=tile_k, num_warps=_num_warps(block),
            num_stages=_num_stages(x, (block + _ROWS_OF_MANY) * tile_k), **options,
        )  # fmt: skip
        return
    _parts_of_logits[(num_parts, triton.cdiv(num_tokens, _ROWS))](
        x, None if norm is None else norm.weight, router, routes.partial, routes.squares, num_tokens, num_inputs,
        inputs_per_part, **sizes, ROWS=_ROWS, TILE_K=tile_k, num_warps=_num_warps(block),
        num_stages=_num_stages(x, (block + _ROWS) * tile_k),
        CAN_PREFETCH=x.device.type == "cuda" and inputs_per_part % (2 * tile_k) == 0, **options,
    )  # fmt: skip
    _choose[(num_tokens,)](
        routes.partial, routes.squares, bias, more, correction, routes.experts, routes.weights, num_inputs,
        0.0 if norm is None else norm.eps, **sizes, CHOICE=choice, HAS_NORM=norm is not None, num_warps=1, **options,
    )  # fmt: skip


def _num_warps(block: int) -> int:
    """Of a program with a tile of so many experts, whose logits fit their registers."""
    return 4 if block < _MANY_EXPERTS else 8


def _num_stages(x: torch.Tensor, numbers_a_stage: int) -> int:
    return min(_NUM_STAGES, most_stages(x.device, numbers_a_stage * x.itemsize))


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


@triton.jit
def _add_bias(logits, bias, more, row, num_tokens, NUM_EXPERTS: tl.constexpr):
    """Logits, (experts, rows), with the bias of their experts and what their tokens have more, if there is any."""
    expert = tl.minimum(tl.arange(0, logits.shape[0]), NUM_EXPERTS - 1)
    if bias is not None:
        logits += tl.load(bias + expert).to(tl.float32)[:, None]
    if more is not None:
        place = row[None, :].to(tl.int64) * NUM_EXPERTS + expert[:, None]
        logits += tl.load(more + place, mask=(row < num_tokens)[None, :], other=0.0)
    return logits


@triton.jit
def _sum_by_halves(x):
    """Sums over the first dimension of x, (a power of two, rows), that do not depend on how threads share it out.

    `tl.sum` adds up in the order of threads, which another number of rows changes.
    """
    for _ in tl.static_range(16):
        if x.shape[0] > 1:
            x = tl.sum(tl.reshape(x, [x.shape[0] // 2, 2, x.shape[1]]), 1)
    return tl.reshape(x, [x.shape[1]])


@triton.jit
def _in_best_groups(scores, NUM_EXPERTS: tl.constexpr, CHOICE: tl.constexpr):
    """Where the experts of a row's best groups are, (experts, rows) boolean, of what experts are chosen by.

    A group of neighbouring experts is as good as its best expert or, with a sigmoid, as the sum of its two best.
    """
    num_groups: tl.constexpr = CHOICE.num_groups
    num_best: tl.constexpr = CHOICE.num_top_groups
    expert = tl.arange(0, scores.shape[0])
    group_of = expert // (NUM_EXPERTS // num_groups)
    is_best = tl.zeros([scores.shape[0], scores.shape[1]], tl.int1)
    best_of = tl.full([scores.shape[0], scores.shape[1]], -float("inf"), tl.float32)
    for group in tl.static_range(num_groups):  # at each of its experts, what the group is worth
        inside = tl.where((group_of == group)[:, None], scores, -float("inf"))
        worth, found = tl.max(inside, 0, return_indices=True)
        if CHOICE.uses_sigmoid:
            worth += tl.max(tl.where(expert[:, None] == found[None, :], -float("inf"), inside), 0)
        best_of = tl.where((group_of == group)[:, None], worth[None, :], best_of)
    for _ in tl.static_range(num_best):
        _, found = tl.max(best_of, 0, return_indices=True)
        is_found = group_of[:, None] == (found // (NUM_EXPERTS // num_groups))[None, :]
        is_best |= is_found
        best_of = tl.where(is_found, -float("inf"), best_of)
    return is_best


@triton.jit
def _store_best(
    logits, correction, row, experts, weights, num_tokens, NUM_EXPERTS: tl.constexpr, CHOICE: tl.constexpr
):  # fmt: skip
    """Store the best experts of a row by its logits, (experts, rows) float32, and their weights."""
    slots: tl.constexpr = CHOICE.slots
    expert = tl.arange(0, logits.shape[0])
    exists = expert[:, None] < NUM_EXPERTS
    logits = tl.where(exists, logits, -float("inf"))
    highest = tl.max(logits, 0)
    scores = 1 / (1 + tl.exp(-logits)) if CHOICE.uses_sigmoid else logits  # a softmax keeps the order of logits
    left = scores
    if correction is not None:
        left += tl.load(correction + tl.minimum(expert, NUM_EXPERTS - 1))[:, None]
    left = tl.where(exists, left, -float("inf"))
    if CHOICE.num_groups > 1:
        left = tl.where(_in_best_groups(left, NUM_EXPERTS, CHOICE), left, -float("inf"))
    slot = tl.arange(0, slots)
    values = tl.full([slots, row.shape[0]], 0.0 if CHOICE.uses_sigmoid else -float("inf"), tl.float32)
    chosen = tl.zeros([slots, row.shape[0]], tl.int32)
    # Added up in order, however many rows there are.
    total = tl.full([row.shape[0]], 1e-20 if CHOICE.uses_sigmoid else 0.0, tl.float32)
    for i in range(CHOICE.per_token):
        best, found = tl.max(left, 0, return_indices=True)
        found = tl.minimum(found, NUM_EXPERTS - 1)  # one that exists, even of logits that are NaN
        is_found = expert[:, None] == found[None, :]
        if CHOICE.uses_sigmoid:  # without the correction
            best = tl.sum(tl.where(is_found, scores, 0.0), 0)
        total += best if CHOICE.uses_sigmoid else tl.exp(best - highest)
        left = tl.where(is_found, -float("inf"), left)
        values = tl.where(slot[:, None] == i, best[None, :], values)
        chosen = tl.where(slot[:, None] == i, found[None, :], chosen)
    shares = values if CHOICE.uses_sigmoid else tl.exp(values - highest[None, :])
    if not CHOICE.normalizes:
        total = (
            tl.full([row.shape[0]], 1.0, tl.float32)
            if CHOICE.uses_sigmoid
            else _sum_by_halves(tl.exp(logits - highest[None, :]))
        )
    pair = row[None, :] * CHOICE.per_token + slot[:, None]
    mask = (row < num_tokens)[None, :] & (slot < CHOICE.per_token)[:, None]
    tl.store(weights + pair, shares / total[None, :] * CHOICE.scale, mask=mask)
    tl.store(experts + pair, chosen, mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _parts_of_logits(
    x, norm, router, partial, squares, num_tokens, num_inputs, inputs_per_part,
    NUM_EXPERTS: tl.constexpr, EXPERT_BLOCK: tl.constexpr, ROWS: tl.constexpr, TILE_K: tl.constexpr,
    NUM_PARTS: tl.constexpr, CAN_PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (part of the sum, block of tokens)."""
    part = tl.program_id(0)
    expert = tl.arange(0, EXPERT_BLOCK)
    router_row = router + tl.minimum(expert, NUM_EXPERTS - 1)[:, None] * num_inputs
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    exists = row < num_tokens
    source = tl.where(exists, row, 0)[None, :].to(tl.int64)
    begin = part * inputs_per_part
    if CAN_PREFETCH:
        prefetch(router_row + begin + (tl.arange(0, TILE_K // 32) * 64)[None, :])
    wait_for_inputs(PDL)
    share, more = _logits(x, norm, router_row, source, begin, begin + inputs_per_part, num_inputs, TILE_K)
    place = row * NUM_PARTS + part
    tl.store(partial + place[None, :] * EXPERT_BLOCK + expert[:, None], share, mask=exists[None, :])
    if norm is not None:
        tl.store(squares + place, more, mask=exists)


@triton.jit
def _choose(
    partial, squares, bias, more, correction, experts, weights, num_inputs, norm_eps,
    NUM_EXPERTS: tl.constexpr, EXPERT_BLOCK: tl.constexpr, CHOICE: tl.constexpr, NUM_PARTS: tl.constexpr,
    HAS_NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: one token, whose logits' parts are added up in order."""
    token = tl.program_id(0)
    row = token + tl.arange(0, 1)
    expert = tl.arange(0, EXPERT_BLOCK)
    wait_for_inputs(PDL)
    logits = tl.zeros([EXPERT_BLOCK, 1], tl.float32)
    square = 0.0
    for part in tl.static_range(NUM_PARTS):
        place = row * NUM_PARTS + part
        logits += tl.load(partial + place[None, :] * EXPERT_BLOCK + expert[:, None])
        if HAS_NORM:
            square += tl.load(squares + token * NUM_PARTS + part)
    if HAS_NORM:
        logits *= tl.rsqrt(square / num_inputs + norm_eps)
    logits = _add_bias(logits, bias, more, row, token + 1, NUM_EXPERTS)
    _store_best(logits, correction, row, experts, weights, token + 1, NUM_EXPERTS, CHOICE)


@triton.jit(do_not_specialize=["num_tokens"])
def _route_many(
    x, router, bias, more, correction, experts, weights, num_tokens, num_inputs, inputs_per_part,
    NUM_EXPERTS: tl.constexpr, EXPERT_BLOCK: tl.constexpr, CHOICE: tl.constexpr, ROWS: tl.constexpr,
    TILE_K: tl.constexpr, NUM_PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: a block of tokens, whose sums are cut and added up as those of few tokens are."""
    expert = tl.arange(0, EXPERT_BLOCK)
    router_row = router + tl.minimum(expert, NUM_EXPERTS - 1)[:, None] * num_inputs
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    source = tl.where(row < num_tokens, row, 0)[None, :].to(tl.int64)
    wait_for_inputs(PDL)
    logits = tl.zeros([EXPERT_BLOCK, ROWS], tl.float32)
    for part in range(NUM_PARTS):
        begin = part * inputs_per_part
        share, _ = _logits(x, None, router_row, source, begin, begin + inputs_per_part, num_inputs, TILE_K)
        logits += share
    logits = _add_bias(logits, bias, more, row, num_tokens, NUM_EXPERTS)
    _store_best(logits, correction, row, experts, weights, num_tokens, NUM_EXPERTS, CHOICE)
