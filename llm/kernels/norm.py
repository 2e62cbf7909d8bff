"""Token embedding, residual addition and RMSNorm."""

import torch
import triton
import triton.language as tl

from llm.kernels.launch import launch_options, wait_for_inputs


def add_rms_norm(
    residual: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float, output: torch.Tensor
) -> None:
    """Add `delta` to the residual stream in place and write its RMSNorm (Zhang & Sennrich 2019) to `output`.

    Args:
        residual: (tokens, hidden_size), contiguous, changed in place.
        delta: same shape, or None to add nothing.
        output: same shape.
    """
    num_tokens, hidden_size = residual.shape
    block = triton.next_power_of_2(hidden_size)
    _add_rms_norm[(num_tokens,)](
        residual, residual if delta is None else delta, weight, output, eps, HIDDEN=hidden_size, BLOCK=block,
        HAS_DELTA=delta is not None, num_warps=_num_warps(block), **launch_options(residual.device),
    )  # fmt: skip


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
        num_warps=_num_warps(block), **launch_options(residual.device),
    )  # fmt: skip


def _num_warps(block: int) -> int:
    """One warp for each 512 elements: 16 a thread, two loads of 16 bytes."""
    return min(max(block // 512, 1), 16)


@triton.jit
def _add_rms_norm(
    residual, delta, weight, output, eps,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, HAS_DELTA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: one token. Computed in float32, rounded where `RMSNorm` rounds."""
    dim = tl.arange(0, BLOCK)
    mask = dim < HIDDEN
    scale = tl.load(weight + dim, mask=mask, other=0.0)
    wait_for_inputs(PDL)
    offsets = tl.program_id(0).to(tl.int64) * HIDDEN + dim
    x = tl.load(residual + offsets, mask=mask, other=0.0)
    if HAS_DELTA:
        x += tl.load(delta + offsets, mask=mask, other=0.0)
        tl.store(residual + offsets, x, mask=mask)
    wide = x.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, 0) / HIDDEN + eps)
    tl.store(output + offsets, (wide * inverse).to(x.dtype) * scale, mask=mask)


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
