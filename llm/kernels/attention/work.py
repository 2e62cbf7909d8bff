"""Cuts a step's attention into work items of like size, on the device, once a step."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from llm.kernels.launch import launch_options, triton_type, wait_for_inputs

MIN_CHUNK = 64
"""Tokens of context below which a decoding row is not cut: shorter chunks cost more in merging than they save."""
_SPARE_ITEMS = 64
"""Items of decodes in addition to two for each part: where parts are few, these fill the chip."""
_ITEMS_A_PROGRAM = 32
"""Number of items that a program of the plan looks up."""
_LOG2_E = 1.4426950408889634


class ScoreFactors(NamedTuple):
    """What kernels multiply and weigh scores by.

    Attributes:
        scale: what products of queries and keys are multiplied by before tanh; None for no tanh.
        scale_log2: what is multiplied after that, so that weights are powers of 2.
        sinks: (num_heads,), each head's score for attending to nothing; None for none.
    """

    scale: float | None
    scale_log2: float
    sinks: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Scoring:
    """The scores that attention takes the softmax of: see `llm.attention.spec.AttentionSpec`.

    Attributes:
        scale: of products of queries and keys.
        soft_cap: None for none.
        sinks: (num_heads,), each head's score for nothing; None for none.
    """

    scale: float
    soft_cap: float | None = None
    sinks: torch.Tensor | None = None

    @property
    def factors(self) -> ScoreFactors:
        """The same as kernels take it."""
        if self.soft_cap is None:
            return ScoreFactors(None, self.scale * _LOG2_E, self.sinks)
        return ScoreFactors(self.scale / self.soft_cap, self.soft_cap * _LOG2_E, self.sinks)


class StepParts(NamedTuple):
    """The step's parts as device tensors, (parts,) int32 each; unused ones have a query length of 0.

    Kernels take it whole, as they take every other named tuple of tensors and numbers.

    Attributes:
        rows: row of each part's sequence, into the page tables.
        query_starts: index of its first token among the step's tokens.
        query_lens: its new tokens; parts with one are decodes.
        context_lens: its tokens once the new ones are stored.
    """

    rows: torch.Tensor
    query_starts: torch.Tensor
    query_lens: torch.Tensor
    context_lens: torch.Tensor

    @property
    def num_parts(self) -> int:
        """Number of parts, unused ones included."""
        return len(self.rows)


class WorkItems(NamedTuple):
    """Items of one kind of attention. Written by `plan_work`, read by the kernels.

    Attributes:
        parts: (capacity,) int32, the part that each item belongs to.
        chunks: (capacity,) int32, which of its part's chunks it is.
        first_items: (parts,) int32, first item of each part.
        summary: (2,) int32, number of items, tokens a chunk.
    """

    parts: torch.Tensor
    chunks: torch.Tensor
    first_items: torch.Tensor
    summary: torch.Tensor

    @classmethod
    def allocate(cls, capacity: int, num_parts: int, device: torch.device) -> "WorkItems":
        """Room for `capacity` items of `num_parts` parts."""
        sizes = (capacity, capacity, num_parts, 2)
        return cls(*(torch.zeros(size, dtype=torch.int32, device=device) for size in sizes))


class PagedCache(NamedTuple):
    """One layer's keys and values in their pages, and where each row's pages are.

    Attributes:
        key_pages, value_pages: (pages, page_size, num_kv_heads, head_dim).
        tables: (rows, pages a row) int32, each row's pages in order of position.
        table_stride: elements between two rows of `tables`.
    """

    key_pages: torch.Tensor
    value_pages: torch.Tensor
    tables: torch.Tensor
    table_stride: int

    @classmethod
    def of(cls, kv_pages: torch.Tensor, page_tables: torch.Tensor) -> "PagedCache":
        """A layer's `kv_pages`, (2, pages, page_size, num_kv_heads, head_dim), behind their `page_tables`."""
        key_pages, value_pages = kv_pages.unbind()
        return cls(key_pages, value_pages, page_tables, page_tables.stride(0))


