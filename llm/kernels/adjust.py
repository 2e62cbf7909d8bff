"""Penalties, biases, bans and bits of allowed ids over the logits of the rows that ask for them."""

import torch
import triton
import triton.language as tl

from llm.core.row_tensors import MAX_ENTRIES, RowTensors
from llm.kernels.row_fields import (
    BANNED_BEFORE,
    BOUND,
    FREQUENCY,
    HAS_ENTRIES,
    KIND,
    NUM_BANS,
    NUM_BIASES,
    PENALISED,
    PRESENCE,
    REPETITION,
    float_field,
    int_field,
)

_BLOCK = 4096
_ENTRIES = 128
"""Looked at at once: most rows have fewer."""


def adjust_logits(
    logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, state: RowTensors, adjusted: torch.Tensor
) -> None:
    """Write the logits of rows of any kind after what `llm.sampling.draw` does to them, operation by operation.

    Args:
        logits: (draws, vocab_size), bfloat16, float16 or float32; each row contiguous. Not changed.
        rows: (draws,) int32, index of each in `state`.
        positions: (draws,) int32, of the token to be drawn.
        adjusted: (draws or more, vocab_size) float32, contiguous; left alone where a row is of no kind.
    """
    num_draws, vocab_size = logits.shape
    _adjust_blocks[(triton.cdiv(vocab_size, _BLOCK), num_draws)](
        logits, logits.stride(0), vocab_size, rows, state.fields, state.counts, state.allowed, state.allowed.shape[1],
        adjusted, BLOCK=_BLOCK, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    _apply_entries[(num_draws,)](
        adjusted, vocab_size, rows, positions, state.fields, state.entry_ids, state.entry_values,
        CAPACITY=MAX_ENTRIES, BLOCK=_ENTRIES, num_warps=4,
    )  # fmt: skip


@triton.jit
def _adjust_blocks(
    logits, row_stride, vocab_size, rows, fields, counts, allowed, num_words, adjusted, BLOCK: tl.constexpr
):  # fmt: skip
    """Program (block, draw): penalties, then bits. Without fused multiply-adds, to round as the reference does."""
    draw = tl.program_id(1).to(tl.int64)
    row = tl.load(rows + draw).to(tl.int64)
    kind = int_field(fields, row, KIND)
    if kind == 0:
        return
    token_id = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = token_id < vocab_size
    x = tl.load(logits + draw * row_stride + token_id, mask=exists, other=0.0).to(tl.float32)
    if kind & PENALISED:
        seen = tl.load(counts + row * vocab_size + token_id, mask=exists, other=0)
        repetition = float_field(fields, row, REPETITION)
        divided = tl.where(x > 0, tl.div_rn(x, tl.zeros_like(x) + repetition), x * repetition)
        x = tl.where(seen > 0, divided, x)
        num_drawn = seen >> 1
        taken_off = float_field(fields, row, FREQUENCY) * num_drawn.to(tl.float32)
        taken_off += float_field(fields, row, PRESENCE) * (num_drawn > 0).to(tl.float32)
        x -= taken_off
    if kind & BOUND:
        word = tl.load(allowed + row * num_words + token_id // 32, mask=exists, other=0)
        x = tl.where(((word >> (token_id % 32)) & 1) != 0, x, -float("inf"))
    tl.store(adjusted + draw * vocab_size + token_id, x, mask=exists)


@triton.jit
def _apply_entries(
    adjusted, vocab_size, rows, positions, fields, entry_ids, entry_values, CAPACITY: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Program: one row's biases, each of another id, then its bans."""
    draw = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + draw).to(tl.int64)
    if (int_field(fields, row, KIND) & HAS_ENTRIES) == 0:
        return
    adjusted += draw * vocab_size
    entry_ids += row * CAPACITY
    num_biases = int_field(fields, row, NUM_BIASES)
    for start in range(0, num_biases, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        exists = entry < num_biases
        token_id = tl.load(entry_ids + entry, mask=exists, other=0)
        value = tl.load(entry_values + row * CAPACITY + entry, mask=exists, other=0.0)
        x = tl.load(adjusted + token_id, mask=exists, other=0.0)
        tl.store(adjusted + token_id, x + value, mask=exists)
    tl.debug_barrier()  # an id may be biased and banned
    if tl.load(positions + draw) < int_field(fields, row, BANNED_BEFORE):
        num_bans = int_field(fields, row, NUM_BANS)
        for start in range(0, num_bans, BLOCK):
            entry = start + tl.arange(0, BLOCK)
            exists = entry < num_bans
            token_id = tl.load(entry_ids + num_biases + entry, mask=exists, other=0)
            tl.store(adjusted + token_id, tl.full([BLOCK], -float("inf"), tl.float32), mask=exists)
