"""Paged prefill: chunks of many sequences against their contexts, packed without padding.

FlashAttention-2 (Dao 2023, arXiv:2307.08691) over pages. The query heads that share a key/value head are rows of one
tile, so that each key is read once for all of them. Few new tokens behind a long context make few tiles with much to
read each, so their context is cut among programs and merged by log-sum-exp, as in `decode`.
"""

from typing import NamedTuple

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
    load_item,
    load_sinks,
    num_prefill_items,
    page_table_of,
    product_type,
    slot_index_type,
    weigh,
)
from llm.kernels.launch import launch_options, most_stages, wait_for_inputs
from llm.kernels.soft_cap import tanh

_TILE_ROWS, _MANY_TOKENS_TILE_ROWS = 64, 128
_MANY_TOKENS = 4096
_WIDE_HEAD_BYTES, _WIDE_HEAD_TILE_ROWS = 512, 32
"""Bytes of a head past which, in float32, higher tiles find no room in shared memory and take minutes to compile."""
_BLOCK_TOKENS = 64
_NUM_WARPS, _WIDE_TILE_NUM_WARPS = 4, 8
_NARROW_HEAD = 128
"""Numbers of a head up to which all stages fit the shared memory of every chip."""
_WIDE_TILE = 128 * 128
"""Numbers of a tile's output that fit the registers of 4 warps beside its scores."""
_NUM_STAGES, _MANY_TOKENS_NUM_STAGES = 2, 3
"""As measured: docs/decisions/0006."""
_MOST_SPLITS, _FEW_TILES = 4, 200
"""Programs that share a tile's context at most, and tiles up to which they do: more fill the chip by themselves."""
_MIN_SPLIT_BLOCKS = 8
"""Blocks of the context that each of them is left with at least."""


class _Tile(NamedTuple):
    """How a prefill is cut up, a constant of compiled kernels.

    Attributes:
        rows: rows of a tile of queries: tokens times the heads of a group, and what is left over.
        block_tokens: new tokens of a tile.
        block: tokens of the context that are read at once.
        min_split_blocks: blocks of the context that each program which shares it has at least.
    """

    rows: int
    block_tokens: int
    block: int
    min_split_blocks: int