class AttentionOutputs(NamedTuple):
    """Where attention writes: what is complete, and what programs that share a context have found.

    Attributes:
        output: (tokens, num_heads, value_dim), contiguous.
        partial: (…, num_heads, value_dim) float32, the result of each share of a context.
        partial_lse: (…, num_heads) float32, log2 of the sum of its weights.
    """

    output: torch.Tensor
    partial: torch.Tensor
    partial_lse: torch.Tensor


class HeadShape(NamedTuple):
    """Shape of attention's heads, a constant of compiled kernels.

    Attributes:
        num_kv_heads: number of heads of keys and values.
        group: number of query heads that share each of these.
        head_dim: numbers of a head.
        head_block: `head_dim` rounded up to a size that tiles have.
    """

    num_kv_heads: int
    group: int
    head_dim: int
    head_block: int


def num_decode_items(num_parts: int) -> int:
    """Items that the decodes of `num_parts` parts are cut into at most, and programs that look for them."""
    return 2 * num_parts + _SPARE_ITEMS


def num_prefill_items(num_tokens: int, num_parts: int, block_tokens: int, min_query_len: int = 2) -> int:
    """Most items that parts of `num_tokens` tokens in all are cut into, those of `min_query_len` tokens and more."""
    return num_tokens // block_tokens + min(num_parts, num_tokens // min_query_len)


def slot_index_type(kv_pages: torch.Tensor) -> tl.dtype:
    """Integers that count the elements of all keys: half as wide, half as many registers for addresses."""
    return tl.int32 if kv_pages.numel() // len(kv_pages) < 2**31 else tl.int64


def product_type(query: torch.Tensor, kv_pages: torch.Tensor) -> tl.dtype:
    """Format of attention's products: the query's, but float16 for bfloat16 where keys and values have 8 bits.

    The chip turns E4M3 to float16 in one instruction, which loses nothing, and to bfloat16 in four.
    """
    if kv_pages.dtype.itemsize == 1 and query.dtype == torch.bfloat16:
        return tl.float16
    return triton_type(query.dtype)


@triton.jit
def load_sinks(sinks, head, exists):
    """Scores for nothing of these heads, float32, to be powers of 2."""
    return tl.load(sinks + head, mask=exists, other=0.0).to(tl.float32) * 1.4426950408889634


@triton.jit
def page_table_of(cache, parts, part):
    """Pointer to the pages of a part's sequence, in order of position."""
    return cache.tables + tl.load(parts.rows + part).to(tl.int64) * cache.table_stride


@triton.jit
def load_chunk(cache, parts, items, item):
    """A decode's item: tokens a chunk, the length of its context, its token, int64, and its sequence's page table."""
    chunk_size = tl.load(items.summary + 1)
    part = tl.load(items.parts + item)
    context_len = tl.load(parts.context_lens + part)
    token = tl.load(parts.query_starts + part).to(tl.int64)
    return chunk_size, context_len, token, page_table_of(cache, parts, part)


@triton.jit
def load_item(parts, items, item, BLOCK_TOKENS: tl.constexpr):
    """The part of a prefill's item, its lengths of query and context, and which block of its new tokens the item is.

    The last blocks see most: they start first.
    """
    part = tl.load(items.parts + item)
    query_len = tl.load(parts.query_lens + part)
    context_len = tl.load(parts.context_lens + part)
    block = tl.cdiv(query_len, BLOCK_TOKENS) - 1 - tl.load(items.chunks + item)
    return part, query_len, context_len, block


@triton.jit
def weigh(scores, highest, weight, scale_log2):
    """Weigh one block's scores, (rows, block), in an online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867).

    Returns the block's probabilities up to a factor, what the sum of the blocks before shrinks by, and the new state:
    the highest scaled score and the sum of weights, (rows,) each.
    """
    # Scaled after the maximum, so that scaling and subtraction are one instruction.
    new_highest = tl.maximum(highest, tl.max(scores, 1) * scale_log2)
    rescale = tl.exp2(highest - new_highest)
    probability = tl.exp2(scores * scale_log2 - new_highest[:, None])
    weight = weight * rescale + tl.sum(probability, 1)
    return probability, rescale, new_highest, weight


