"""Paged decode: one new token a row against its context, long contexts cut among programs (split-KV).

Flash-Decoding (Dao et al. 2023) over pages (Kwon et al. 2023). Chunks of one context are merged by their log-sum-exp
(Milakov & Gimelshein 2018, arXiv:1805.02867).
"""

import torch
import triton
import triton.language as tl

from llm.kernels.attention.work import (
    AttentionOutputs,
    HeadShape,
    PagedCache,
    Scoring,
    StepParts,
    WorkItems,
    add_share,
    load_chunk,
    load_sinks,
    num_decode_items,
    product_type,
    slot_index_type,
    weigh,
)
from llm.kernels.launch import launch_options, most_stages, wait_for_inputs
from llm.kernels.soft_cap import tanh

_BLOCK_TOKENS = 64
_NUM_WARPS, _NUM_WARPS_8_BITS, _NUM_STAGES = 4, 2, 3


class PagedDecode:
    """Decode attention with its scratch memory.

    Args:
        max_parts: most parts of a step.
        num_heads, num_kv_heads, head_dim: shape of the model's attention.
        device: where all tensors live.
    """

    def __init__(self, max_parts: int, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device) -> None:
        group_size, head_block = num_heads // num_kv_heads, max(16, triton.next_power_of_2(head_dim))
        self._heads = HeadShape(num_kv_heads, group_size, head_dim, head_block)
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
        heads = self._heads
        scoring = scoring or Scoring(heads.head_dim**-0.5)
        bytes_a_stage = 2 * _BLOCK_TOKENS * heads.head_block * kv_pages.dtype.itemsize
        has_8_bits = kv_pages.dtype.itemsize == 1
        outputs = AttentionOutputs(output, self._partial, self._partial_lse)
        _paged_decode[(heads.num_kv_heads, num_decode_items(parts.num_parts))](
            query, PagedCache.of(kv_pages, page_tables), parts, items, outputs, query.stride(0), window or 0,
            scoring.factors, HEADS=heads, GROUP_BLOCK=max(16, triton.next_power_of_2(heads.group)),
            PAGE_SIZE=kv_pages.shape[2], BLOCK=_BLOCK_TOKENS,
            INDEX=slot_index_type(kv_pages), PRODUCT=product_type(query, kv_pages),
            HAS_PAIRS=has_8_bits and query.is_cuda, num_warps=_NUM_WARPS_8_BITS if has_8_bits else _NUM_WARPS,
            num_stages=min(_NUM_STAGES, most_stages(query.device, bytes_a_stage)), **launch_options(query.device),
        )  # fmt: skip
        merge_chunks(parts, items, outputs, heads.group, window)


