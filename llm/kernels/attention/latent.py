"""Attention to latents in pages, of decodes and of chunks: all heads read one vector a token, which is key and value.

Of DeepSeek-V2's shape (arXiv:2405.04434): a key is a latent and, behind it, a few numbers that RoPE has turned; its
value is the latent. A tile is the queries of several heads and tokens against a block of the context, whose latents are
read once for both products. Long contexts of decodes are cut among programs and merged as in `decode`; chunks go as in
`prefill`, one program for a tile's whole context.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from llm.kernels.attention.decode import merge_chunks
from llm.kernels.attention.work import (
    AttentionOutputs,
    StepParts,
    WorkItems,
    load_chunk,
    load_item,
    num_decode_items,
    num_prefill_items,
    page_table_of,
    slot_index_type,
    weigh,
)
from llm.kernels.launch import launch_options, most_stages, wait_for_inputs

_BLOCK_BYTES = 64
"""Bytes that one number of each of a block's tokens takes in all."""
_TILE_ROWS, _FEW_TILE_ROWS = 64, 16
"""Queries of a tile: in 16 bits on Hopper, whose instructions take as many; elsewhere, with less room."""
_MERGED_HEADS = 8
_LOG2_E = 1.4426950408889634


class _LatentCache(NamedTuple):
    """One layer's latents in their pages, and where each row's pages are.

    Attributes:
        pages: (pages, page_size, 1, width).
        tables: (rows, pages a row) int32, each row's pages in order of position.
        table_stride: elements between two rows of `tables`.
    """

    pages: torch.Tensor
    tables: torch.Tensor
    table_stride: int


class _Shape(NamedTuple):
    """Shape of attention to latents, a constant of compiled kernels.

    Attributes:
        num_heads: number of heads of queries.
        group: heads of a tile, a divisor of `num_heads`.
        rank: width of a latent.
        width: width of a latent and what has been turned behind it.
        rank_block, turned_block: `rank` and `width - rank` rounded up to sizes that tiles have.
    """

    num_heads: int
    group: int
    rank: int
    width: int
    rank_block: int
    turned_block: int


