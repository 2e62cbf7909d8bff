"""Attention to latents in pages, of decodes and of chunks: all heads read one vector a token, which is key and value.

Of DeepSeek-V2's shape (arXiv:2405.04434): a key is a latent and, behind it, a few numbers that RoPE has turned; its
value is the latent. A tile is the queries of several heads and tokens against a block of the context, whose latents are
read once for both products. Long contexts of decodes are cut among programs and merged as in `decode`; chunks go as in
`prefill`, one program for a tile's whole context.
"""

import torch
import triton
import triton.language as tl

from llm.kernels.attention.decode import merge_chunks
from llm.kernels.attention.work import StepParts, WorkItems, num_decode_items, num_prefill_items, slot_index_type
from llm.kernels.launch import launch_options, most_stages, wait_for_inputs

_BLOCK_BYTES = 64
"""Of one number of each of a block's tokens."""
_TILE_ROWS, _FEW_TILE_ROWS = 64, 16
"""Queries of a tile: in 16 bits on Hopper, whose instructions take as many; elsewhere, with less room."""
_MERGED_HEADS = 8
_LOG2_E = 1.4426950408889634


class LatentAttention:
    """Attention to latents with its scratch memory.

    Args:
        max_parts: most parts a step.
        num_heads: of queries.
        rank: width of a latent.
        width: of a latent and what has been turned behind it.
        scale: of products of queries and keys.
        dtype: of queries and latents.
        device: of everything.
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
        _decode_latents[(num_groups, num_decode_items(len(parts)))](
            query, pages, page_tables, parts.rows, parts.query_starts, parts.context_lens, items.parts, items.chunks,
            items.summary, output, self._partial, self._partial_lse, page_tables.stride(0), self._scale_log2,
            GROUP=self._group, **self._cut(query, pages, max(16, triton.next_power_of_2(self._group))),
        )  # fmt: skip
        merge_chunks(
            parts, items, self._partial, self._partial_lse, output, _largest_divisor(self._group, _MERGED_HEADS)
        )

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
        num_items = num_prefill_items(len(query), len(parts), self.block_tokens, min_query_len)
        tile_rows = max(16, triton.next_power_of_2(self.block_tokens * self._group))
        _prefill_latents[(self._num_heads // self._group, num_items)](
            query, pages, page_tables, parts.rows, parts.query_starts, parts.query_lens, parts.context_lens,
            items.parts, items.chunks, items.summary, output, page_tables.stride(0), self._scale_log2,
            GROUP=self._group, BLOCK_TOKENS=self.block_tokens, **self._cut(query, pages, tile_rows),
        )  # fmt: skip

    def _cut(self, query: torch.Tensor, pages: torch.Tensor, tile_rows: int) -> dict[str, object]:
        """Sizes and options that both kernels are compiled with."""
        rank_block = max(16, triton.next_power_of_2(self._rank))
        turned_block = max(16, triton.next_power_of_2(self._width - self._rank))
        block = _BLOCK_BYTES // query.itemsize
        bytes_a_token = (rank_block + turned_block) * query.itemsize
        num_stages = most_stages(query.device, block * bytes_a_token, tile_rows * bytes_a_token)
        return {
            "NUM_HEADS": self._num_heads, "TILE_ROWS": tile_rows, "RANK": self._rank, "RANK_BLOCK": rank_block,
            "WIDTH": self._width, "TURNED_BLOCK": turned_block, "PAGE_SIZE": pages.shape[1], "BLOCK": block,
            "INDEX": slot_index_type(pages[None]), "num_warps": 8 if tile_rows > _FEW_TILE_ROWS else 4,
            "num_stages": min(num_stages, 2), **launch_options(query.device),
        }  # fmt: skip


def _largest_divisor(number: int, most: int) -> int:
    return next(divisor for divisor in range(min(number, most), 0, -1) if number % divisor == 0)


@triton.jit
def _load_queries(query, place, exists, RANK, RANK_BLOCK: tl.constexpr, WIDTH, TURNED_BLOCK: tl.constexpr):
    """The queries at `place`, (rows,) int64, in two parts: for latents, and for what has been turned."""
    dim = tl.arange(0, RANK_BLOCK)
    turned = RANK + tl.arange(0, TURNED_BLOCK)
    row = query + place[:, None] * WIDTH
    plain = tl.load(row + dim[None, :], mask=exists[:, None] & (dim < RANK)[None, :], other=0.0)
    return plain, tl.load(row + turned[None, :], mask=exists[:, None] & (turned < WIDTH)[None, :], other=0.0)


@triton.jit
def _attend(
    plain, turned, pages, table, begin, end, position, scale_log2,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, WIDTH: tl.constexpr, TURNED_BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Online softmax over the context from `begin` to `end`, of which a query at `position` sees what is not later.

    A block that is hidden from a row leaves that row's state as it was, bit by bit.
    """
    highest = tl.full([plain.shape[0]], -1.0e30, tl.float32)
    weight = tl.zeros([plain.shape[0]], tl.float32)
    acc = tl.zeros([plain.shape[0], RANK_BLOCK], tl.float32)
    dim = tl.arange(0, RANK_BLOCK)
    behind = RANK + tl.arange(0, TURNED_BLOCK)
    for start in range(begin, end, BLOCK):
        key_position = start + tl.arange(0, BLOCK)
        exists = key_position < end
        page = tl.load(table + key_position // PAGE_SIZE, mask=exists, other=0).to(INDEX)
        row = pages + ((page * PAGE_SIZE + key_position % PAGE_SIZE) * WIDTH)[:, None]
        latent = tl.load(row + dim[None, :], mask=exists[:, None] & (dim < RANK)[None, :], other=0.0)
        key = tl.load(row + behind[None, :], mask=exists[:, None] & (behind < WIDTH)[None, :], other=0.0)
        scores = tl.dot(plain, tl.trans(latent), input_precision="ieee")
        scores = tl.dot(turned, tl.trans(key), scores, input_precision="ieee")
        visible = exists[None, :] & (key_position[None, :] <= position[:, None])
        scores = tl.where(visible, scores, -float("inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1) * scale_log2)
        rescale = tl.exp2(highest - new_highest)
        probability = tl.exp2(scores * scale_log2 - new_highest[:, None])
        weight = weight * rescale + tl.sum(probability, 1)
        acc = tl.dot(probability.to(latent.dtype), latent, acc * rescale[:, None], input_precision="ieee")
        highest = new_highest
    return acc, highest, weight


@triton.jit
def _decode_latents(
    query, pages, page_tables, part_rows, query_starts, context_lens, item_parts, item_chunks, summary, output, partial,
    partial_lse, table_stride, scale_log2,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, TILE_ROWS: tl.constexpr, RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr, WIDTH: tl.constexpr, TURNED_BLOCK: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr, INDEX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (group of heads, item): their queries against one chunk of one row's context."""
    wait_for_inputs(PDL)
    item = tl.program_id(1)
    if item >= tl.load(summary):
        return
    chunk_size = tl.load(summary + 1)
    part = tl.load(item_parts + item)
    context_len = tl.load(context_lens + part)
    token = tl.load(query_starts + part).to(tl.int64)
    table = page_tables + tl.load(part_rows + part).to(tl.int64) * table_stride
    begin = tl.load(item_chunks + item) * chunk_size
    end = tl.minimum(begin + chunk_size, context_len)
    row = tl.arange(0, TILE_ROWS)
    exists = row < GROUP
    head = tl.program_id(0) * GROUP + row
    plain, turned = _load_queries(query, token * NUM_HEADS + head, exists, RANK, RANK_BLOCK, WIDTH, TURNED_BLOCK)
    position = tl.full([TILE_ROWS], context_len, tl.int32)
    acc, highest, weight = _attend(
        plain, turned, pages, table, begin, end, position, scale_log2, RANK, RANK_BLOCK, WIDTH, TURNED_BLOCK, PAGE_SIZE,
        BLOCK, INDEX,
    )  # fmt: skip
    dim = tl.arange(0, RANK_BLOCK)
    mask = exists[:, None] & (dim < RANK)[None, :]
    found = acc / weight[:, None]
    if chunk_size >= context_len:
        place = (token * NUM_HEADS + head) * RANK
        tl.store(output + place[:, None] + dim[None, :], found.to(output.dtype.element_ty), mask=mask)
    else:
        place = item.to(tl.int64) * NUM_HEADS + head
        tl.store(partial + place[:, None] * RANK + dim[None, :], found, mask=mask)
        tl.store(partial_lse + place, highest + tl.log2(weight), mask=exists)


@triton.jit
def _prefill_latents(
    query, pages, page_tables, part_rows, query_starts, query_lens, context_lens, item_parts, item_chunks, summary,
    output, table_stride, scale_log2,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_TOKENS: tl.constexpr, TILE_ROWS: tl.constexpr,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, WIDTH: tl.constexpr, TURNED_BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (group of heads, item): a block of one part's new tokens against what they see."""
    wait_for_inputs(PDL)
    item = tl.program_id(1)
    if item >= tl.load(summary):
        return
    part = tl.load(item_parts + item)
    query_len = tl.load(query_lens + part)
    context_len = tl.load(context_lens + part)
    # The last blocks see most: they start first.
    block = tl.cdiv(query_len, BLOCK_TOKENS) - 1 - tl.load(item_chunks + item)
    table = page_tables + tl.load(part_rows + part).to(tl.int64) * table_stride
    row = tl.arange(0, TILE_ROWS)
    token_in_part = block * BLOCK_TOKENS + row // GROUP
    exists = (token_in_part < query_len) & (row < BLOCK_TOKENS * GROUP)
    token = (tl.load(query_starts + part) + token_in_part).to(tl.int64)
    place = token * NUM_HEADS + tl.program_id(0) * GROUP + row % GROUP
    plain, turned = _load_queries(query, place, exists, RANK, RANK_BLOCK, WIDTH, TURNED_BLOCK)
    first_position = context_len - query_len
    end = tl.minimum(first_position + (block + 1) * BLOCK_TOKENS, context_len)
    acc, _, weight = _attend(
        plain, turned, pages, table, 0, end, first_position + token_in_part, scale_log2, RANK, RANK_BLOCK, WIDTH,
        TURNED_BLOCK, PAGE_SIZE, BLOCK, INDEX,
    )  # fmt: skip
    dim = tl.arange(0, RANK_BLOCK)
    mask = exists[:, None] & (dim < RANK)[None, :]
    found = (acc / weight[:, None]).to(output.dtype.element_ty)
    tl.store(output + place[:, None] * RANK + dim[None, :], found, mask=mask)
