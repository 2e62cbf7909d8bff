"""Copies a step's contexts out of their pages, one behind the other, for kernels that read long runs of tokens."""

import torch
import triton
import triton.language as tl

from llm.kernels.attention.work import StepParts, slot_index_type
from llm.kernels.launch import launch_options, wait_for_inputs

_TOKENS_A_PROGRAM = 8
_PLANNED_TOKENS_A_PROGRAM = 32
_MIN_QUERY_LEN = 2


class GatheredContexts:
    """Room for the keys and values of a step's contexts, and where each part's begins.

    Only parts with 2 new tokens or more are copied.

    Args:
        max_tokens: tokens of context for which there is room.
        max_parts: most parts of a step.
        num_kv_heads, head_dim: shape of the model's attention.
        dtype: of the copies; keys and values of 8 bits are widened to it, which loses nothing.
        device: where all tensors live.

    Attributes:
        keys, values: (max_tokens, num_kv_heads, head_dim).
        starts: (max_parts,) int32, where in them each part's context begins.
    """

    def __init__(
        self,
        max_tokens: int,
        max_parts: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.max_tokens = max_tokens
        # Zeroed, for what lies behind the last context is read and masked, and 0 * NaN is NaN.
        self.keys, self.values = torch.zeros(2, max_tokens, num_kv_heads, head_dim, dtype=dtype, device=device)
        self.starts = torch.zeros(max_parts, dtype=torch.int32, device=device)
        self._slots = torch.zeros(max_tokens, dtype=torch.int32, device=device)
        """Slot of the pool that each token of the copies comes from."""

    def plan(self, parts: StepParts, page_tables: torch.Tensor, page_size: int, num_tokens: int) -> None:
        """Look up, once a step, where everything is.

        Args:
            page_tables: (rows, pages a row) int32.
            num_tokens: of the contexts that are to be copied, in all, or more; `max_tokens` at most.
        """
        _plan_gather[(triton.cdiv(num_tokens, _PLANNED_TOKENS_A_PROGRAM),)](
            parts, page_tables, self.starts, self._slots, parts.num_parts, num_tokens, page_tables.stride(0),
            PAGE_SIZE=page_size, MIN_QUERY_LEN=_MIN_QUERY_LEN, BLOCK=triton.next_power_of_2(parts.num_parts),
            TOKEN_BLOCK=_PLANNED_TOKENS_A_PROGRAM, num_warps=8, **launch_options(self.keys.device),
        )  # fmt: skip

    def copy(self, kv_pages: torch.Tensor, num_tokens: int) -> None:
        """Copy one layer's keys and values as planned.

        Args:
            kv_pages: (2, pages, page_size, num_kv_heads, head_dim).
            num_tokens: as planned. Where those were more than there are, the rest of the copies is undefined.
        """
        width = self.keys[0].numel()
        _gather[(triton.cdiv(num_tokens, _TOKENS_A_PROGRAM),)](
            kv_pages[0], kv_pages[1], self._slots, self.keys, self.values, num_tokens, WIDTH=width,
            WIDTH_BLOCK=triton.next_power_of_2(width), TOKEN_BLOCK=_TOKENS_A_PROGRAM, INDEX=slot_index_type(kv_pages),
            num_warps=4, **launch_options(self.keys.device),
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_parts", "num_tokens"])
def _plan_gather(
    parts, page_tables, starts, slots, num_parts, num_tokens, table_stride,
    PAGE_SIZE: tl.constexpr, MIN_QUERY_LEN: tl.constexpr, BLOCK: tl.constexpr, TOKEN_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program: a block of the copies' tokens. Each counts the contexts of all parts for itself."""
    wait_for_inputs(PDL)
    part = tl.arange(0, BLOCK)
    exists = part < num_parts
    query_len = tl.load(parts.query_lens + part, mask=exists, other=0)
    context_len = tl.load(parts.context_lens + part, mask=exists, other=0)
    context_len = tl.where(query_len >= MIN_QUERY_LEN, context_len, 0)
    ends = tl.cumsum(context_len, 0)
    if tl.program_id(0) == 0:
        tl.store(starts + part, ends - context_len, mask=exists)
    token = tl.program_id(0) * TOKEN_BLOCK + tl.arange(0, TOKEN_BLOCK)
    is_planned = token < tl.minimum(num_tokens, tl.max(ends, 0))
    is_behind = ends[None, :] <= token[:, None]
    position = token - tl.max(tl.where(is_behind, ends[None, :], 0), 1)
    row = tl.load(parts.rows + tl.sum(is_behind.to(tl.int32), 1), mask=is_planned, other=0)
    page = tl.load(page_tables + row.to(tl.int64) * table_stride + position // PAGE_SIZE, mask=is_planned, other=0)
    tl.store(slots + token, page * PAGE_SIZE + position % PAGE_SIZE, mask=is_planned)


@triton.jit(do_not_specialize=["num_tokens"])
def _gather(
    keys, values, slots, to_keys, to_values, num_tokens,
    WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr, TOKEN_BLOCK: tl.constexpr, INDEX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: a block of the copies' tokens, all heads."""
    wait_for_inputs(PDL)
    token = tl.program_id(0) * TOKEN_BLOCK + tl.arange(0, TOKEN_BLOCK)
    slot = tl.load(slots + token, mask=token < num_tokens, other=0).to(INDEX)
    column = tl.arange(0, WIDTH_BLOCK)
    mask = (token < num_tokens)[:, None] & (column < WIDTH)[None, :]
    source = slot[:, None] * WIDTH + column[None, :]
    target = token[:, None] * WIDTH + column[None, :]
    key = tl.load(keys + source, mask=mask)
    value = tl.load(values + source, mask=mask)
    tl.store(to_keys + target, key.to(to_keys.dtype.element_ty), mask=mask)
    tl.store(to_values + target, value.to(to_values.dtype.element_ty), mask=mask)
