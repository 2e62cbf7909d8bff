"""QK-norm, rotary embedding and the write into the pages, in one pass over a step's projections."""

import math

import torch
import triton
import triton.language as tl

from llm.kernels.launch import launch_options, wait_for_inputs
from llm.kernels.norm import Norm
from llm.kernels.quantization import ScaledProduct, load_product, scale_arguments, to_format, unscaled


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
        unscaled(qkv), query, kv_pages[0], kv_pages[1], page_tables, token_rows, positions, rope_table,
        None if query_norm is None else query_norm.weight, None if key_norm is None else key_norm.weight,
        0.0 if query_norm is None else query_norm.eps, query_scales, page_tables.stride(0), rope_table.stride(0),
        **scale_arguments(qkv), NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, QUERY_PARTS=num_query_parts,
        HALF=head_dim // 2, NUM_PAIRS=rope_table.shape[2], HALF_BLOCK=triton.next_power_of_2(head_dim // 2),
        BLOCK_HEADS=block_heads, PAGE_SIZE=kv_pages.shape[2],
        OFFSET=None if query_norm is None else query_norm.offset, num_warps=2, **launch_options(query.device),
    )  # fmt: skip


@triton.jit
def _rope_and_store(
    qkv, query, keys, values, page_tables, token_rows, positions, rope_table, query_norm, key_norm, norm_eps,
    query_scales, table_stride, sin_offset, row_scales, scales, bias,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, QUERY_PARTS: tl.constexpr, HALF: tl.constexpr,
    NUM_PAIRS: tl.constexpr, HALF_BLOCK: tl.constexpr, BLOCK_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr,
    OFFSET: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (token, block of heads): each head as two halves, of which the numbers that turn do so in pairs."""
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    first_head = tl.program_id(1) * BLOCK_HEADS
    head = first_head + tl.arange(0, BLOCK_HEADS)
    dim = tl.arange(0, HALF_BLOCK)
    mask = (dim[None, :] < HALF) & (head[:, None] >= 0)
    first_dim, second_dim = dim, dim + HALF
    if NUM_PAIRS < HALF:  # the first 2 NUM_PAIRS numbers in pairs, then the others in pairs that stay as they are
        first_dim = tl.where(dim < NUM_PAIRS, dim, dim + NUM_PAIRS)
        second_dim = tl.where(dim < NUM_PAIRS, dim + NUM_PAIRS, dim + HALF)
    column = head[:, None] * (2 * HALF) + first_dim[None, :]
    second_column = head[:, None] * (2 * HALF) + second_dim[None, :]
    source = token * ((QUERY_PARTS * NUM_HEADS + 2 * NUM_KV_HEADS) * 2 * HALF)
    dtype: tl.constexpr = query.dtype.element_ty
    # Gates stand between queries, and in front of the keys.
    num_skipped = (tl.minimum(head, NUM_HEADS)[:, None] * (QUERY_PARTS - 1)) * (2 * HALF)
    first = load_product(
        qkv, source + num_skipped + column, mask, token, num_skipped + column, row_scales, scales, bias, dtype
    )
    second_place = num_skipped + second_column
    second = load_product(qkv, source + second_place, mask, token, second_place, row_scales, scales, bias, dtype)
    position = tl.load(positions + token)
    is_query = first_head < NUM_HEADS
    is_value = first_head >= NUM_HEADS + NUM_KV_HEADS
    if not is_value:
        first, second = first.to(tl.float32), second.to(tl.float32)
        if query_norm is not None:
            norm = query_norm if is_query else key_norm
            mean_square = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF)
            inverse = tl.rsqrt(mean_square + norm_eps)[:, None]
            weight_1 = tl.load(norm + first_dim, mask=dim < HALF, other=0.0)[None, :]
            weight_2 = tl.load(norm + second_dim, mask=dim < HALF, other=0.0)[None, :]
            if OFFSET is None:  # rounded before and after the weight, or once, as `RMSNorm` does
                first = ((first * inverse).to(dtype) * weight_1).to(dtype).to(tl.float32)
                second = ((second * inverse).to(dtype) * weight_2).to(dtype).to(tl.float32)
            else:
                first = (first * inverse * (weight_1.to(tl.float32) + OFFSET)).to(dtype).to(tl.float32)
                second = (second * inverse * (weight_2.to(tl.float32) + OFFSET)).to(dtype).to(tl.float32)
        angle = rope_table + position.to(tl.int64) * NUM_PAIRS + dim
        cos = tl.load(angle, mask=dim < NUM_PAIRS, other=1.0)[None, :]
        sin = tl.load(angle + sin_offset, mask=dim < NUM_PAIRS, other=0.0)[None, :]
        rotated = first * cos - second * sin
        second = (second * cos + first * sin).to(dtype)
        first = rotated.to(dtype)
    if is_query:
        if query_scales is not None:
            scale = tl.load(query_scales + position).to(dtype)
            first *= scale
            second *= scale
        rotated_query = query + token * (NUM_HEADS * 2 * HALF)
        tl.store(rotated_query + column, first, mask=mask)
        tl.store(rotated_query + second_column, second, mask=mask)
    else:
        row = tl.load(token_rows + token).to(tl.int64)
        page = tl.load(page_tables + row * table_stride + position // PAGE_SIZE).to(tl.int64)
        slot = page * PAGE_SIZE + position % PAGE_SIZE
        pages = values if is_value else keys
        kv_head = (head - NUM_HEADS) % NUM_KV_HEADS
        target = pages + (slot * NUM_KV_HEADS + kv_head[:, None]) * (2 * HALF)
        tl.store(target + first_dim[None, :], to_format(first, keys.dtype.element_ty), mask=mask)
        tl.store(target + second_dim[None, :], to_format(second, keys.dtype.element_ty), mask=mask)
