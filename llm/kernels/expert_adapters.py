"""Low-rank adapters on experts: each pair of token and expert has the factors of the token's adapter for that expert.

A pair's inputs are shrunk by a kernel of their own, tile by tile of pairs of one expert. The product itself expands the
numbers and adds them to its sums before it stores these, so that the activation comes behind, and pairs without an
adapter get the same bits as in a step of the model alone. A tile goes through the adapters of the step and leaves out
those that none of its pairs has. What a pair gets does not depend on others.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from llm.kernels.adapters import AdapterEntries, AdapterFactors
from llm.kernels.expert_pairs import find_tile, load_pairs
from llm.kernels.launch import launch_options, most_stages, wait_for_inputs
from llm.kernels.routing import Routes

_TILE_K = 128
_NUMBERS = 64
"""Numbers of a program that shrinks, at most."""
_SPLITS, _FEW_PAIRS = 4, 4096
"""Programs that share a sum that shrinks, and the pairs up to which they do."""
_FEW_ROWS, _MANY_ROWS = 16, 64
"""Pairs of a tile, and of one where experts have more than `_FEW_ROWS` in the mean."""


@dataclass(frozen=True, slots=True)
class ExpertFactors:
    """Factors of all slots for one projection of all experts that are here.

    Attributes:
        a: (slots, experts, parts · rank, inputs); each slot contiguous. Gate and up are parts of one product.
        b: (slots, experts, outputs, rank); each slot contiguous.
        rank: of a slot, a multiple of 16.
    """

    a: torch.Tensor
    b: torch.Tensor
    rank: int


@dataclass(frozen=True, slots=True)
class MixtureAdapters:
    """What the adapters of a step's tokens have for the experts of a layer.

    Attributes:
        which: the tokens' adapters.
        router: adds to the logits by which experts are chosen.
        gate_up, down: of the experts' projections.
    """

    which: AdapterEntries
    router: AdapterFactors
    gate_up: ExpertFactors
    down: ExpertFactors


class PairRule(NamedTuple):
    """How pairs' adapters are expanded, a constant of compiled kernels.

    Attributes:
        rank: of a slot.
        at_once: ranks of a product, which divide `rank`.
        num_splits: parts of each shrunk number.
    """

    rank: int
    at_once: int
    num_splits: int


class PairAdapters(NamedTuple):
    """The adapters of pairs as products' kernels take them.

    Attributes:
        factor_b: (slots, experts, outputs, rank), each slot contiguous.
        slot_stride: from slot to slot of it.
        slots: (tokens,) int32, the slot of each token's adapter, -1 for none.
        active: (1 + slots,) int32: how many adapters the tokens have, then their slots.
        shrunk: (splits, pairs, parts · rank) float32, in the order of experts.
        split_stride: from split to split.
    """

    factor_b: torch.Tensor
    slot_stride: int
    slots: torch.Tensor
    active: torch.Tensor
    shrunk: torch.Tensor
    split_stride: int


def shrink_pairs(
    x: torch.Tensor,
    factors: ExpertFactors,
    which: AdapterEntries,
    routes: Routes,
    num_tokens: int,
    *,
    swiglu: bool,
    deterministic: bool,
) -> tuple[PairAdapters, PairRule]:
    """Multiply each pair's row by the A of its token's adapter for its expert, once the pairs are ordered.

    Args:
        x, swiglu: see `ExpertMixture.product`.
        deterministic: how a sum is split depends on the shape of A alone.
    """
    shape, device = routes.shape, x.device
    num_pairs, num_inputs, num_numbers = num_tokens * shape.per_token, x.shape[1], factors.a.shape[2]
    num_splits = min(_SPLITS, triton.cdiv(num_inputs, _TILE_K)) if deterministic or num_pairs <= _FEW_PAIRS else 1
    inputs_per_split = triton.cdiv(triton.cdiv(num_inputs, _TILE_K), num_splits) * _TILE_K
    rows = _FEW_ROWS if deterministic or num_pairs <= _FEW_ROWS * shape.num_experts else _MANY_ROWS
    numbers = min(_NUMBERS, triton.next_power_of_2(num_numbers))
    shrunk = torch.empty(num_splits, num_pairs, num_numbers, dtype=torch.float32, device=device)
    counts = shape.pair_counts
    _shrink_pairs[(counts.most_tiles(num_tokens, rows), triton.cdiv(num_numbers, numbers), num_splits)](
        x, factors.a, routes.pairs, which.slots, which.active, shrunk, num_pairs, num_inputs, inputs_per_split,
        factors.a.stride(0), num_numbers, COUNTS=counts, SWIGLU=swiglu, ROWS=rows, NUMBERS=numbers, TILE_K=_TILE_K,
        IS_EVEN=inputs_per_split * num_splits == num_inputs, num_warps=4,
        num_stages=min(3, most_stages(device, (rows + numbers) * _TILE_K * x.dtype.itemsize)),
        **launch_options(device),
    )  # fmt: skip
    b, rank = factors.b, factors.rank
    at_once = min(rank & -rank, 64)
    adapters = PairAdapters(b, b.stride(0), which.slots, which.active, shrunk, shrunk.stride(0))
    return adapters, PairRule(rank, at_once, num_splits)


@triton.jit(do_not_specialize=["num_pairs"])
def _shrink_pairs(
    x, factor_a, pairs, slots, active, shrunk, num_pairs, num_inputs, inputs_per_split, slot_stride, num_numbers,
    COUNTS: tl.constexpr, SWIGLU: tl.constexpr, ROWS: tl.constexpr, NUMBERS: tl.constexpr, TILE_K: tl.constexpr,
    IS_EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of pairs of one expert, block of numbers, split)."""
    wait_for_inputs(PDL)
    mine, first, last = find_tile(pairs.starts, tl.program_id(0), COUNTS, ROWS)
    if mine >= COUNTS.block:
        return
    place, is_pair, pair, source = load_pairs(pairs, first, last, ROWS, COUNTS.per_token, SWIGLU)
    slot_of = tl.load(slots + pair // COUNTS.per_token, mask=is_pair, other=-1)
    number = tl.program_id(1) * NUMBERS + tl.arange(0, NUMBERS)
    is_number = number < num_numbers
    split = tl.program_id(2)
    begin = split * inputs_per_split
    rows = x + source[:, None].to(tl.int64) * num_inputs
    of_expert = factor_a + (mine.to(tl.int64) * num_numbers + number) * num_inputs
    to = (split.to(tl.int64) * num_pairs + place) * num_numbers
    k = tl.arange(0, TILE_K)
    for i in range(tl.load(active)):
        slot = tl.load(active + 1 + i)
        is_own = slot_of == slot
        if tl.max(is_own.to(tl.int32), 0) > 0:
            own = of_expert + slot.to(tl.int64) * slot_stride
            acc = tl.zeros([ROWS, NUMBERS], tl.float32)
            for start in range(begin, begin + inputs_per_split, TILE_K):
                column = start + k
                # A mask along the inputs would have them loaded one by one.
                row_mask, number_mask = is_own[:, None], is_number[None, :]
                if not IS_EVEN:
                    row_mask &= (column < num_inputs)[None, :]
                    number_mask &= (column < num_inputs)[:, None]
                inputs = tl.load(rows + column[None, :], mask=row_mask, other=0.0)
                factor = tl.load(own[None, :] + column[:, None], mask=number_mask, other=0.0)
                acc = tl.dot(inputs, factor, acc, input_precision="ieee")
            mask = is_own[:, None] & is_number[None, :]
            tl.store(shrunk + to[:, None] + number[None, :], acc, mask=mask)


@triton.jit
def _numbers(adapters, numbers, is_own, RULE: tl.constexpr):
    """Shrunk numbers at these pointers of the first split, summed over the splits; zeros where pairs have others."""
    num_splits: tl.constexpr = RULE.num_splits
    total = tl.load(numbers, mask=is_own, other=0.0)
    for split in tl.static_range(1, num_splits):
        total += tl.load(numbers + split * adapters.split_stride, mask=is_own, other=0.0)
    return total


@triton.jit
def add_adapters(
    acc, up, adapters, expert, place, is_pair, token, row, num_outputs, SWIGLU: tl.constexpr, RULE: tl.constexpr
):  # fmt: skip
    """Add what the pairs' B make of their shrunk numbers to sums, (outputs, pairs) float32, of gate and of up.

    Args:
        row: (outputs,), of the gate in B; that of up is `num_outputs` behind.
    """
    rank: tl.constexpr = RULE.rank
    at_once: tl.constexpr = RULE.at_once
    num_numbers: tl.constexpr = 2 * rank if SWIGLU else rank
    num_rows = (2 if SWIGLU else 1) * num_outputs
    slot_of = tl.load(adapters.slots + token, mask=is_pair, other=-1)
    of_expert = adapters.factor_b + (expert.to(tl.int64) * num_rows + row) * rank
    numbers_of = adapters.shrunk + place.to(tl.int64) * num_numbers
    r = tl.arange(0, at_once)
    for i in tl.range(0, tl.load(adapters.active), num_stages=1):  # stages would be memory that the product has
        slot = tl.load(adapters.active + 1 + i)
        is_own = slot_of == slot
        if tl.max(is_own.to(tl.int32), 0) > 0:
            own = of_expert + slot.to(tl.int64) * adapters.slot_stride
            for start in tl.static_range(0, rank, at_once):
                factor = tl.load(own[:, None] + start + r[None, :])
                pointers = numbers_of[None, :] + start + r[:, None]
                shrunk = _numbers(adapters, pointers, is_own[None, :], RULE)
                acc = tl.dot(factor, shrunk.to(factor.dtype), acc, input_precision="ieee")
                if SWIGLU:
                    factor = tl.load(own[:, None] + num_outputs * rank + start + r[None, :])
                    shrunk = _numbers(adapters, pointers + rank, is_own[None, :], RULE)
                    up = tl.dot(factor, shrunk.to(factor.dtype), up, input_precision="ieee")
    return acc, up


@triton.jit
def add_adapters_of_many(
    acc, adapters, expert, place, is_pair, token, row, is_up, num_rows, SWIGLU: tl.constexpr, RULE: tl.constexpr
):  # fmt: skip
    """The same for sums (pairs, outputs), of gate and of up side by side.

    Args:
        row: (outputs,), in B.
        is_up: (outputs,), which are not the gate's.
        num_rows: of B, gate and up.
    """
    rank: tl.constexpr = RULE.rank
    at_once: tl.constexpr = RULE.at_once
    num_parts: tl.constexpr = 2 if SWIGLU else 1
    slot_of = tl.load(adapters.slots + token, mask=is_pair, other=-1)
    of_expert = adapters.factor_b + (expert.to(tl.int64) * num_rows + row) * rank
    numbers_of = adapters.shrunk + place.to(tl.int64) * (num_parts * rank)
    r = tl.arange(0, at_once)
    for i in tl.range(0, tl.load(adapters.active), num_stages=1):
        slot = tl.load(adapters.active + 1 + i)
        is_own = slot_of == slot
        if tl.max(is_own.to(tl.int32), 0) > 0:
            own = of_expert + slot.to(tl.int64) * adapters.slot_stride
            for part in tl.static_range(num_parts):
                for start in tl.static_range(0, rank, at_once):
                    factor = tl.load(own[None, :] + start + r[:, None], mask=(is_up == part)[None, :], other=0.0)
                    pointers = numbers_of[:, None] + part * rank + start + r[None, :]
                    shrunk = _numbers(adapters, pointers, is_own[:, None], RULE)
                    acc = tl.dot(shrunk.to(factor.dtype), factor, acc, input_precision="ieee")
    return acc