def merge_chunks(
    parts: StepParts,
    items: WorkItems,
    outputs: AttentionOutputs,
    group_size: int,
    window: int | None = None,
) -> None:
    """Write the output of decodes whose contexts were cut.

    Args:
        outputs: its partial results are (items, …), what was found in each chunk.
        group_size: heads a program, a divisor of `num_heads`.
        window: that the items were planned for.
    """
    num_heads, head_dim = outputs.output.shape[1:]
    num_groups = num_heads // group_size
    _merge_chunks[(parts.num_parts, num_groups)](
        parts.query_starts, parts.query_lens, parts.context_lens, items.first_items, items.summary, outputs,
        window or 0, HEADS=HeadShape(num_groups, group_size, head_dim, triton.next_power_of_2(head_dim)),
        GROUP_BLOCK=triton.next_power_of_2(group_size), num_warps=4, **launch_options(outputs.output.device),
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
    query, cache, parts, items, outputs, query_stride, window, factors, HEADS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr,
    PRODUCT: tl.constexpr, HAS_PAIRS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (kv head, item): the head's group of queries against one chunk of one row's context."""
    wait_for_inputs(PDL)
    head_block: tl.constexpr = HEADS.head_block
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    if item >= tl.load(items.summary):
        return
    chunk_size, context_len, token, table = load_chunk(cache, parts, items, item)
    begin = tl.where(window > 0, tl.maximum(context_len - window, 0), 0)
    num_visible = context_len - begin
    begin += tl.load(items.chunks + item) * chunk_size
    end = tl.minimum(begin + chunk_size, context_len)

    head = tl.arange(0, GROUP_BLOCK)
    dim = tl.arange(0, head_block)
    head_mask = (head[:, None] < HEADS.group) & (dim[None, :] < HEADS.head_dim)
    query_offsets = (kv_head * HEADS.group + head[:, None]) * HEADS.head_dim + dim[None, :]
    q = tl.load(query + token * query_stride + query_offsets, mask=head_mask, other=0.0).to(PRODUCT)

    highest = tl.full([GROUP_BLOCK], -float("inf"), tl.float32)
    weight = tl.zeros([GROUP_BLOCK], tl.float32)
    if factors.sinks is not None:
        is_first = tl.load(items.chunks + item) == 0  # the chunk that weighs the sinks
        highest = tl.where(
            is_first, load_sinks(factors.sinks, kv_head * HEADS.group + head, head < HEADS.group), highest
        )
        weight = tl.where(is_first, 1.0, weight)
    acc = tl.zeros([GROUP_BLOCK, head_block], tl.float32)
    for start in range(begin, end, BLOCK):
        position = start + tl.arange(0, BLOCK)
        visible = position < end
        page = tl.load(table + position // PAGE_SIZE, mask=visible, other=0).to(INDEX)
        kv_index = (page * PAGE_SIZE + position % PAGE_SIZE) * HEADS.num_kv_heads + kv_head
        k = _load_heads(cache.key_pages, kv_index, visible, HEADS.head_dim, head_block, HAS_PAIRS)
        scores = tl.dot(q, tl.trans(k).to(q.dtype), input_precision="ieee")
        if factors.scale is not None:
            scores = tanh(scores * factors.scale)
        scores = tl.where(visible[None, :], scores * factors.scale_log2, -float("inf"))
        probability, rescale, highest, weight = weigh(scores, highest, weight, 1.0)
        v = _load_heads(cache.value_pages, kv_index, visible, HEADS.head_dim, head_block, HAS_PAIRS)
        acc = acc * rescale[:, None] + tl.dot(probability.to(q.dtype), v.to(q.dtype), input_precision="ieee")

    result = acc / weight[:, None]
    if chunk_size >= num_visible:
        out = outputs.output + token * (HEADS.num_kv_heads * HEADS.group * HEADS.head_dim) + query_offsets
        tl.store(out, result.to(outputs.output.dtype.element_ty), mask=head_mask)
    else:
        first_head = item.to(tl.int64) * (HEADS.num_kv_heads * HEADS.group)
        tl.store(outputs.partial + first_head * HEADS.head_dim + query_offsets, result, mask=head_mask)
        lse = highest + tl.log2(weight)
        tl.store(outputs.partial_lse + first_head + kv_head * HEADS.group + head, lse, mask=head < HEADS.group)


@triton.jit
def _merge_chunks(
    query_starts, query_lens, context_lens, first_items, summary, outputs, window,
    HEADS: tl.constexpr, GROUP_BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (part, kv head): weigh the chunks' results by their log-sum-exp, always in the same order."""
    wait_for_inputs(PDL)
    head_block: tl.constexpr = HEADS.head_block
    num_heads: tl.constexpr = HEADS.num_kv_heads * HEADS.group
    part = tl.program_id(0)
    context_len = tl.load(context_lens + part)
    if window > 0:
        context_len = tl.minimum(context_len, window)
    chunk_size = tl.load(summary + 1)
    if tl.load(query_lens + part) != 1 or chunk_size >= context_len:
        return
    head = tl.program_id(1) * HEADS.group + tl.arange(0, GROUP_BLOCK)
    dim = tl.arange(0, head_block)
    head_exists = tl.arange(0, GROUP_BLOCK) < HEADS.group
    mask = head_exists[:, None] & (dim[None, :] < HEADS.head_dim)
    first = tl.load(first_items + part).to(tl.int64)
    highest = tl.full([GROUP_BLOCK], -float("inf"), tl.float32)
    weight = tl.zeros([GROUP_BLOCK], tl.float32)
    acc = tl.zeros([GROUP_BLOCK, head_block], tl.float32)
    for item in range(first, first + tl.cdiv(context_len, chunk_size)):
        lse = tl.load(outputs.partial_lse + item * num_heads + head, mask=head_exists, other=0.0)
        chunk = tl.load(
            outputs.partial + (item * num_heads + head[:, None]) * HEADS.head_dim + dim[None, :], mask=mask, other=0.0
        )
        acc, highest, weight = add_share(acc, highest, weight, chunk, lse)
    token = tl.load(query_starts + part).to(tl.int64)
    out = outputs.output + (token * num_heads + head[:, None]) * HEADS.head_dim + dim[None, :]
    tl.store(out, (acc / weight[:, None]).to(outputs.output.dtype.element_ty), mask=mask)