class LatentAttention:
    """Attention to latents with its scratch memory.

    Args:
        max_parts: most parts of a step.
        num_heads: number of query heads.
        rank: width of a latent.
        width: width of a latent and of what RoPE has turned behind it.
        scale: factor of products of queries and keys.
        dtype: format of queries and latents.
        device: where all tensors live.
        deterministic: decodes go as chunks do, with one order for all sums.

    Attributes:
        block_tokens: new tokens of a work item of `plan_prefills`.
    """

    def __init__(
        self,
        max_parts: int,
        num_heads: int,
        rank: int,
        width: int,
        scale: float,
        dtype: torch.dtype,
        device: torch.device,
        *,
        deterministic: bool = False,
    ) -> None:
        self._num_heads, self._rank, self._width = num_heads, rank, width
        self._scale_log2 = scale * _LOG2_E
        self._deterministic = deterministic
        is_old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0)
        self._tile_rows = _FEW_TILE_ROWS if is_old or dtype.itemsize > 2 else _TILE_ROWS
        self._group = _largest_divisor(num_heads, self._tile_rows)
        self.block_tokens = self._tile_rows // self._group
        num_items = 0 if deterministic else num_decode_items(max_parts)
        self._partial = torch.empty(num_items, num_heads, rank, device=device)
        self._partial_lse = torch.empty(num_items, num_heads, device=device)

    def decode(
        self,
        query: torch.Tensor,
        pages: torch.Tensor,
        page_tables: torch.Tensor,
        parts: StepParts,
        items: WorkItems,
        output: torch.Tensor,
    ) -> None:
        """Write what the step's decodes find; other tokens' output is left alone.

        Args:
            query: (tokens, num_heads, width), contiguous.
            pages: (pages, page_size, 1, width), the new tokens' stored already.
            page_tables: (rows, pages a row) int32.
            items: planned by `plan_decodes` for the same parts.
            output: (tokens, num_heads, rank), contiguous.
        """
        num_groups = self._num_heads // self._group
        outputs = AttentionOutputs(output, self._partial, self._partial_lse)
        _decode_latents[(num_groups, num_decode_items(parts.num_parts))](
            query, _LatentCache(pages, page_tables, page_tables.stride(0)), parts, items, outputs, self._scale_log2,
            **self._cut(query, pages, max(16, triton.next_power_of_2(self._group))),
        )  # fmt: skip
        merge_chunks(parts, items, outputs, _largest_divisor(self._group, _MERGED_HEADS))

    def prefill(
        self,
        query: torch.Tensor,
        pages: torch.Tensor,
        page_tables: torch.Tensor,
        parts: StepParts,
        items: WorkItems,
        output: torch.Tensor,
    ) -> None:
        """Write what the parts find that `items` were planned for: those of 2 tokens or more, or all if deterministic.

        Args:
            query, pages, page_tables, output: as in `decode`.
            items: planned by `plan_prefills` with `block_tokens`.
        """
        min_query_len = 1 if self._deterministic else 2
        num_items = num_prefill_items(len(query), parts.num_parts, self.block_tokens, min_query_len)
        tile_rows = max(16, triton.next_power_of_2(self.block_tokens * self._group))
        _prefill_latents[(self._num_heads // self._group, num_items)](
            query, _LatentCache(pages, page_tables, page_tables.stride(0)), parts, items, output, self._scale_log2,
            BLOCK_TOKENS=self.block_tokens, **self._cut(query, pages, tile_rows),
        )  # fmt: skip

    def _cut(self, query: torch.Tensor, pages: torch.Tensor, tile_rows: int) -> dict[str, object]:
        """Sizes and options that both kernels are compiled with."""
        rank_block = max(16, triton.next_power_of_2(self._rank))
        turned_block = max(16, triton.next_power_of_2(self._width - self._rank))
        block = _BLOCK_BYTES // query.itemsize
        bytes_a_token = (rank_block + turned_block) * query.itemsize
        num_stages = most_stages(query.device, block * bytes_a_token, tile_rows * bytes_a_token)
        return {
            "SHAPE": _Shape(self._num_heads, self._group, self._rank, self._width, rank_block, turned_block),
            "TILE_ROWS": tile_rows, "PAGE_SIZE": pages.shape[1], "BLOCK": block,
            "INDEX": slot_index_type(pages[None]), "num_warps": 8 if tile_rows > _FEW_TILE_ROWS else 4,
            "num_stages": min(num_stages, 2), **launch_options(query.device),
        }  # fmt: skip


def _largest_divisor(number: int, most: int) -> int:
    return next(divisor for divisor in range(min(number, most), 0, -1) if number % divisor == 0)


@triton.jit
def _load_queries(query, place, exists, SHAPE: tl.constexpr):
    """The queries at `place`, (rows,) int64, in two parts: for latents, and for what has been turned."""
    dim = tl.arange(0, SHAPE.rank_block)
    turned = SHAPE.rank + tl.arange(0, SHAPE.turned_block)
    row = query + place[:, None] * SHAPE.width
    plain = tl.load(row + dim[None, :], mask=exists[:, None] & (dim < SHAPE.rank)[None, :], other=0.0)
    return plain, tl.load(row + turned[None, :], mask=exists[:, None] & (turned < SHAPE.width)[None, :], other=0.0)


@triton.jit
def _attend(
    plain, turned, pages, table, begin, end, position, scale_log2,
    SHAPE: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Online softmax over the context from `begin` to `end`, of which a query at `position` sees what is not later.

    A block that is hidden from a row leaves that row's state as it was, bit by bit.
    """
    rank_block: tl.constexpr = SHAPE.rank_block
    highest = tl.full([plain.shape[0]], -1.0e30, tl.float32)
    weight = tl.zeros([plain.shape[0]], tl.float32)
    acc = tl.zeros([plain.shape[0], rank_block], tl.float32)
    dim = tl.arange(0, rank_block)
    behind = SHAPE.rank + tl.arange(0, SHAPE.turned_block)
    for start in range(begin, end, BLOCK):
        key_position = start + tl.arange(0, BLOCK)
        exists = key_position < end
        page = tl.load(table + key_position // PAGE_SIZE, mask=exists, other=0).to(INDEX)
        row = pages + ((page * PAGE_SIZE + key_position % PAGE_SIZE) * SHAPE.width)[:, None]
        latent = tl.load(row + dim[None, :], mask=exists[:, None] & (dim < SHAPE.rank)[None, :], other=0.0)
        key = tl.load(row + behind[None, :], mask=exists[:, None] & (behind < SHAPE.width)[None, :], other=0.0)
        scores = tl.dot(plain, tl.trans(latent), input_precision="ieee")
        scores = tl.dot(turned, tl.trans(key), scores, input_precision="ieee")
        visible = exists[None, :] & (key_position[None, :] <= position[:, None])
        scores = tl.where(visible, scores, -float("inf"))
        probability, rescale, highest, weight = weigh(scores, highest, weight, scale_log2)
        acc = tl.dot(probability.to(latent.dtype), latent, acc * rescale[:, None], input_precision="ieee")
    return acc, highest, weight


@triton.jit
def _decode_latents(
    query, cache, parts, items, outputs, scale_log2, SHAPE: tl.constexpr, TILE_ROWS: tl.constexpr,
    PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (group of heads, item): their queries against one chunk of one row's context."""
    wait_for_inputs(PDL)
    item = tl.program_id(1)
    if item >= tl.load(items.summary):
        return
    chunk_size, context_len, token, table = load_chunk(cache, parts, items, item)
    begin = tl.load(items.chunks + item) * chunk_size
    end = tl.minimum(begin + chunk_size, context_len)
    row = tl.arange(0, TILE_ROWS)
    exists = row < SHAPE.group
    head = tl.program_id(0) * SHAPE.group + row
    plain, turned = _load_queries(query, token * SHAPE.num_heads + head, exists, SHAPE)
    position = tl.full([TILE_ROWS], context_len, tl.int32)
    acc, highest, weight = _attend(
        plain, turned, cache.pages, table, begin, end, position, scale_log2, SHAPE, PAGE_SIZE, BLOCK, INDEX
    )
    dim = tl.arange(0, SHAPE.rank_block)
    mask = exists[:, None] & (dim < SHAPE.rank)[None, :]
    found = acc / weight[:, None]
    if chunk_size >= context_len:
        place = (token * SHAPE.num_heads + head) * SHAPE.rank
        tl.store(outputs.output + place[:, None] + dim[None, :], found.to(outputs.output.dtype.element_ty), mask=mask)
    else:
        place = item.to(tl.int64) * SHAPE.num_heads + head
        tl.store(outputs.partial + place[:, None] * SHAPE.rank + dim[None, :], found, mask=mask)
        tl.store(outputs.partial_lse + place, highest + tl.log2(weight), mask=exists)


@triton.jit
def _prefill_latents(
    query, cache, parts, items, output, scale_log2, SHAPE: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    TILE_ROWS: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (group of heads, item): a block of one part's new tokens against what they see."""
    wait_for_inputs(PDL)
    item = tl.program_id(1)
    if item >= tl.load(items.summary):
        return
    part, query_len, context_len, block = load_item(parts, items, item, BLOCK_TOKENS)
    table = page_table_of(cache, parts, part)
    row = tl.arange(0, TILE_ROWS)
    token_in_part = block * BLOCK_TOKENS + row // SHAPE.group
    exists = (token_in_part < query_len) & (row < BLOCK_TOKENS * SHAPE.group)
    token = (tl.load(parts.query_starts + part) + token_in_part).to(tl.int64)
    place = token * SHAPE.num_heads + tl.program_id(0) * SHAPE.group + row % SHAPE.group
    plain, turned = _load_queries(query, place, exists, SHAPE)
    first_position = context_len - query_len
    end = tl.minimum(first_position + (block + 1) * BLOCK_TOKENS, context_len)
    acc, _, weight = _attend(
        plain, turned, cache.pages, table, 0, end, first_position + token_in_part, scale_log2, SHAPE, PAGE_SIZE,
        BLOCK, INDEX,
    )  # fmt: skip
    dim = tl.arange(0, SHAPE.rank_block)
    mask = exists[:, None] & (dim < SHAPE.rank)[None, :]
    found = (acc / weight[:, None]).to(output.dtype.element_ty)
    tl.store(output + place[:, None] * SHAPE.rank + dim[None, :], found, mask=mask)
