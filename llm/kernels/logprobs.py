"""Log probabilities of what was drawn and of the likeliest tokens, for the rows that ask for them.

1. `_of_blocks`, a program for each block of each row: its highest logit, sum of exponentials and likeliest tokens.
2. `_of_rows`, a program a row: the same of the whole row.

Sums have a fixed order, and of equal logits the lowest id comes first: a row's outcome does not depend on others.
"""

from dataclasses import dataclass
from typing import Self

import torch
import triton
import triton.language as tl

from llm.config import MAX_TOP_LOGPROBS
from llm.core.row_tensors import RowTensors
from llm.kernels.cuts import ordered_key, value_of_key
from llm.kernels.row_fields import ARE_TOP_ALLOWED, NUM_LOGPROBS, NUM_PROMPT_LOGPROBS, int_field

_BLOCK = 4096
_CAPACITY = tl.constexpr(triton.next_power_of_2(MAX_TOP_LOGPROBS))
_NO_KEY = tl.constexpr(-(2**63))


@dataclass(frozen=True, slots=True)
class LogprobWorkspace:
    """What one kernel hands on to the other. Its content means nothing between draws.

    Attributes:
        stats: (2, max_draws * blocks) float32, highest logits and sums of exponentials.
        keys: (max_draws * blocks, 32) int64, the likeliest tokens of each block.
    """

    stats: torch.Tensor
    keys: torch.Tensor

    @classmethod
    def allocate(cls, max_draws: int, vocab_size: int, device: torch.device | str) -> Self:
        """Memory for up to `max_draws` draws a call."""
        num_blocks = max_draws * triton.cdiv(vocab_size, _BLOCK)
        return cls(
            stats=torch.empty(2, num_blocks, device=device),
            keys=torch.empty(num_blocks, _CAPACITY.value, dtype=torch.int64, device=device),
        )


def find_logprobs(
    logits: torch.Tensor,
    rows: torch.Tensor,
    token_ids: torch.Tensor,
    state: RowTensors,
    workspace: LogprobWorkspace,
    output: torch.Tensor,
    *,
    of_prompts: bool = False,
) -> None:
    """Write the natural-log probabilities that rows ask for, of the logits' own distribution.

    Args:
        logits: (draws, vocab_size), bfloat16, float16 or float32; each row contiguous.
        rows: (draws,) int32, index of each in `state`.
        token_ids: (draws or more,) int32, what was drawn, or what comes next in a prompt; negative for nothing.
        workspace: allocated for at least as many draws and this vocabulary.
        output: (draws or more, 1 + 2 * MAX_TOP_LOGPROBS) int32, contiguous. Of each row that asks: the float32 of the
            drawn token as bits, then ids of the likeliest, then theirs, likeliest first, as many as it asks for. Of
            rows with `are_top_allowed` only the ids that they may draw count, which must be as many.
        of_prompts: look at what rows ask of their prompts, not of what is drawn.
    """
    num_draws, vocab_size = logits.shape
    num_blocks = triton.cdiv(vocab_size, _BLOCK)
    field = (NUM_PROMPT_LOGPROBS if of_prompts else NUM_LOGPROBS).value
    _of_blocks[(num_blocks, num_draws)](
        logits, logits.stride(0), vocab_size, rows, state.fields, workspace.stats, workspace.stats.stride(0),
        workspace.keys, state.allowed, state.allowed.shape[1], ASKED=field, BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip
    _of_rows[(num_draws,)](
        logits, logits.stride(0), rows, token_ids, state.fields, workspace.stats, workspace.stats.stride(0),
        workspace.keys, num_blocks, output,
        ASKED=field, MOST=MAX_TOP_LOGPROBS, BLOCKS=triton.next_power_of_2(num_blocks), num_warps=4,
    )  # fmt: skip


@triton.jit
def _of_blocks(
    logits, row_stride, vocab_size, rows, fields, stats, stats_stride, keys, allowed, num_words,
    ASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (block, draw)."""
    draw = tl.program_id(1).to(tl.int64)
    row = tl.load(rows + draw).to(tl.int64)
    num_top = int_field(fields, row, ASKED) - 1
    if num_top < 0:
        return
    token_id = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = token_id < vocab_size
    x = tl.load(logits + draw * row_stride + token_id, mask=exists, other=-float("inf")).to(tl.float32)
    place = draw * tl.num_programs(0) + tl.program_id(0)
    highest = tl.max(x, 0)
    tl.store(stats + place, highest)
    origin = tl.where(highest == -float("inf"), 0.0, highest)
    tl.store(stats + stats_stride + place, tl.sum(tl.exp(x - origin), 0))
    key = (ordered_key(x + 0.0, 0) << 32) | (0xFFFFFFFF - token_id.to(tl.int64))  # + 0.0 makes one zero of both
    key = tl.where(exists, key, _NO_KEY)
    if int_field(fields, row, ARE_TOP_ALLOWED) != 0:
        word = tl.load(allowed + row * num_words + token_id // 32, mask=exists, other=0)
        key = tl.where(((word >> (token_id % 32)) & 1) != 0, key, _NO_KEY)
    for i in range(num_top):
        best = tl.max(key, 0)
        tl.store(keys + place * _CAPACITY + i, best)
        key = tl.where(key == best, _NO_KEY, key)


@triton.jit
def _of_rows(
    logits, row_stride, rows, token_ids, fields, stats, stats_stride, keys, num_blocks, output,
    ASKED: tl.constexpr, MOST: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Program: one draw."""
    draw = tl.program_id(0).to(tl.int64)
    num_top = int_field(fields, tl.load(rows + draw).to(tl.int64), ASKED) - 1
    if num_top < 0:
        return
    block = tl.arange(0, BLOCKS)
    highest = tl.load(stats + draw * num_blocks + block, mask=block < num_blocks, other=-float("inf"))
    mass = tl.load(stats + stats_stride + draw * num_blocks + block, mask=block < num_blocks, other=0.0)
    origin = tl.max(highest, 0)
    log_mass = tl.log(tl.sum(tl.where(mass > 0, mass * tl.exp(highest - origin), 0.0), 0))
    output += draw * (1 + 2 * MOST)
    x = tl.load(logits + draw * row_stride + tl.maximum(tl.load(token_ids + draw), 0)).to(tl.float32)
    tl.store(output, ((x - origin) - log_mass).to(tl.int32, bitcast=True))
    slot = tl.arange(0, BLOCKS * _CAPACITY)
    exists = (slot % _CAPACITY < num_top) & (slot // _CAPACITY < num_blocks)
    key = tl.load(keys + draw * num_blocks * _CAPACITY + slot, mask=exists, other=_NO_KEY)
    for i in range(num_top):
        best = tl.max(key, 0)
        tl.store(output + 1 + i, (0xFFFFFFFF - (best & 0xFFFFFFFF)).to(tl.int32))
        x = value_of_key(best >> 32, 0)
        tl.store(output + 1 + MOST + i, ((x - origin) - log_mass).to(tl.int32, bitcast=True))
        key = tl.where(key == best, _NO_KEY, key)
