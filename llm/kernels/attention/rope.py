"""QK-norm, rotary embedding and the write into the pages, in one pass over a step's projections."""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from llm.kernels.attention.work import PagedCache
from llm.kernels.launch import launch_options, wait_for_inputs
from llm.kernels.norm import Norm
from llm.kernels.quantization import ScaledProduct, load_product, scale_arguments, to_format, unscaled


class _Heads(NamedTuple):
    """Heads of a projection to queries, keys and values, a constant of compiled kernels.

    Attributes:
        num_heads, num_kv_heads: number of heads of queries, and of keys or values.
        query_parts: 2 where a gate stands behind each query, else 1.
        half: half the numbers of a head.
        num_pairs: pairs of numbers of a head that turn.
        half_block: `half` rounded up to a size that tiles have.
        block_heads: heads of one program.
    """

    num_heads: int
    num_kv_heads: int
    query_parts: int
    half: int
    num_pairs: int
    half_block: int
    block_heads: int


def rope_and_store(
    qkv: torch.Tensor | ScaledProduct,
    query: torch.Tensor,
    kv_pages: torch.Tensor,
    page_tables: torch.Tensor,
    token_rows: torch.Tensor,
    positions: torch.Tensor,
    rope_table: torch.Tensor,
    norms: tuple[Norm, Norm] | None,
    query_scales: torch.Tensor | None = None,
) -> None:
    """Normalise and rotate queries and keys; write queries to `query`; store keys and values.

    Args:
        qkv: (tokens, (num_heads + 2 num_kv_heads) head_dim), contiguous: the heads' queries, keys, values; or as many
            more as there are query heads, where behind each query stands a gate, which is left alone.
        query: (tokens, num_heads, head_dim), contiguous.
        kv_pages: (2, pages, page_size, num_kv_heads, head_dim); 8 bits wide they take what is too large as their
            largest number.
        page_tables: (rows, pages a row) int32.
        token_rows, positions: (tokens,) int32, row and position of each token's sequence.
        rope_table: (2, max_seq_len, pairs) float32, cosines then sines: the first 2 pairs numbers of a head turn.
        norms: QK-norm over each head, of queries and of keys; None for none.
        query_scales: (max_seq_len,) float32, what queries are multiplied by behind everything else; None for nothing.
    """
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = kv_pages.shape[3]
    block_heads = math.gcd(math.gcd(num_heads, num_kv_heads), 8)  # a program never mixes queries, keys and values
    query_norm, key_norm = norms or (None, None)
    num_query_parts = (unscaled(qkv).shape[1] // head_dim - 2 * num_kv_heads) // num_heads
    _rope_and_store[(num_tokens, (num_heads + 2 * num_kv_heads) // block_heads)](
        unscaled(qkv), query, PagedCache.of(kv_pages, page_tables), token_rows, positions, rope_table,
        None if query_norm is None else query_norm.weight, None if key_norm is None else key_norm.weight,
        0.0 if query_norm is None else query_norm.eps, query_scales, rope_table.stride(0), **scale_arguments(qkv),
        HEADS=_Heads(
            num_heads, num_kv_heads, num_query_parts, head_dim // 2, rope_table.shape[2],
            triton.next_power_of_2(head_dim // 2), block_heads,
        ),
        PAGE_SIZE=kv_pages.shape[2], OFFSET=None if query_norm is None else query_norm.offset, num_warps=2,
        **launch_options(query.device),
    )  # fmt: skip


@triton.jit
def _rope_and_store(
    qkv, query, cache, token_rows, positions, rope_table, query_norm, key_norm, norm_eps, query_scales, sin_offset,
    row_scales, scales, bias, HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, OFFSET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (token, block of heads): each head as two halves, of which the numbers that turn do so in pairs."""
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    first_head = tl.program_id(1) * HEADS.block_heads
    head = first_head + tl.arange(0, HEADS.block_heads)
    dim = tl.arange(0, HEADS.half_block)
    mask = (dim[None, :] < HEADS.half) & (head[:, None] >= 0)
    first_dim, second_dim = dim, dim + HEADS.half
    if HEADS.num_pairs < HEADS.half:  # those that turn in pairs, then the others in pairs that stay as they are
        first_dim = tl.where(dim < HEADS.num_pairs, dim, dim + HEADS.num_pairs)
        second_dim = tl.where(dim < HEADS.num_pairs, dim + HEADS.num_pairs, dim + HEADS.half)
    column = head[:, None] * (2 * HEADS.half) + first_dim[None, :]
    second_column = head[:, None] * (2 * HEADS.half) + second_dim[None, :]
    source = token * ((HEADS.query_parts * HEADS.num_heads + 2 * HEADS.num_kv_heads) * 2 * HEADS.half)
    dtype: tl.constexpr = query.dtype.element_ty
    # Gates stand between queries, and in front of the keys.
    num_skipped = (tl.minimum(head, HEADS.num_heads)[:, None] * (HEADS.query_parts - 1)) * (2 * HEADS.half)
    first = load_product(
        qkv, source + num_skipped + column, mask, token, num_skipped + column, row_scales, scales, bias, dtype
    )
    second_place = num_skipped + second_column
    second = load_product(qkv, source + second_place, mask, token, second_place, row_scales, scales, bias, dtype)
    position = tl.load(positions + token)
    is_query = first_head < HEADS.num_heads
    is_value = first_head >= HEADS.num_heads + HEADS.num_kv_heads
    if not is_value:
        first, second = first.to(tl.float32), second.to(tl.float32)
        if query_norm is not None:
            norm = query_norm if is_query else key_norm
            mean_square = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HEADS.half)
            inverse = tl.rsqrt(mean_square + norm_eps)[:, None]
            weight_1 = tl.load(norm + first_dim, mask=dim < HEADS.half, other=0.0)[None, :]
            weight_2 = tl.load(norm + second_dim, mask=dim < HEADS.half, other=0.0)[None, :]
            if OFFSET is None:  # rounded before and after the weight, or once, as `RMSNorm` does
                first = ((first * inverse).to(dtype) * weight_1).to(dtype).to(tl.float32)
                second = ((second * inverse).to(dtype) * weight_2).to(dtype).to(tl.float32)
            else:
                first = (first * inverse * (weight_1.to(tl.float32) + OFFSET)).to(dtype).to(tl.float32)
                second = (second * inverse * (weight_2.to(tl.float32) + OFFSET)).to(dtype).to(tl.float32)
        angle = rope_table + position.to(tl.int64) * HEADS.num_pairs + dim
        cos = tl.load(angle, mask=dim < HEADS.num_pairs, other=1.0)[None, :]
        sin = tl.load(angle + sin_offset, mask=dim < HEADS.num_pairs, other=0.0)[None, :]
        rotated = first * cos - second * sin
        second = (second * cos + first * sin).to(dtype)
        first = rotated.to(dtype)
    if is_query:
        if query_scales is not None:
            scale = tl.load(query_scales + position).to(dtype)
            first *= scale
            second *= scale
        rotated_query = query + token * (HEADS.num_heads * 2 * HEADS.half)
        tl.store(rotated_query + column, first, mask=mask)
        tl.store(rotated_query + second_column, second, mask=mask)
    else:
        row = tl.load(token_rows + token).to(tl.int64)
        page = tl.load(cache.tables + row * cache.table_stride + position // PAGE_SIZE).to(tl.int64)
        slot = page * PAGE_SIZE + position % PAGE_SIZE
        pages = cache.value_pages if is_value else cache.key_pages
        kv_head = (head - HEADS.num_heads) % HEADS.num_kv_heads
        target = pages + (slot * HEADS.num_kv_heads + kv_head[:, None]) * (2 * HEADS.half)
        tl.store(target + first_dim[None, :], to_format(first, cache.key_pages.dtype.element_ty), mask=mask)
        tl.store(target + second_dim[None, :], to_format(second, cache.key_pages.dtype.element_ty), mask=mask)
