"""Paged decode: one new token a row against its context, long contexts cut among programs (split-KV).

Flash-Decoding (Dao et al. 2023) over pages (Kwon et al. 2023). Chunks of one context are merged by their log-sum-exp
(Milakov & Gimelshein 2018, arXiv:1805.02867).
"""

import torch
import triton
import triton.language as tl

from llm.kernels.attention.work import (
    Scoring,
    StepParts,
    WorkItems,
    load_sinks,
    num_decode_items,
    product_type,
    slot_index_type,
)
from llm.kernels.launch import launch_options, most_stages, wait_for_inputs
from llm.kernels.soft_cap import tanh

_BLOCK_TOKENS = 64
_NUM_WARPS, _NUM_WARPS_8_BITS, _NUM_STAGES = 4, 2, 3


class PagedDecode:
    """Decode attention with its scratch memory.

    Args:
        max_parts: most parts a step.
        num_heads, num_kv_heads, head_dim: shape of the model's attention.
        device: of everything.
    """

    def __init__(self, max_parts: int, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device) -> None:
        self._num_heads, self._num_kv_heads, self._head_dim = num_heads, num_kv_heads, head_dim
        num_items = num_decode_items(max_parts)
        self._partial = torch.empty(num_items, num_heads, head_dim, device=device)
        self._partial_lse = torch.empty(num_items, num_heads, device=device)

    def __call__(
        self,
        query: torch.Tensor,
        kv_pages: torch.Tensor,
        page_tables: torch.Tensor,
        parts: StepParts,
        items: WorkItems,
        window: int | None,
        output: torch.Tensor,
        scoring: Scoring | None = None,
    ) -> None:
        """Write attention output of the step's decodes; other tokens' output is left alone.

        Args:
            query: (tokens, num_heads, head_dim), RoPE applied, the last two dimensions contiguous.
            kv_pages: (2, pages, page_size, num_kv_heads, head_dim), the new tokens' stored already.
            page_tables: (rows, pages a row) int32.
            items: planned by `plan_decodes` for the same parts and window.
            window: a token attends to itself and the `window - 1` before it; None for all.
            output: (tokens, num_heads, head_dim), contiguous.
            scoring: None for a scale of `head_dim ** -0.5` alone.
        """
        group_size = self._num_heads // self._num_kv_heads
        head_dim, head_block = self._head_dim, max(16, triton.next_power_of_2(self._head_dim))
        scoring = scoring or Scoring(head_dim**-0.5)
        bytes_a_stage = 2 * _BLOCK_TOKENS * head_block * kv_pages.dtype.itemsize
        has_8_bits = kv_pages.dtype.itemsize == 1
        _paged_decode[(self._num_kv_heads, num_decode_items(len(parts)))](
            query, kv_pages[0], kv_pages[1], page_tables, parts.rows, parts.query_starts, parts.context_lens,
            items.parts, items.chunks, items.summary, output, self._partial, self._partial_lse,
            query.stride(0), page_tables.stride(0), window or 0, *scoring.factors, scoring.sinks,
            NUM_KV_HEADS=self._num_kv_heads, GROUP=group_size, GROUP_BLOCK=max(16, triton.next_power_of_2(group_size)),
            HEAD_DIM=head_dim, HEAD_BLOCK=head_block, PAGE_SIZE=kv_pages.shape[2],
            BLOCK=_BLOCK_TOKENS, INDEX=slot_index_type(kv_pages), PRODUCT=product_type(query, kv_pages),
            HAS_PAIRS=has_8_bits and query.is_cuda, num_warps=_NUM_WARPS_8_BITS if has_8_bits else _NUM_WARPS,
            num_stages=min(_NUM_STAGES, most_stages(query.device, bytes_a_stage)), **launch_options(query.device),
        )  # fmt: skip
        merge_chunks(parts, items, self._partial, self._partial_lse, output, group_size, window)


