"""Low-rank adapters that tokens choose: all tokens of one adapter are multiplied together (Punica, Chen et al. 2023,
arXiv:2310.18547).

A product's inputs are first shrunk to a few numbers a token, by the token's own A, then expanded by its own B and added
to the product. Kernels go by entries: some tokens, at most so many, that have the same adapter, or none. A program has
one entry, so what it computes for a token depends on that token alone.
"""

from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
import triton
import triton.language as tl

from llm.config import Activation
from llm.kernels.activation import gated
from llm.kernels.launch import launch_options, most_stages, prefetch, wait_for_inputs
from llm.kernels.tiles import OUTPUTS as _FUSED_OUTPUTS

ENTRY_FIELDS = 4
"""Numbers of an entry: the slot of its adapter, the place of its first token in the order, how many tokens it has, and
the adapter's rank, 0 for tokens without one."""
_OUTPUTS = tl.constexpr(128)
"""Outputs of a program that expands."""
_NUMBERS, _TILE_K = 64, 128
"""Of a program that shrinks: numbers at most, and inputs at once."""
FEW_TOKENS, _SOME_TOKENS = 256, 2048
_FEW_ROWS, _MANY_ROWS = 16, 64
"""Tokens of an entry at most, in steps of few tokens and of more."""
_FIXED_SPLITS = 4
_LONG_INPUTS = 8192


def entry_rows(num_tokens: int, *, deterministic: bool = False) -> int:
    """Most tokens of an entry, in a step of so many.

    Args:
        deterministic: a token's numbers may not depend on how many others there are.
    """
    return _FEW_ROWS if deterministic or num_tokens <= FEW_TOKENS else _MANY_ROWS