@triton.jit
def add_share(acc, highest, weight, result, lse):
    """Add one share's result, (rows, dims), weighed by its log-sum-exp, to the sum of the shares before it."""
    new_highest = tl.maximum(highest, lse)
    rescale, share = tl.exp2(highest - new_highest), tl.exp2(lse - new_highest)
    weight = weight * rescale + share
    acc = acc * rescale[:, None] + result * share[:, None]
    return acc, new_highest, weight


def plan_decodes(parts: StepParts, items: WorkItems, window: int | None) -> None:
    """Cut the context of each decoding part into chunks: equal for all parts, `num_decode_items` of them at most.

    However much room `items` has: so many programs will look for them.
    """
    capacity = num_decode_items(parts.num_parts)
    _launch_plan(parts, items, capacity, window=window or 0, block_tokens=0, min_query_len=1)


def plan_prefills(parts: StepParts, items: WorkItems, block_tokens: int, min_query_len: int = 2) -> None:
    """Cut the new tokens of each part with `min_query_len` of them or more into blocks of `block_tokens`."""
    _launch_plan(parts, items, len(items.parts), window=0, block_tokens=block_tokens, min_query_len=min_query_len)


def _launch_plan(
    parts: StepParts, items: WorkItems, capacity: int, *, window: int, block_tokens: int, min_query_len: int
) -> None:
    _plan_work[(triton.cdiv(capacity, _ITEMS_A_PROGRAM),)](
        parts, items, parts.num_parts, window, capacity, BLOCK_TOKENS=block_tokens, MIN_QUERY_LEN=min_query_len,
        MIN_CHUNK=MIN_CHUNK, BLOCK=triton.next_power_of_2(parts.num_parts), ITEM_BLOCK=_ITEMS_A_PROGRAM,
        num_warps=8, **launch_options(parts.rows.device),
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_parts", "capacity"])
def _plan_work(
    parts, items, num_parts, window, capacity, BLOCK_TOKENS: tl.constexpr, MIN_QUERY_LEN: tl.constexpr,
    MIN_CHUNK: tl.constexpr, BLOCK: tl.constexpr, ITEM_BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: a block of items. BLOCK_TOKENS > 0 plans prefills, else decodes.

    Each counts the chunks of all parts for itself: with 256 parts one program alone takes 36 µs of a step.
    """
    wait_for_inputs(PDL)
    part = tl.arange(0, BLOCK)
    exists = part < num_parts
    query_len = tl.load(parts.query_lens + part, mask=exists, other=0)
    if BLOCK_TOKENS > 0:
        num_tokens = tl.where(query_len >= MIN_QUERY_LEN, query_len, 0)
        chunk_size = BLOCK_TOKENS
    else:
        context_len = tl.load(parts.context_lens + part, mask=exists, other=0)
        if window > 0:
            context_len = tl.minimum(context_len, window)
        num_tokens = tl.where(query_len == 1, context_len, 0)
        # Rounding each part up to whole chunks adds at most one a part, so the items fit their room.
        safe_size = tl.maximum(tl.cdiv(tl.sum(num_tokens), capacity - num_parts), 1)
        chunk_size = tl.cdiv(safe_size, MIN_CHUNK) * MIN_CHUNK
        # It mostly adds less. The shorter the last chunks to end, the less the memory waits for them alone.
        for eighths in tl.static_range(7, 3, -1):
            size = tl.cdiv(safe_size * eighths, 8 * MIN_CHUNK) * MIN_CHUNK
            fits = tl.sum(tl.cdiv(num_tokens, size)) <= capacity
            chunk_size = tl.where(fits, size, chunk_size)
    num_chunks = tl.cdiv(num_tokens, chunk_size)
    ends = tl.cumsum(num_chunks, 0)
    if tl.program_id(0) == 0:
        tl.store(items.first_items + part, ends - num_chunks, mask=exists)
        tl.store(items.summary, tl.sum(num_chunks))
        tl.store(items.summary + 1, chunk_size)
    item = tl.program_id(0) * ITEM_BLOCK + tl.arange(0, ITEM_BLOCK)
    is_behind = ends[None, :] <= item[:, None]
    chunk = item - tl.max(tl.where(is_behind, ends[None, :], 0), 1)
    tl.store(items.parts + item, tl.sum(is_behind.to(tl.int32), 1), mask=item < capacity)
    tl.store(items.chunks + item, chunk, mask=item < capacity)
