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
)


@dataclass(slots=True)
class ResidualStream:
    """What the layers of a step read and add to.

    Attributes:
        total: (tokens, hidden_size), contiguous.
        pending: a product that is still to be added, which the next `rms_norm` does; None for none.
    """

    total: torch.Tensor
    pending: ScaledProduct | None = None


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm (Zhang & Sennrich 2019): weight (hidden_size,), and what is added to the mean square."""

    weight: torch.Tensor
    eps: float


def rms_norm(stream: ResidualStream, norm: Norm, output: torch.Tensor | EightBitRows) -> None:
    """Add what is pending to the residual stream, in place, and write its norm to `output`, (tokens, hidden_size)."""
    total, pending = stream.total, stream.pending
    num_tokens, hidden_size = total.shape
    block = triton.next_power_of_2(hidden_size)
    _rms_norm[(num_tokens,)](
        total, None if pending is None else pending.values, norm.weight, norm.eps, *destination(output),
        **scale_arguments(pending), HIDDEN=hidden_size, BLOCK=block, num_warps=num_warps(block),
        **launch_options(total.device),
    )  # fmt: skip
    stream.pending = None


def embed_tokens(
    token_ids: torch.Tensor,
    last_token_ids: torch.Tensor,
    token_rows: torch.Tensor,
    table: torch.Tensor,
    residual: torch.Tensor,
) -> None:
    """Write each token's embedding to `residual`.

    Args:
        token_ids: (tokens,) int32; a negative one stands for the token that its row drew last.
        last_token_ids: (rows,) int32.
        token_rows: (tokens,) int32.
        table: (vocab_size, hidden_size).
        residual: (tokens, hidden_size), contiguous.
    """
    num_tokens, hidden_size = residual.shape
    block = triton.next_power_of_2(hidden_size)
    _embed_tokens[(num_tokens,)](
        token_ids, last_token_ids, token_rows, table, residual, HIDDEN=hidden_size, BLOCK=block,
        num_warps=num_warps(block), **launch_options(residual.device),
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
def _rms_norm(
    total, pending, weight, eps, output, output_scales, row_scales, scales, bias,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: one token. Computed in float32, rounded where `RMSNorm` rounds."""
    dim = tl.arange(0, BLOCK)
    mask = dim < HIDDEN
    factor = tl.load(weight + dim, mask=mask, other=0.0)
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    offsets = token * HIDDEN + dim
    x = tl.load(total + offsets, mask=mask, other=0.0)
    if pending is not None:
        x += load_product(pending, offsets, mask, token, dim, row_scales, scales, bias, x.dtype)
        tl.store(total + offsets, x, mask=mask)
    wide = x.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, 0) / HIDDEN + eps)
    store_row((wide * inverse).to(x.dtype) * factor, output, output_scales, token, offsets, mask)


@triton.jit
def _embed_tokens(
    token_ids, last_token_ids, token_rows, table, residual,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: one token."""
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    token_id = tl.load(token_ids + token)
    if token_id < 0:
        token_id = tl.load(last_token_ids + tl.load(token_rows + token))
    dim = tl.arange(0, BLOCK)
    embedding = tl.load(table + token_id.to(tl.int64) * HIDDEN + dim, mask=dim < HIDDEN)
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
