"""What stands around attention to latents: norms, RoPE, the write into pages, and each head's own products."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from llm.kernels.launch import launch_options, most_stages, num_warps, wait_for_inputs
from llm.kernels.norm import Norm, normalised

_FEW_ROWS, _MANY_ROWS = 16, 64
_OUTPUTS, _LEAST_OUTPUTS, _TILE_K, _NUM_STAGES = 128, 32, 64, 3
_ENOUGH_PROGRAMS = 256
"""Of one block of tokens: with fewer the chip is not full, and narrower blocks of outputs make more."""


@dataclass(frozen=True, slots=True)
class LatentRows:
    """Where the tokens of a step belong, and how they turn.

    Attributes:
        pages: (pages, page_size, 1, rank + rope_dim).
        page_tables: (rows, pages a row) int32.
        token_rows, positions: (tokens,) int32, row and position of each token's sequence.
        rope_table: (2, max_seq_len, rope_dim / 2) float32, cosines then sines.
        is_interleaved: neighbouring numbers turn together, not those of the two halves. They are written as halves.
    """

    pages: torch.Tensor
    page_tables: torch.Tensor
    token_rows: torch.Tensor
    positions: torch.Tensor
    rope_table: torch.Tensor
    is_interleaved: bool


def store_latents(rows: LatentRows, projected: torch.Tensor, first: int, norm: Norm) -> None:
    """Store each token's latent, normalised, and what turns of its key.

    Args:
        projected: (tokens, …), contiguous: the latent from column `first` on, then what turns.
        norm: of the latent.
    """
    rank, num_pairs = len(norm.weight), rows.rope_table.shape[2]
    block = triton.next_power_of_2(rank)
    _store_latents[(len(projected),)](
        projected, norm.weight, norm.eps, rows.pages, rows.page_tables, rows.token_rows, rows.positions,
        rows.rope_table, projected.stride(0), first, rows.page_tables.stride(0), rows.rope_table.stride(0), RANK=rank,
        BLOCK=block, NUM_PAIRS=num_pairs, PAIR_BLOCK=triton.next_power_of_2(num_pairs), PAGE_SIZE=rows.pages.shape[1],
        INTERLEAVED=rows.is_interleaved, num_warps=num_warps(block), **launch_options(projected.device),
    )  # fmt: skip


def normalise_columns(projected: torch.Tensor, norm: Norm) -> torch.Tensor:
    """The norm of the first columns of rows (rows, …), contiguous: as many as the norm has weights."""
    size = len(norm.weight)
    output = projected.new_empty(len(projected), size)
    block = triton.next_power_of_2(size)
    _normalise_columns[(len(projected),)](
        projected, norm.weight, norm.eps, output, projected.stride(0), SIZE=size, BLOCK=block,
        num_warps=num_warps(block), **launch_options(projected.device),
    )  # fmt: skip
    return output


def turn_queries(rows: LatentRows, queries: torch.Tensor, output: torch.Tensor) -> None:
    """Turn the last numbers of each head's query.

    Args:
        queries: (tokens, num_heads, plain_dim + rope_dim), heads one behind the other.
        output: (tokens, num_heads, rank + rope_dim), contiguous; its last numbers are written.
    """
    num_tokens, num_heads, width = queries.shape
    num_pairs = rows.rope_table.shape[2]
    _turn_queries[(num_tokens,)](
        queries, output, rows.positions, rows.rope_table, queries.stride(0), rows.rope_table.stride(0),
        NUM_HEADS=num_heads, HEAD_BLOCK=triton.next_power_of_2(num_heads), WIDTH=width, OUTPUT_WIDTH=output.shape[2],
        NUM_PAIRS=num_pairs, PAIR_BLOCK=triton.next_power_of_2(num_pairs), INTERLEAVED=rows.is_interleaved,
        num_warps=4, **launch_options(queries.device),
    )  # fmt: skip


def head_product(x: torch.Tensor, weight: torch.Tensor, output: torch.Tensor, *, deterministic: bool) -> None:
    """Multiply each head's rows with that head's own matrix. A row's result depends on that row alone, sums' order too.

    Args:
        x: (tokens, num_heads, in), a view whose numbers are adjacent.
        weight: (num_heads, out, in), a view of any strides.
        output: (tokens, num_heads, out), a view whose numbers are adjacent.
        deterministic: the order of a sum does not depend on the number of tokens either.
    """
    num_tokens, num_heads, num_inputs = x.shape
    num_outputs = output.shape[2]
    rows = _FEW_ROWS if deterministic or num_tokens <= _FEW_ROWS else _MANY_ROWS
    outputs = min(_OUTPUTS, max(16, triton.next_power_of_2(num_outputs)))
    can_be_narrower = rows == _FEW_ROWS
    while can_be_narrower and outputs > _LEAST_OUTPUTS and num_heads * num_outputs < _ENOUGH_PROGRAMS * outputs:
        outputs //= 2
    tile_k = min(_TILE_K, max(16, triton.next_power_of_2(num_inputs)))
    num_stages = min(_NUM_STAGES, most_stages(x.device, (rows + outputs) * tile_k * x.itemsize))
    grid = (triton.cdiv(num_outputs, outputs), num_heads, triton.cdiv(num_tokens, rows))
    _head_product[grid](
        x, weight, output, num_tokens, x.stride(0), output.stride(0), X_HEAD=x.stride(1), OUTPUT_HEAD=output.stride(1),
        WEIGHT_HEAD=weight.stride(0), WEIGHT_OUT=weight.stride(1), WEIGHT_IN=weight.stride(2), IN=num_inputs,
        OUT=num_outputs, ROWS=rows, OUTPUTS=outputs, TILE_K=tile_k, num_warps=4, num_stages=num_stages,
        **launch_options(x.device),
    )  # fmt: skip


@triton.jit
def _load_turned(
    source, mask, pair, rope_table, position, sin_offset, dtype: tl.constexpr, NUM_PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Numbers (…, pairs) from `source` on, turned: the first of each pair, and the second."""
    first, second = (2 * pair, 2 * pair + 1) if INTERLEAVED else (pair, pair + NUM_PAIRS)
    one = tl.load(source + first, mask=mask, other=0.0).to(tl.float32)
    two = tl.load(source + second, mask=mask, other=0.0).to(tl.float32)
    angle = rope_table + position.to(tl.int64) * NUM_PAIRS + pair
    cos = tl.load(angle, mask=pair < NUM_PAIRS, other=1.0)
    sin = tl.load(angle + sin_offset, mask=pair < NUM_PAIRS, other=0.0)
    return (one * cos - two * sin).to(dtype), (two * cos + one * sin).to(dtype)