def merge_chunks(
    parts: StepParts,
    items: WorkItems,
    partial: torch.Tensor,
    partial_lse: torch.Tensor,
    output: torch.Tensor,
    group_size: int,
    window: int | None = None,
) -> None:
    """Write the output of decodes whose contexts were cut.

    Args:
        partial: (items, num_heads, head_dim) float32, what was found in each chunk.
        partial_lse: (items, num_heads) float32, log2 of the sum of its weights.
        output: (tokens, num_heads, head_dim), contiguous.
        group_size: heads a program, a divisor of `num_heads`.
        window: that the items were planned for.
    """
    num_heads, head_dim = output.shape[1:]
    _merge_chunks[(len(parts), num_heads // group_size)](
        parts.query_starts, parts.query_lens, parts.context_lens, items.first_items, items.summary, partial,
        partial_lse, output, window or 0, NUM_HEADS=num_heads, GROUP=group_size,
        GROUP_BLOCK=triton.next_power_of_2(group_size), HEAD_DIM=head_dim, HEAD_BLOCK=triton.next_power_of_2(head_dim),
        num_warps=4, **launch_options(output.device),
    )  # fmt: skip


@triton.jit
def _load_heads(pages, head, exists, HEAD_DIM: tl.constexpr, HEAD_BLOCK: tl.constexpr, HAS_PAIRS: tl.constexpr):
    """Keys or values of the heads at index `head`, both (tokens,): (tokens, HEAD_BLOCK). E4M3 as float16 if HAS_PAIRS.

    Widened where they are loaded, two at a time. Left to itself the compiler widens behind the transposition that the
    tensor cores need, and fetches the bytes for it one by one.
    """
    if HAS_PAIRS:
        pair = tl.arange(0, HEAD_BLOCK // 2)
        pointers = pages.to(tl.pointer_type(tl.int16)) + head[:, None] * (HEAD_DIM // 2) + pair[None, :]
        pairs = tl.load(pointers, mask=exists[:, None] & (pair[None, :] < HEAD_DIM // 2), other=0)
        even, odd = tl.inline_asm_elementwise(
            "{ .reg .b32 both; cvt.rn.f16x2.e4m3x2 both, $2; mov.b32 {$0, $1}, both; }", "=h,=h,h", [pairs],
            dtype=(tl.float16, tl.float16), is_pure=True, pack=1,
        )  # fmt: skip
        numbers = tl.reshape(tl.join(even, odd), [head.shape[0], HEAD_BLOCK])
    else:
        dim = tl.arange(0, HEAD_BLOCK)
        mask = exists[:, None] & (dim[None, :] < HEAD_DIM)
        numbers = tl.load(pages + head[:, None] * HEAD_DIM + dim[None, :], mask=mask, other=0.0)
    return numbers


@triton.jit
def _paged_decode(
    query, keys, values, page_tables, part_rows, query_starts, context_lens, item_parts, item_chunks, summary,
    output, partial, partial_lse, query_stride, table_stride, window, scale, scale_log2, sinks,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr,
    PRODUCT: tl.constexpr, HAS_PAIRS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (kv head, item): the head's group of queries against one chunk of one row's context."""
    wait_for_inputs(PDL)
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    if item >= tl.load(summary):
        return
    chunk_size = tl.load(summary + 1)
    part = tl.load(item_parts + item)
    context_len = tl.load(context_lens + part)
    token = tl.load(query_starts + part).to(tl.int64)
    table = page_tables + tl.load(part_rows + part).to(tl.int64) * table_stride
    begin = tl.where(window > 0, tl.maximum(context_len - window, 0), 0)
    num_visible = context_len - begin
    begin += tl.load(item_chunks + item) * chunk_size
    end = tl.minimum(begin + chunk_size, context_len)

    head = tl.arange(0, GROUP_BLOCK)
    dim = tl.arange(0, HEAD_BLOCK)
    head_mask = (head[:, None] < GROUP) & (dim[None, :] < HEAD_DIM)
    query_offsets = (kv_head * GROUP + head[:, None]) * HEAD_DIM + dim[None, :]
    q = tl.load(query + token * query_stride + query_offsets, mask=head_mask, other=0.0).to(PRODUCT)

    highest = tl.full([GROUP_BLOCK], -float("inf"), tl.float32)
    weight = tl.zeros([GROUP_BLOCK], tl.float32)
    if sinks is not None:
        is_first = tl.load(item_chunks + item) == 0  # the chunk that weighs the sinks
        highest = tl.where(is_first, load_sinks(sinks, kv_head * GROUP + head, head < GROUP), highest)
        weight = tl.where(is_first, 1.0, weight)
    acc = tl.zeros([GROUP_BLOCK, HEAD_BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        position = start + tl.arange(0, BLOCK)
        visible = position < end
        page = tl.load(table + position // PAGE_SIZE, mask=visible, other=0).to(INDEX)
        kv_index = (page * PAGE_SIZE + position % PAGE_SIZE) * NUM_KV_HEADS + kv_head
        k = _load_heads(keys, kv_index, visible, HEAD_DIM, HEAD_BLOCK, HAS_PAIRS)
        scores = tl.dot(q, tl.trans(k).to(q.dtype), input_precision="ieee")
        if scale is not None:
            scores = tanh(scores * scale)
        scores *= scale_log2
        scores = tl.where(visible[None, :], scores, -float("inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        rescale = tl.exp2(highest - new_highest)
        probability = tl.exp2(scores - new_highest[:, None])
        weight = weight * rescale + tl.sum(probability, 1)
        v = _load_heads(values, kv_index, visible, HEAD_DIM, HEAD_BLOCK, HAS_PAIRS)
        acc = acc * rescale[:, None] + tl.dot(probability.to(q.dtype), v.to(q.dtype), input_precision="ieee")
        highest = new_highest

    result = acc / weight[:, None]
    if chunk_size >= num_visible:
        out = output + token * (NUM_KV_HEADS * GROUP * HEAD_DIM) + query_offsets
        tl.store(out, result.to(output.dtype.element_ty), mask=head_mask)
    else:
        first_head = item.to(tl.int64) * (NUM_KV_HEADS * GROUP)
        tl.store(partial + first_head * HEAD_DIM + query_offsets, result, mask=head_mask)
        lse = highest + tl.log2(weight)
        tl.store(partial_lse + first_head + kv_head * GROUP + head, lse, mask=head < GROUP)


@triton.jit
def _merge_chunks(
    query_starts, query_lens, context_lens, first_items, summary, partial, partial_lse, output, window,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (part, kv head): weigh the chunks' results by their log-sum-exp, always in the same order."""
    wait_for_inputs(PDL)
    part = tl.program_id(0)
    context_len = tl.load(context_lens + part)
    if window > 0:
        context_len = tl.minimum(context_len, window)
    chunk_size = tl.load(summary + 1)
    if tl.load(query_lens + part) != 1 or chunk_size >= context_len:
        return
    head = tl.program_id(1) * GROUP + tl.arange(0, GROUP_BLOCK)
    dim = tl.arange(0, HEAD_BLOCK)
    head_exists = tl.arange(0, GROUP_BLOCK) < GROUP
    mask = head_exists[:, None] & (dim[None, :] < HEAD_DIM)
    first = tl.load(first_items + part).to(tl.int64)
    highest = tl.full([GROUP_BLOCK], -float("inf"), tl.float32)
    weight = tl.zeros([GROUP_BLOCK], tl.float32)
    acc = tl.zeros([GROUP_BLOCK, HEAD_BLOCK], tl.float32)
    for item in range(first, first + tl.cdiv(context_len, chunk_size)):
        lse = tl.load(partial_lse + item * NUM_HEADS + head, mask=head_exists, other=0.0)
        chunk = tl.load(partial + (item * NUM_HEADS + head[:, None]) * HEAD_DIM + dim[None, :], mask=mask, other=0.0)
        new_highest = tl.maximum(highest, lse)
        rescale, share = tl.exp2(highest - new_highest), tl.exp2(lse - new_highest)
        weight = weight * rescale + share
        acc = acc * rescale[:, None] + chunk * share[:, None]
        highest = new_highest
    token = tl.load(query_starts + part).to(tl.int64)
    out = output + (token * NUM_HEADS + head[:, None]) * HEAD_DIM + dim[None, :]
    tl.store(out, (acc / weight[:, None]).to(output.dtype.element_ty), mask=mask)
