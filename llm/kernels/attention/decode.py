"""Paged decode: one new token a row against its context, long contexts cut among programs (split-KV).

Flash-Decoding (Dao et al. 2023) over pages (Kwon et al. 2023). Chunks of one context are merged by their log-sum-exp
(Milakov & Gimelshein 2018, arXiv:1805.02867).
"""

from typing import Any

import torch
import triton
import triton.language as tl

from llm.kernels.attention.eight_bit_tiles import (
    has_tiles,
    key_dims,
    keys_of,
    load_key_words,
    load_value_words,
    run_offset,
    tile_tokens,
    value_dims,
    values_of,
)
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
TILE_REGISTERS: int | None = 144
"""Of a thread of `_paged_decode_8_bits`, for up to 8 heads of 128: 14 programs a multiprocessor and nothing spilled."""


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
        page_size = kv_pages.shape[2]
        outputs = AttentionOutputs(output, self._partial, self._partial_lse)
        in_tiles = kv_pages.dtype.itemsize == 1 and query.dtype.itemsize == 2 and has_tiles(heads.head_dim, page_size)
        kernel = _paged_decode_8_bits if in_tiles else _paged_decode
        options = self._tile_options(query) if in_tiles else self._options(query, kv_pages)
        kernel[(heads.num_kv_heads, num_decode_items(parts.num_parts))](
            query, PagedCache.of(kv_pages, page_tables), parts, items, outputs, query.stride(0), window or 0,
            scoring.factors, HEADS=heads, PAGE_SIZE=page_size, **options, **launch_options(query.device),
        )  # fmt: skip
        merge_chunks(parts, items, outputs, heads.group, window)

    def _options(self, query: torch.Tensor, kv_pages: torch.Tensor) -> dict[str, Any]:
        """Those of `_paged_decode` alone."""
        has_8_bits = kv_pages.dtype.itemsize == 1
        bytes_a_stage = 2 * _BLOCK_TOKENS * self._heads.head_block * kv_pages.dtype.itemsize
        return {
            "GROUP_BLOCK": max(16, triton.next_power_of_2(self._heads.group)), "BLOCK": _BLOCK_TOKENS,
            "INDEX": slot_index_type(kv_pages), "PRODUCT": product_type(query, kv_pages),
            "HAS_PAIRS": has_8_bits and query.is_cuda, "num_warps": _NUM_WARPS_8_BITS if has_8_bits else _NUM_WARPS,
            "num_stages": min(_NUM_STAGES, most_stages(query.device, bytes_a_stage)),
        }  # fmt: skip

    def _tile_options(self, query: torch.Tensor) -> dict[str, Any]:
        """Those of `_paged_decode_8_bits` alone."""
        group_block = max(8, triton.next_power_of_2(self._heads.group))
        registers = TILE_REGISTERS if group_block * self._heads.head_dim <= 8 * 128 else None
        return {"GROUP_BLOCK": group_block, "BY_CHIP": query.is_cuda, "num_warps": 1, "maxnreg": registers}


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
def _bounds(items, item, chunk_size, context_len, window):
    """Begin and end of an item's chunk of what its row sees, and whether the chunk is all of it."""
    begin = tl.where(window > 0, tl.maximum(context_len - window, 0), 0)
    is_whole = chunk_size >= context_len - begin
    begin += tl.load(items.chunks + item) * chunk_size
    return begin, tl.minimum(begin + chunk_size, context_len), is_whole


@triton.jit
def _start_softmax(factors, items, item, head, exists, BLOCK: tl.constexpr):
    """Highest score and sum of weights, (BLOCK,) each, before the first token: those of sinks, in the first chunk."""
    highest = tl.full([BLOCK], -float("inf"), tl.float32)
    weight = tl.zeros([BLOCK], tl.float32)
    if factors.sinks is not None:
        is_first = tl.load(items.chunks + item) == 0
        highest = tl.where(is_first, load_sinks(factors.sinks, head, exists), highest)
        weight = tl.where(is_first, 1.0, weight)
    return highest, weight


@triton.jit
def _weigh_tile(scores, visible, highest, weight, factors):
    """`weigh` for products of queries and keys, (heads, tokens), of which only `visible` tokens count."""
    if factors.scale is not None:
        scores = tanh(scores * factors.scale)
    scores = tl.where(visible[None, :], scores * factors.scale_log2, -float("inf"))
    return weigh(scores, highest, weight, 1.0)


