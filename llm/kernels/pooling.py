"""Sums of hidden states, from which vectors are made."""

import torch
import triton
import triton.language as tl

from llm.kernels.launch import launch_options, wait_for_inputs

_BLOCK = 128
_UNROLL = 16
"""Hidden states that are read at once; they are added one by one."""


def add_states(hidden: torch.Tensor, parts: torch.Tensor, sums: torch.Tensor) -> None:
    """Add hidden states to the sums that they belong to, one after the other in float32.

    So a sum does not depend, bit by bit, on the steps in which its hidden states came.

    Args:
        hidden: (tokens, hidden_size), contiguous.
        parts: (4, parts) int32: the first of a part's tokens; the row of its sum, no row twice; how many tokens it
            has; whether the sum begins with them.
        sums: (rows, hidden_size) float32, contiguous; changed in place.
    """
    hidden_size = hidden.shape[1]
    firsts, rows, lens, begins = parts
    _add_states[(parts.shape[1], triton.cdiv(hidden_size, _BLOCK))](
        hidden, firsts, rows, lens, begins, sums, HIDDEN=hidden_size, BLOCK=_BLOCK,
        UNROLL=_UNROLL, num_warps=1, **launch_options(hidden.device),
    )  # fmt: skip


@triton.jit
def _add_states(
    hidden, firsts, rows, lens, begins, sums,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: one part and a block of dimensions."""
    wait_for_inputs(PDL)
    part = tl.program_id(0)
    dim = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = dim < HIDDEN
    row_offsets = tl.load(rows + part).to(tl.int64) * HIDDEN + dim
    is_going_on = tl.load(begins + part) == 0
    total = tl.load(sums + row_offsets, mask=mask & is_going_on, other=0.0)
    first = tl.load(firsts + part).to(tl.int64)
    num_tokens = tl.load(lens + part)
    for start in range(0, num_tokens, UNROLL):
        for i in tl.static_range(UNROLL):
            state = hidden + (first + start + i) * HIDDEN + dim
            total += tl.load(state, mask=mask & (start + i < num_tokens), other=0.0).to(tl.float32)
    tl.store(sums + row_offsets, total, mask=mask)
