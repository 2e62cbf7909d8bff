"""Token embedding, and the residual stream with its norms."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from llm.kernels.launch import launch_options, num_warps, wait_for_inputs
from llm.kernels.quantization import (
    EightBitRows,
    ScaledProduct,
    destination,
    load_product,
    scale_arguments,
    store_row,
    unscaled,
)


@dataclass(slots=True)
class ResidualStream:
    """What the layers of a step read and add to.

    Attributes:
        total: (tokens, hidden_size), contiguous.
        pending: a product that is still to be added, which the next `rms_norm` does; None for none.
        pending_norm: what is added is the product's norm; None for the product itself.
    """

    total: torch.Tensor
    pending: "torch.Tensor | ScaledProduct | None" = None
    pending_norm: "Norm | None" = None


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm (Zhang & Sennrich 2019).

    Attributes:
        weight: (size,).
        eps: added to the mean square.
        offset: see `llm.models.layers.RMSNorm`.
    """

    weight: torch.Tensor
    eps: float
    offset: float | None = None


def rms_norm(stream: ResidualStream, norm: Norm, output: torch.Tensor | EightBitRows) -> None:
    """Add what is pending to the residual stream, in place, and write its norm to `output`, (tokens, hidden_size)."""
    total, pending, pending_norm = stream.total, stream.pending, stream.pending_norm
    num_tokens, hidden_size = total.shape
    block = triton.next_power_of_2(hidden_size)
    _rms_norm[(num_tokens,)](
        total, None if pending is None else unscaled(pending), norm.weight, norm.eps, *destination(output),
        **scale_arguments(pending), pending_weight=None if pending_norm is None else pending_norm.weight,
        pending_eps=None if pending_norm is None else pending_norm.eps, HIDDEN=hidden_size, BLOCK=block,
        OFFSET=norm.offset, num_warps=num_warps(block), **launch_options(total.device),
    )  # fmt: skip
    assert pending_norm is None or pending_norm.offset == norm.offset, "all norms of a model are of one kind"
    stream.pending = stream.pending_norm = None


def embed_tokens(
    token_ids: torch.Tensor,
    last_token_ids: torch.Tensor,
    token_rows: torch.Tensor,
    table: torch.Tensor,
    residual: torch.Tensor,
    scale: float | None = None,
    first_id: int | None = None,
) -> None:
    """Write each token's embedding to `residual`; zeros for one that the table does not have.

    Args:
        token_ids: (tokens,) int32; a negative one stands for the token that its row drew last.
        last_token_ids: (rows,) int32.
        token_rows: (tokens,) int32.
        table: (vocab_size, hidden_size), or a part of its rows.
        residual: (tokens, hidden_size), contiguous.
        scale: embeddings are multiplied by it, rounded to their format; None for as they are.
        first_id: token of the table's first row, where it is a part; None for a whole table.
    """
    scale = None if scale is None else float(torch.tensor(scale, dtype=table.dtype, device="cpu"))
    num_tokens, hidden_size = residual.shape
    block = triton.next_power_of_2(hidden_size)
    _embed_tokens[(num_tokens,)](
        token_ids, last_token_ids, token_rows, table, residual, scale, first_id,
        None if first_id is None else len(table), HIDDEN=hidden_size, BLOCK=block, num_warps=num_warps(block),
        **launch_options(residual.device),
    )  # fmt: skip


def keep_tokens(
    stream: ResidualStream, attended: torch.Tensor, kept: torch.Tensor
) -> tuple[ResidualStream, torch.Tensor]:
    """The stream and attention's outputs, (tokens, size), of the tokens at `kept`, (num_kept,) int32, alone."""
    assert stream.pending is None, "a norm comes between two additions"
    (_, hidden_size), (_, size), num_kept = stream.total.shape, attended.shape, len(kept)
    total, output = stream.total.new_empty(num_kept, hidden_size), attended.new_empty(num_kept, size)
    block = triton.next_power_of_2(max(hidden_size, size))
    _keep_tokens[(num_kept,)](
        stream.total, attended, kept, total, output, HIDDEN=hidden_size, SIZE=size, BLOCK=block,
        num_warps=num_warps(block), **launch_options(total.device),
    )  # fmt: skip
    return ResidualStream(total), output


@triton.jit
def normalised(x, factor, eps, SIZE: tl.constexpr, OFFSET: tl.constexpr):
    """RMSNorm of a row of SIZE numbers, zeros behind them. Computed in float32, rounded where `RMSNorm` rounds."""
    wide = x.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    if OFFSET is None:
        normed = (wide * inverse).to(x.dtype) * factor
    else:
        normed = (wide * inverse * (factor.to(tl.float32) + OFFSET)).to(x.dtype)
    return normed


@triton.jit
def _rms_norm(
    total, pending, weight, eps, output, output_scales, row_scales, scales, bias, pending_weight, pending_eps,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, OFFSET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: one token."""
    dim = tl.arange(0, BLOCK)
    mask = dim < HIDDEN
    factor = tl.load(weight + dim, mask=mask, other=0.0)
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    offsets = token * HIDDEN + dim
    x = tl.load(total + offsets, mask=mask, other=0.0)
    if pending is not None:
        added = load_product(pending, offsets, mask, token, dim, row_scales, scales, bias, x.dtype)
        if pending_weight is not None:
            added_factor = tl.load(pending_weight + dim, mask=mask, other=0.0)
            added = normalised(added, added_factor, pending_eps, HIDDEN, OFFSET)
        x += added
        tl.store(total + offsets, x, mask=mask)
    store_row(normalised(x, factor, eps, HIDDEN, OFFSET), output, output_scales, token, offsets, mask)


@triton.jit
def _embed_tokens(
    token_ids, last_token_ids, token_rows, table, residual, scale, first_id, num_ids,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: one token."""
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    token_id = tl.load(token_ids + token)
    if token_id < 0:
        token_id = tl.load(last_token_ids + tl.load(token_rows + token))
    dim = tl.arange(0, BLOCK)
    mask = dim < HIDDEN
    if first_id is not None:
        token_id -= first_id
        mask &= (token_id >= 0) & (token_id < num_ids)
    embedding = tl.load(table + token_id.to(tl.int64) * HIDDEN + dim, mask=mask, other=0.0)
    if scale is not None:
        embedding = (embedding.to(tl.float32) * scale).to(embedding.dtype)
    tl.store(residual + token * HIDDEN + dim, embedding, mask=dim < HIDDEN)


@triton.jit
def _keep_tokens(
    total, attended, kept, kept_total, kept_attended,
    HIDDEN: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: one token that is kept."""
    wait_for_inputs(PDL)
    place = tl.program_id(0).to(tl.int64)
    token = tl.load(kept + place).to(tl.int64)
    dim = tl.arange(0, BLOCK)
    state = tl.load(total + token * HIDDEN + dim, mask=dim < HIDDEN)
    tl.store(kept_total + place * HIDDEN + dim, state, mask=dim < HIDDEN)
    heads = tl.load(attended + token * SIZE + dim, mask=dim < SIZE)
    tl.store(kept_attended + place * SIZE + dim, heads, mask=dim < SIZE)