@triton.jit
def _store_chunk(result, lse, outputs, is_whole, item, token, head, dim, exists, HEADS: tl.constexpr):
    """Store what a chunk gives for the heads at index `head`: the output, or a part of it that is merged later."""
    num_heads: tl.constexpr = HEADS.num_kv_heads * HEADS.group
    offsets = head[:, None] * HEADS.head_dim + dim[None, :]
    mask = exists[:, None] & (dim[None, :] < HEADS.head_dim)
    if is_whole:
        out = outputs.output + token * (num_heads * HEADS.head_dim) + offsets
        tl.store(out, result.to(outputs.output.dtype.element_ty), mask=mask)
    else:
        first_head = item.to(tl.int64) * num_heads
        tl.store(outputs.partial + first_head * HEADS.head_dim + offsets, result, mask=mask)
        tl.store(outputs.partial_lse + first_head + head, lse, mask=exists)


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
    begin, end, is_whole = _bounds(items, item, chunk_size, context_len, window)

    exists = tl.arange(0, GROUP_BLOCK) < HEADS.group
    head = kv_head * HEADS.group + tl.arange(0, GROUP_BLOCK)
    dim = tl.arange(0, head_block)
    query_offsets = head[:, None] * HEADS.head_dim + dim[None, :]
    mask = exists[:, None] & (dim[None, :] < HEADS.head_dim)
    q = tl.load(query + token * query_stride + query_offsets, mask=mask, other=0.0).to(PRODUCT)

    highest, weight = _start_softmax(factors, items, item, head, exists, GROUP_BLOCK)
    acc = tl.zeros([GROUP_BLOCK, head_block], tl.float32)
    for start in range(begin, end, BLOCK):
        position = start + tl.arange(0, BLOCK)
        visible = position < end
        page = tl.load(table + position // PAGE_SIZE, mask=visible, other=0).to(INDEX)
        kv_index = (page * PAGE_SIZE + position % PAGE_SIZE) * HEADS.num_kv_heads + kv_head
        k = _load_heads(cache.key_pages, kv_index, visible, HEADS.head_dim, head_block, HAS_PAIRS)
        scores = tl.dot(q, tl.trans(k).to(q.dtype), input_precision="ieee")
        probability, rescale, highest, weight = _weigh_tile(scores, visible, highest, weight, factors)
        v = _load_heads(cache.value_pages, kv_index, visible, HEADS.head_dim, head_block, HAS_PAIRS)
        acc = acc * rescale[:, None] + tl.dot(probability.to(q.dtype), v.to(q.dtype), input_precision="ieee")
    lse = highest + tl.log2(weight)
    _store_chunk(acc / weight[:, None], lse, outputs, is_whole, item, token, head, dim, exists, HEADS)


@triton.jit
def _paged_decode_8_bits(
    query, cache, parts, items, outputs, query_stride, window, factors, HEADS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr, PAGE_SIZE: tl.constexpr, BY_CHIP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`_paged_decode` by one warp in tiles of `eight_bit_tiles`. The next tile is on its way meanwhile."""
    wait_for_inputs(PDL)
    head_dim: tl.constexpr = HEADS.head_dim
    token_words: tl.constexpr = HEADS.num_kv_heads * head_dim // 4
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    if item >= tl.load(items.summary):
        return
    chunk_size, context_len, token, table = load_chunk(cache, parts, items, item)
    begin, end, is_whole = _bounds(items, item, chunk_size, context_len, window)
    key_pages = cache.key_pages.to(tl.pointer_type(tl.int32)) + kv_head * (head_dim // 4)
    value_pages = cache.value_pages.to(tl.pointer_type(tl.int32)) + kv_head * (head_dim // 4)

    exists = tl.arange(0, GROUP_BLOCK) < HEADS.group
    head = kv_head * HEADS.group + tl.arange(0, GROUP_BLOCK)
    query_offsets = head[None, :] * head_dim + key_dims(head_dim)[:, None]
    q = tl.load(query + token * query_stride + query_offsets, mask=exists[None, :], other=0.0).to(tl.float16)

    highest, weight = _start_softmax(factors, items, item, head, exists, GROUP_BLOCK)
    acc = tl.zeros([head_dim, GROUP_BLOCK], tl.float32)
    aligned = begin // 16 * 16
    first = run_offset(table, aligned, end, token_words, PAGE_SIZE)
    second = run_offset(table, aligned + 16, end, token_words, PAGE_SIZE)
    key_words = load_key_words(key_pages, first, second, token_words, head_dim)
    even, odd = load_value_words(value_pages, first, second, aligned, begin, end, token_words, head_dim)
    for start in tl.range(aligned, end, 32, num_stages=1):
        first = run_offset(table, start + 32, end, token_words, PAGE_SIZE)
        second = run_offset(table, start + 48, end, token_words, PAGE_SIZE)
        scores = tl.dot(keys_of(key_words, head_dim, BY_CHIP), q)
        key_words = load_key_words(key_pages, first, second, token_words, head_dim)
        position = start + tile_tokens()
        visible = (position >= begin) & (position < end)
        probability, rescale, highest, weight = _weigh_tile(tl.trans(scores), visible, highest, weight, factors)
        weights = tl.trans(probability.to(tl.float16))
        acc = acc * rescale[None, :] + tl.dot(values_of(even, odd, head_dim, BY_CHIP), weights)
        even, odd = load_value_words(value_pages, first, second, start + 32, begin, end, token_words, head_dim)
    lse = highest + tl.log2(weight)
    _store_chunk(
        tl.trans(acc / weight[None, :]), lse, outputs, is_whole, item, token, head, value_dims(head_dim), exists, HEADS
    )  # fmt: skip


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