def most_entries(num_tokens: int, num_slots: int, rows: int) -> int:
    """Most entries of a step of so many tokens, each of at most so many `rows`."""
    return min(num_tokens, num_tokens // rows + num_slots + 1)


@dataclass(frozen=True, slots=True)
class AdapterEntries:
    """The tokens of a step by their adapters.

    Attributes:
        order: (tokens,) int32, indices of all tokens in the step, those of an adapter together.
        entries: (entries, ENTRY_FIELDS) int32; those without tokens come last.
        rows: most tokens of an entry, `entry_rows`.
        slots: (tokens,) int32, the slot of each token's adapter, -1 for none.
        active: (1 + slots,) int32: how many adapters the tokens have, then their slots.
        step: (1,) int32, a number that no other step of late has had.
    """

    order: torch.Tensor
    entries: torch.Tensor
    rows: int
    slots: torch.Tensor
    active: torch.Tensor
    step: torch.Tensor


@dataclass(frozen=True, slots=True)
class AdapterFactors:
    """Factors of all slots for one product.

    Attributes:
        a: (slots, parts · rank, inputs); each slot contiguous.
        b: (slots, outputs, rank); each slot contiguous.
        blocks: (blocks, 3) int32: a part, the first output of a program, and the end of its outputs.
        rank: of a slot, a multiple of 16.
        is_even: every block has as many outputs as a program takes, and begins at a multiple of them.
        halves: parts that add to the first half of the outputs and to the second; None if these are not parts.
        block_parts: (outputs / 64,) int32, the part that adds to each block of outputs, -1 for none; None if blocks
            belong to several.
    """

    a: torch.Tensor
    b: torch.Tensor
    blocks: torch.Tensor
    rank: int
    is_even: bool
    halves: tuple[int, int] | None
    block_parts: torch.Tensor | None

    @classmethod
    def of(cls, a: torch.Tensor, b: torch.Tensor, ranges: tuple[tuple[int, int, int], ...]) -> Self:
        """Factors whose parts add to these ranges of outputs: (part, first, end) each."""
        blocks = [
            (part, start, min(start + _OUTPUTS.value, end))
            for part, first, end in ranges
            for start in range(first, end, _OUTPUTS.value)
        ]
        size = b.shape[1] // 2
        halves = {((0, 0, size), (1, size, 2 * size)): (0, 1), ((0, 0, 2 * size),): (0, 0)}.get(ranges)
        is_even = all(first % _OUTPUTS.value == 0 and end - first == _OUTPUTS.value for _, first, end in blocks)
        parts = _block_parts(b.shape[1], ranges)
        tensor = partial(torch.tensor, dtype=torch.int32, device=a.device)
        return cls(a, b, tensor(blocks), b.shape[2], is_even, halves, None if parts is None else tensor(parts))


def _block_parts(num_outputs: int, ranges: tuple[tuple[int, int, int], ...]) -> list[int] | None:
    if any(end % _FUSED_OUTPUTS for _, first, end in ranges for end in (num_outputs, first, end)):
        return None
    parts = [-1] * (num_outputs // _FUSED_OUTPUTS)
    for part, first, end in ranges:
        blocks = range(first // _FUSED_OUTPUTS, end // _FUSED_OUTPUTS)
        for block in blocks:
            parts[block] = part
    return parts


def shrink(
    x: torch.Tensor,
    which: AdapterEntries,
    factors: AdapterFactors,
    *,
    deterministic: bool,
) -> torch.Tensor:
    """Multiply x, (tokens, inputs), contiguous, by the tokens' A.

    Args:
        deterministic: how a sum is split depends on the shape of A alone.

    Returns:
        (splits, tokens, parts · rank) float32, by place in the order, to be summed over the splits.
    """
    (num_tokens, num_inputs), num_numbers = x.shape, factors.a.shape[1]
    num_splits = _FIXED_SPLITS if deterministic else _num_splits(num_tokens, num_inputs)
    inputs_per_split = triton.cdiv(triton.cdiv(num_inputs, _TILE_K), num_splits) * _TILE_K
    is_even = inputs_per_split * num_splits == num_inputs
    shrunk = torch.empty(num_splits, num_tokens, num_numbers, dtype=torch.float32, device=x.device)
    numbers, rows = min(_NUMBERS, triton.next_power_of_2(num_numbers)), which.rows
    num_stages = min(4, most_stages(x.device, (rows + numbers) * _TILE_K * x.dtype.itemsize))
    _shrink[(len(which.entries), num_splits, triton.cdiv(num_numbers, numbers))](
        x, which.order, which.entries, factors.a, shrunk, num_tokens, num_inputs,
        inputs_per_split, factors.a.stride(0), num_numbers, RANK=factors.rank, ROWS=rows, NUMBERS=numbers,
        TILE_K=_TILE_K, IS_EVEN=is_even, CAN_PREFETCH=x.device.type == "cuda", num_warps=4, num_stages=num_stages,
        **launch_options(x.device),
    )  # fmt: skip
    return shrunk


def expand(
    shrunk: torch.Tensor,
    which: AdapterEntries,
    factors: AdapterFactors,
    output: torch.Tensor,
) -> None:
    """Add what the tokens' B make of `shrunk`, as `shrink` gives it, to `output`, (tokens, outputs), contiguous."""
    num_splits, num_tokens, num_numbers = shrunk.shape
    _expand[(len(factors.blocks), len(which.entries))](
        shrunk, which.order, which.entries, factors.b, factors.blocks, output, num_tokens,
        num_numbers, factors.b.stride(0), output.shape[1], RANK=factors.rank, NUM_SPLITS=num_splits, ROWS=which.rows,
        IS_EVEN=factors.is_even, CAN_PREFETCH=output.device.type == "cuda", num_warps=4,
        **launch_options(output.device),
    )  # fmt: skip


def expand_gated(
    shrunk: torch.Tensor,
    which: AdapterEntries,
    factors: AdapterFactors,
    gate_up: torch.Tensor,
    output: torch.Tensor,
    activation: Activation,
) -> None:
    """Write activation(gate) * up, where the tokens' B add what they make of `shrunk` to gate and up.

    Args:
        factors: those of gate and up, whose `halves` are parts.
        gate_up: (tokens, 2 size), contiguous, gate first.
        output: (tokens, size), contiguous.
    """
    assert factors.halves is not None, "gate and up are parts"
    num_splits, num_tokens, num_numbers = shrunk.shape
    size = output.shape[1]
    _expand_gated[(triton.cdiv(size, _OUTPUTS.value), len(which.entries))](
        shrunk, which.order, which.entries, factors.b, gate_up, output, num_tokens,
        num_numbers, factors.b.stride(0), size, RANK=factors.rank, NUM_SPLITS=num_splits,
        UP_PART=factors.halves[1], ROWS=which.rows,
        GELU=activation is Activation.GELU_TANH, IS_EVEN=size % _OUTPUTS.value == 0,
        CAN_PREFETCH=output.device.type == "cuda", num_warps=4, **launch_options(output.device),
    )  # fmt: skip


def _num_splits(num_tokens: int, num_inputs: int) -> int:
    """How many programs share a sum: enough to keep the chip busy."""
    if num_tokens > _SOME_TOKENS:
        return 1
    if num_tokens > FEW_TOKENS:
        return _FIXED_SPLITS
    return 16 if num_inputs >= _LONG_INPUTS else 8


@triton.jit
def _load_entry(entries, order, number, row):
    """An entry's slot, its first place in the order, its number of tokens, its rank; which rows exist; their tokens."""
    entry = entries + number * 4
    slot, first = tl.load(entry).to(tl.int64), tl.load(entry + 1)
    count, rank = tl.load(entry + 2), tl.load(entry + 3)
    is_token = row < count
    return slot, first, count, rank, is_token, tl.load(order + first + row, mask=is_token, other=0).to(tl.int64)


@triton.jit(do_not_specialize=["num_tokens"])
def _shrink(
    x, order, entries, factor_a, shrunk, num_tokens, num_inputs, inputs_per_split, slot_stride,
    num_numbers,
    RANK: tl.constexpr, ROWS: tl.constexpr, NUMBERS: tl.constexpr, TILE_K: tl.constexpr, IS_EVEN: tl.constexpr,
    CAN_PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (entry, split, block of numbers)."""
    split = tl.program_id(1)
    number = tl.program_id(2) * NUMBERS + tl.arange(0, NUMBERS)
    row = tl.arange(0, ROWS)
    # Entries, the order and factors are what the step began with: no kernel of the step writes them.
    slot, first, _, rank, is_token, token = _load_entry(entries, order, tl.program_id(0), row)
    is_number = (number < num_numbers) & (number % RANK < rank)
    rows = x + token[:, None] * num_inputs
    own = factor_a + slot * slot_stride + number.to(tl.int64) * num_inputs
    begin = split * inputs_per_split
    if CAN_PREFETCH:
        line_size: tl.constexpr = 1024 // factor_a.dtype.element_ty.primitive_bitwidth
        line = begin + tl.arange(0, 8) * line_size
        prefetch(own[:, None] + tl.minimum(line, num_inputs - 1)[None, :])
    wait_for_inputs(PDL)
    if rank == 0:
        return
    acc = tl.zeros([ROWS, NUMBERS], tl.float32)
    for start in range(begin, begin + inputs_per_split, TILE_K):
        k = start + tl.arange(0, TILE_K)
        # A mask along the inputs would have them loaded one by one.
        row_mask, number_mask = is_token[:, None], is_number[None, :]
        if not IS_EVEN:
            exists = k < num_inputs
            row_mask, number_mask = row_mask & exists[None, :], number_mask & exists[:, None]
        inputs = tl.load(rows + k[None, :], mask=row_mask, other=0.0)
        factor = tl.load(own[None, :] + k[:, None], mask=number_mask, other=0.0)
        acc = tl.dot(inputs, factor, acc, input_precision="ieee")
    place = (split.to(tl.int64) * num_tokens + first + row) * num_numbers
    mask = is_token[:, None] & (number < num_numbers)[None, :]
    tl.store(shrunk + place[:, None] + number[None, :], acc, mask=mask)


@triton.jit
def _update(
    sums, columns, is_token, output_mask, rank, num_tokens, num_numbers,
    RANK: tl.constexpr, NUM_SPLITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What B makes of shrunk numbers: (ROWS, _OUTPUTS) float32; zeros where the rank is 0.

    Past the adapter's rank, slots and shrunk numbers hold zeros.
    """
    ranks: tl.constexpr = RANK if RANK == 16 or RANK == 32 else 64
    acc = tl.zeros([ROWS, _OUTPUTS], tl.float32)
    for start in tl.static_range(0, RANK, ranks):
        if start < rank:
            r = start + tl.arange(0, ranks)
            is_rank = r < RANK
            factor = tl.load(columns[None, :] + r[:, None], mask=is_rank[:, None] & output_mask, other=0.0)
            numbers = tl.zeros([ROWS, ranks], tl.float32)
            for split in tl.static_range(NUM_SPLITS):
                pointers = sums[:, None] + split * num_tokens.to(tl.int64) * num_numbers + r[None, :]
                numbers += tl.load(pointers, mask=is_token[:, None] & is_rank[None, :], other=0.0)
            acc = tl.dot(numbers.to(factor.dtype), factor, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["num_tokens"])
def _expand(
    shrunk, order, entries, factor_b, blocks, output, num_tokens, num_numbers, slot_stride,
    num_outputs,
    RANK: tl.constexpr, NUM_SPLITS: tl.constexpr, ROWS: tl.constexpr,
    IS_EVEN: tl.constexpr, CAN_PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (block of outputs, entry)."""
    block = blocks + tl.program_id(0) * 3
    part, first_output, end_output = tl.load(block), tl.load(block + 1), tl.load(block + 2)
    if IS_EVEN:
        first_output = tl.multiple_of(first_output, _OUTPUTS)
    row = tl.arange(0, ROWS)
    out = first_output + tl.arange(0, _OUTPUTS)
    slot, first, _, rank, is_token, token = _load_entry(entries, order, tl.program_id(1), row)
    output_mask = (out >= 0)[None, :]
    if not IS_EVEN:
        output_mask = (out < end_output)[None, :]
    columns = factor_b + slot * slot_stride + out.to(tl.int64) * RANK
    if CAN_PREFETCH and IS_EVEN:
        prefetch(columns)
    wait_for_inputs(PDL)
    if rank == 0:
        return
    pointers = output + token[:, None] * num_outputs + out[None, :]
    mask = is_token[:, None] if IS_EVEN else is_token[:, None] & output_mask
    total = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    sums = shrunk + (first + row).to(tl.int64) * num_numbers + part * RANK
    total += _update(
        sums, columns, is_token, output_mask, rank, num_tokens, num_numbers, RANK, NUM_SPLITS, ROWS
    )  # fmt: skip
    tl.store(pointers, total.to(output.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _expand_gated(
    shrunk, order, entries, factor_b, gate_up, output, num_tokens, num_numbers, slot_stride,
    num_outputs,
    RANK: tl.constexpr, NUM_SPLITS: tl.constexpr, UP_PART: tl.constexpr, ROWS: tl.constexpr,
    GELU: tl.constexpr, IS_EVEN: tl.constexpr, CAN_PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (block of outputs, entry); tokens without an adapter too. The gate is part 0."""
    row = tl.arange(0, ROWS)
    out = tl.program_id(0) * _OUTPUTS + tl.arange(0, _OUTPUTS)
    slot, first, count, rank, is_token, token = _load_entry(entries, order, tl.program_id(1), row)
    output_mask = (out >= 0)[None, :]
    if not IS_EVEN:
        output_mask = (out < num_outputs)[None, :]
    columns = factor_b + slot * slot_stride + out.to(tl.int64) * RANK
    up_columns = columns + num_outputs.to(tl.int64) * RANK
    if CAN_PREFETCH and IS_EVEN:
        prefetch(columns)
        prefetch(up_columns)
    wait_for_inputs(PDL)
    if count == 0:
        return
    pointers = gate_up + token[:, None] * (2 * num_outputs) + out[None, :]
    mask = is_token[:, None] if IS_EVEN else is_token[:, None] & output_mask
    gate = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(pointers + num_outputs, mask=mask, other=0.0).to(tl.float32)
    sums = shrunk + (first + row).to(tl.int64) * num_numbers
    gate += _update(
        sums, columns, is_token, output_mask, rank, num_tokens, num_numbers, RANK, NUM_SPLITS, ROWS,
    )  # fmt: skip
    up += _update(
        sums + UP_PART * RANK, up_columns, is_token, output_mask, rank, num_tokens, num_numbers, RANK, NUM_SPLITS, ROWS,
    )  # fmt: skip
    result = gated(gate, up, output.dtype.element_ty, GELU)
    tl.store(output + token[:, None] * num_outputs + out[None, :], result, mask=mask)