class PrefillScratch:
    """What programs that share a tile's context hand on to the kernel that merges them.

    Args:
        num_heads, num_kv_heads, head_dim: shape of the model's attention.
        dtype: of its queries.
        device: where all tensors live.
    """

    def __init__(
        self, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        block_tokens = prefill_block_tokens(num_heads, num_kv_heads, head_dim * dtype.itemsize)
        self.max_tokens = _FEW_TILES * block_tokens // num_kv_heads
        """Of steps in which tiles are few."""
        self.partial = torch.empty(_MOST_SPLITS, self.max_tokens, num_heads, head_dim, device=device)
        self.partial_lse = torch.empty(_MOST_SPLITS, self.max_tokens, num_heads, device=device)


def prefill_block_tokens(num_heads: int, num_kv_heads: int, head_bytes: int, num_tokens: int = 0) -> int:
    """New tokens of a work item, in a step of `num_tokens`: as many as fill a tile with the heads of one group.

    With the default of 0 for all steps, results do not depend on the step. A head of a query takes `head_bytes`.
    """
    tile_rows = _MANY_TOKENS_TILE_ROWS if num_tokens >= _MANY_TOKENS else _TILE_ROWS
    if head_bytes > _WIDE_HEAD_BYTES:
        tile_rows = _WIDE_HEAD_TILE_ROWS
    return max(tile_rows // (num_heads // num_kv_heads), 1)


def paged_prefill(
    query: torch.Tensor,
    kv_pages: torch.Tensor,
    page_tables: torch.Tensor,
    parts: StepParts,
    items: WorkItems,
    window: int | None,
    output: torch.Tensor,
    scratch: PrefillScratch | None = None,
    *,
    scoring: Scoring | None = None,
    deterministic: bool = False,
) -> None:
    """Write attention output of the parts that `items` were planned for; other tokens' output is left alone.

    Args:
        query: (tokens, num_heads, head_dim), RoPE applied, the last two dimensions contiguous.
        kv_pages: (2, pages, page_size, num_kv_heads, head_dim), the new tokens' stored already.
        page_tables: (rows, pages a row) int32.
        items: planned by `plan_prefills` with this step's `prefill_block_tokens`, or, if `deterministic`, with that of
            0 tokens and for parts of one token too.
        window: a token attends to itself and the `window - 1` before it; None for all.
        output: (tokens, num_heads, head_dim), contiguous.
        scratch: lets programs share long contexts; None for one program a tile.
        scoring: None for a scale of `head_dim ** -0.5` alone.
        deterministic: a token's output, bit by bit, depends on nothing but its query and the keys and values it sees:
            not on the tokens that share its step or its tile. Not together with `scratch`.
    """
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = kv_pages.shape[3]
    group_size = num_heads // num_kv_heads
    head_bytes = head_dim * query.itemsize
    block_tokens = prefill_block_tokens(num_heads, num_kv_heads, head_bytes, 0 if deterministic else num_tokens)
    tile_rows = triton.next_power_of_2(block_tokens * group_size)  # fewer than a group's rows are left over
    num_items = num_prefill_items(num_tokens, parts.num_parts, block_tokens, 1 if deterministic else 2)
    num_splits = _MOST_SPLITS if scratch is not None and num_tokens <= scratch.max_tokens else 1
    head_block = max(16, triton.next_power_of_2(head_dim))
    num_stages = _NUM_STAGES if tile_rows <= _TILE_ROWS else _MANY_TOKENS_NUM_STAGES
    if head_block > _NARROW_HEAD:
        bytes_a_stage = 2 * _BLOCK_TOKENS * head_block * kv_pages.dtype.itemsize
        other_bytes = tile_rows * (head_block + _BLOCK_TOKENS) * query.itemsize
        num_stages = min(num_stages, most_stages(query.device, bytes_a_stage, other_bytes))
    scoring = scoring or Scoring(head_dim**-0.5)
    partial, partial_lse = (output, output) if scratch is None else (scratch.partial, scratch.partial_lse)
    outputs = AttentionOutputs(output, partial, partial_lse)
    shape = {
        "HEADS": HeadShape(num_kv_heads, group_size, head_dim, head_block),
        "TILE": _Tile(tile_rows, block_tokens, _BLOCK_TOKENS, _MIN_SPLIT_BLOCKS), "HAS_WINDOW": window is not None,
        **launch_options(query.device),
    }  # fmt: skip
    _paged_prefill[(num_kv_heads, num_items, num_splits)](
        query, PagedCache.of(kv_pages, page_tables), parts, items, outputs, num_tokens, num_splits, query.stride(0),
        window or 0, scoring.factors, PAGE_SIZE=kv_pages.shape[2], IS_UNIFORM=deterministic,
        INDEX=slot_index_type(kv_pages), PRODUCT=product_type(query, kv_pages),
        num_warps=_NUM_WARPS if tile_rows * head_block <= _WIDE_TILE else _WIDE_TILE_NUM_WARPS, num_stages=num_stages,
        **shape,
    )  # fmt: skip
    if num_splits > 1:
        _merge_splits[(num_kv_heads, num_items)](
            parts, items, outputs, num_tokens, num_splits, window or 0, num_warps=8, **shape
        )


@triton.jit
def _tile_rows(parts, part, query_len, block, kv_head, HEADS: tl.constexpr, TILE: tl.constexpr):
    """The rows of a tile: a block of a part's new tokens times the heads of a group.

    Returns each row's token in the part and in the step, its head in the group, whether there is such a token; and,
    (rows, head block), which numbers there are and where they are in that token's heads.
    """
    row = tl.arange(0, TILE.rows)
    token_in_part = block * TILE.block_tokens + row // HEADS.group
    head = row % HEADS.group
    dim = tl.arange(0, HEADS.head_block)
    exists = (token_in_part < query_len) & (row < TILE.block_tokens * HEADS.group)
    mask = exists[:, None] & (dim[None, :] < HEADS.head_dim)
    token = (tl.load(parts.query_starts + part) + token_in_part).to(tl.int64)
    head_offsets = (kv_head * HEADS.group + head)[:, None] * HEADS.head_dim + dim[None, :]
    return token_in_part, token, head, exists, mask, head_offsets


@triton.jit
def _visible(block_first, context_len, window, TILE: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Begin and end of what the tokens of a block, the first at position `block_first`, see; it begins with a block."""
    end = tl.minimum(block_first + TILE.block_tokens, context_len)
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(block_first - window + 1, 0) // TILE.block * TILE.block
    return begin, end


@triton.jit
def _split_len(begin, end, num_splits, TILE: tl.constexpr):
    """Tokens of the context from `begin` to `end` for each program that shares it; the last may have fewer."""
    return tl.maximum(tl.cdiv(tl.cdiv(end - begin, TILE.block), num_splits), TILE.min_split_blocks) * TILE.block


@triton.jit(do_not_specialize=["num_tokens", "num_splits"])
def _paged_prefill(
    query, cache, parts, items, outputs, num_tokens, num_splits, query_stride, window, factors,
    HEADS: tl.constexpr, TILE: tl.constexpr, PAGE_SIZE: tl.constexpr, HAS_WINDOW: tl.constexpr,
    IS_UNIFORM: tl.constexpr, INDEX: tl.constexpr, PRODUCT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (kv head, item, split): a block of one part's new tokens, all heads of a group, against what they see.

    Blocks of the context begin at multiples of BLOCK, whatever the tile. A block hidden from a row leaves that row's
    state as it was: its weights are exactly 0, its rescaling exactly 1, or 0 before anything was visible.
    """
    wait_for_inputs(PDL)
    tile_rows: tl.constexpr = TILE.rows
    head_block: tl.constexpr = HEADS.head_block
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    if item >= tl.load(items.summary):
        return
    part, query_len, context_len, block = load_item(parts, items, item, TILE.block_tokens)
    first_position = context_len - query_len
    table = page_table_of(cache, parts, part)
    token_in_part, token, head, row_exists, row_mask, head_offsets = _tile_rows(
        parts, part, query_len, block, kv_head, HEADS, TILE
    )
    position = first_position + token_in_part
    q = tl.load(query + token[:, None] * query_stride + head_offsets, mask=row_mask, other=0.0).to(PRODUCT)

    block_first = first_position + block * TILE.block_tokens
    begin, end = _visible(block_first, context_len, window, TILE, HAS_WINDOW)
    if HAS_WINDOW:
        all_visible = begin
    elif IS_UNIFORM:
        all_visible = 0  # the same instructions for every block, for which rows are in the tile decides what is visible
    else:
        all_visible = (block_first + 1) // TILE.block * TILE.block
    split = tl.program_id(2)
    split_len = _split_len(begin, end, num_splits, TILE)
    is_whole = begin + split_len >= end
    begin += split * split_len
    if begin >= end:
        return
    end = tl.minimum(begin + split_len, end)
    all_visible = tl.minimum(tl.maximum(all_visible, begin), end)
    highest = tl.full([tile_rows], -1.0e30, tl.float32)
    weight = tl.zeros([tile_rows], tl.float32)
    if factors.sinks is not None:
        is_first = split == 0  # the split that weighs the sinks
        highest = tl.where(is_first, load_sinks(factors.sinks, kv_head * HEADS.group + head, row_exists), highest)
        weight = tl.where(is_first, 1.0, weight)
    state = tl.zeros([tile_rows, head_block], tl.float32), highest, weight
    state = _attend_blocks(
        state, q, cache, table, kv_head, begin, all_visible, position, context_len, window, factors, HEADS,
        PAGE_SIZE, TILE.block, INDEX, False, False,
    )  # fmt: skip
    acc, highest, weight = _attend_blocks(
        state, q, cache, table, kv_head, all_visible, end, position, context_len, window, factors, HEADS,
        PAGE_SIZE, TILE.block, INDEX, True, HAS_WINDOW,
    )  # fmt: skip
    if is_whole:
        out = outputs.output + token[:, None] * (HEADS.num_kv_heads * HEADS.group * HEADS.head_dim) + head_offsets
        tl.store(out, (acc / weight[:, None]).to(outputs.output.dtype.element_ty), mask=row_mask)
    else:
        # A row that sees nothing here weighs nothing.
        place = (split * num_tokens + token) * (HEADS.num_kv_heads * HEADS.group)
        saw_some = weight > 0
        result = tl.where(saw_some[:, None], acc / tl.where(saw_some, weight, 1.0)[:, None], 0.0)
        tl.store(outputs.partial + place[:, None] * HEADS.head_dim + head_offsets, result, mask=row_mask)
        lse = tl.where(saw_some, highest + tl.log2(tl.where(saw_some, weight, 1.0)), -float("inf"))
        tl.store(outputs.partial_lse + place + kv_head * HEADS.group + head, lse, mask=row_exists)


@triton.jit(do_not_specialize=["num_tokens", "num_splits"])
def _merge_splits(
    parts, items, outputs, num_tokens, num_splits, window,
    HEADS: tl.constexpr, TILE: tl.constexpr, HAS_WINDOW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (kv head, item): weigh the splits' results by their log-sum-exp."""
    wait_for_inputs(PDL)
    tile_rows: tl.constexpr = TILE.rows
    head_block: tl.constexpr = HEADS.head_block
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    if item >= tl.load(items.summary):
        return
    part, query_len, context_len, block = load_item(parts, items, item, TILE.block_tokens)
    block_first = context_len - query_len + block * TILE.block_tokens
    begin, end = _visible(block_first, context_len, window, TILE, HAS_WINDOW)
    split_len = _split_len(begin, end, num_splits, TILE)
    if begin + split_len >= end:
        return
    _, token, head, row_exists, row_mask, head_offsets = _tile_rows(parts, part, query_len, block, kv_head, HEADS, TILE)
    highest = tl.full([tile_rows], -1.0e30, tl.float32)
    weight = tl.zeros([tile_rows], tl.float32)
    acc = tl.zeros([tile_rows, head_block], tl.float32)
    for split in range(tl.cdiv(end - begin, split_len)):
        place = (split * num_tokens + token) * (HEADS.num_kv_heads * HEADS.group)
        lse = tl.load(outputs.partial_lse + place + kv_head * HEADS.group + head, mask=row_exists, other=-float("inf"))
        result = tl.load(outputs.partial + place[:, None] * HEADS.head_dim + head_offsets, mask=row_mask, other=0.0)
        acc, highest, weight = add_share(acc, highest, weight, result, lse)
    out = outputs.output + token[:, None] * (HEADS.num_kv_heads * HEADS.group * HEADS.head_dim) + head_offsets
    tl.store(out, (acc / weight[:, None]).to(outputs.output.dtype.element_ty), mask=row_mask)


@triton.jit
def _attend_blocks(
    state, q, cache, table, kv_head, begin, end, position, context_len, window, factors,
    HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr, MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Online softmax over the context from `begin` to `end`; MASKED where some of it is hidden from some rows."""
    acc, highest, weight = state
    dim = tl.arange(0, HEADS.head_block)
    for start in range(begin, end, BLOCK):
        key_position = start + tl.arange(0, BLOCK)
        mask = dim[None, :] < HEADS.head_dim
        if MASKED:
            mask &= key_position[:, None] < context_len
            page = tl.load(table + key_position // PAGE_SIZE, mask=key_position < context_len, other=0)
        else:
            page = tl.load(table + key_position // PAGE_SIZE)
        slot = page.to(INDEX) * PAGE_SIZE + key_position % PAGE_SIZE
        offsets = (slot[:, None] * HEADS.num_kv_heads + kv_head) * HEADS.head_dim + dim[None, :]
        k = tl.load(cache.key_pages + offsets, mask=mask, other=0.0)
        v = tl.load(cache.value_pages + offsets, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k).to(q.dtype), input_precision="ieee")
        if factors.scale is not None:
            scores = tanh(scores * factors.scale)
        if MASKED:
            visible = key_position[None, :] <= position[:, None]
            if HAS_WINDOW:
                visible &= key_position[None, :] > position[:, None] - window
            scores = tl.where(visible, scores, -float("inf"))
        probability, rescale, highest, weight = weigh(scores, highest, weight, factors.scale_log2)
        acc = acc * rescale[:, None]
        acc = tl.dot(probability.to(q.dtype), v.to(q.dtype), acc, input_precision="ieee")
    return acc, highest, weight