@triton.jit
def _store_latents(
    projected, norm, eps, pages, page_tables, token_rows, positions, rope_table, stride, first, table_stride,
    sin_offset, RANK: tl.constexpr, BLOCK: tl.constexpr, NUM_PAIRS: tl.constexpr, PAIR_BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr, INTERLEAVED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: one token."""
    dim = tl.arange(0, BLOCK)
    factor = tl.load(norm + dim, mask=dim < RANK, other=0.0)
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + token)
    row = tl.load(token_rows + token).to(tl.int64)
    page = tl.load(page_tables + row * table_stride + position // PAGE_SIZE).to(tl.int64)
    target = pages + (page * PAGE_SIZE + position % PAGE_SIZE) * (RANK + 2 * NUM_PAIRS)
    source = projected + token * stride + first
    latent = normalised(tl.load(source + dim, mask=dim < RANK, other=0.0), factor, eps, RANK, None)
    tl.store(target + dim, latent, mask=dim < RANK)
    pair = tl.arange(0, PAIR_BLOCK)
    one, two = _load_turned(
        source + RANK, pair < NUM_PAIRS, pair, rope_table, position, sin_offset, pages.dtype.element_ty, NUM_PAIRS,
        INTERLEAVED,
    )  # fmt: skip
    tl.store(target + RANK + pair, one, mask=pair < NUM_PAIRS)
    tl.store(target + RANK + NUM_PAIRS + pair, two, mask=pair < NUM_PAIRS)


@triton.jit
def _normalise_columns(
    projected, norm, eps, output, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """Program: one row."""
    dim = tl.arange(0, BLOCK)
    factor = tl.load(norm + dim, mask=dim < SIZE, other=0.0)
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    x = tl.load(projected + row * stride + dim, mask=dim < SIZE, other=0.0)
    tl.store(output + row * SIZE + dim, normalised(x, factor, eps, SIZE, None), mask=dim < SIZE)


@triton.jit
def _turn_queries(
    queries, output, positions, rope_table, stride, sin_offset,
    NUM_HEADS: tl.constexpr, HEAD_BLOCK: tl.constexpr, WIDTH: tl.constexpr, OUTPUT_WIDTH: tl.constexpr,
    NUM_PAIRS: tl.constexpr, PAIR_BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: one token, all heads."""
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEAD_BLOCK)[:, None]
    pair = tl.arange(0, PAIR_BLOCK)[None, :]
    mask = (head < NUM_HEADS) & (pair < NUM_PAIRS)
    source = queries + token * stride + head * WIDTH + (WIDTH - 2 * NUM_PAIRS)
    one, two = _load_turned(
        source, mask, pair, rope_table, tl.load(positions + token), sin_offset, output.dtype.element_ty, NUM_PAIRS,
        INTERLEAVED,
    )  # fmt: skip
    target = output + (token * NUM_HEADS + head) * OUTPUT_WIDTH + (OUTPUT_WIDTH - 2 * NUM_PAIRS)
    tl.store(target + pair, one, mask=mask)
    tl.store(target + NUM_PAIRS + pair, two, mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _head_product(
    x, weight, output, num_tokens, x_stride, output_stride,
    X_HEAD: tl.constexpr, OUTPUT_HEAD: tl.constexpr, WEIGHT_HEAD: tl.constexpr, WEIGHT_OUT: tl.constexpr,
    WEIGHT_IN: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
    TILE_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (block of outputs, head, block of tokens)."""
    wait_for_inputs(PDL)
    head = tl.program_id(1).to(tl.int64)
    token = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    exists = token < num_tokens
    out = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = x + token.to(tl.int64)[:, None] * x_stride + head * X_HEAD
    column = weight + head * WEIGHT_HEAD + out[None, :] * WEIGHT_OUT
    acc = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for start in range(0, IN, TILE_K):
        k = start + tl.arange(0, TILE_K)
        rows = tl.load(row + k[None, :], mask=exists[:, None] & (k < IN)[None, :], other=0.0)
        factors = tl.load(column + k[:, None] * WEIGHT_IN, mask=(k < IN)[:, None] & (out < OUT)[None, :], other=0.0)
        acc = tl.dot(rows, factors, acc, input_precision="ieee")
    target = output + token.to(tl.int64)[:, None] * output_stride + head * OUTPUT_HEAD + out[None, :]
    tl.store(target, acc.to(output.dtype.element_ty), mask=exists[:, None] & (out < OUT)[None, :])
