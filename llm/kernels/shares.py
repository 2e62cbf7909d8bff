"""The share that each token takes of an expert that all tokens go to."""

import torch
import triton
import triton.language as tl

from llm.kernels.launch import launch_options, num_warps, wait_for_inputs
from llm.kernels.norm import Norm, ResidualStream, normalised
from llm.kernels.quantization import EightBitRows, destination


def scale_by_share(
    stream: ResidualStream,
    norm: Norm,
    gate: torch.Tensor,
    rows: torch.Tensor | EightBitRows,
    more: torch.Tensor | None = None,
) -> None:
    """Scale each row by the sigmoid of its token's product with the gate, in place.

    Args:
        stream: whose norm counts; nothing may be pending on it.
        gate: (1, hidden_size).
        rows: (tokens, size), contiguous, of as many tokens as the stream has.
        more: (tokens, 1) float32, added to each token's product with the gate; None for nothing.
    """
    assert stream.pending is None, "the norm has been asked for before"
    values, scales = destination(rows)
    num_tokens, hidden_size = stream.total.shape
    size = values.shape[1]
    block = triton.next_power_of_2(hidden_size)
    _scale_by_share[(num_tokens,)](
        stream.total, norm.weight, norm.eps, gate, more, values, scales, HIDDEN=hidden_size, BLOCK=block,
        OFFSET=norm.offset, SIZE=size, SIZE_BLOCK=triton.next_power_of_2(size), num_warps=num_warps(block),
        **launch_options(values.device),
    )  # fmt: skip


@triton.jit
def _scale_by_share(
    total, weight, eps, gate, more, values, scales, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, OFFSET: tl.constexpr,
    SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: one token. Rounded where `ShareGate` rounds. Rows of 8 bits have their scale scaled."""
    dim = tl.arange(0, BLOCK)
    mask = dim < HIDDEN
    factor = tl.load(weight + dim, mask=mask, other=0.0)
    gates = tl.load(gate + dim, mask=mask, other=0.0).to(tl.float32)
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    x = tl.load(total + token * HIDDEN + dim, mask=mask, other=0.0)
    normed = normalised(x, factor, eps, HIDDEN, OFFSET).to(tl.float32)
    dtype: tl.constexpr = total.dtype.element_ty
    logit = tl.sum(normed * gates, 0).to(dtype).to(tl.float32)
    if more is not None:
        logit = (logit + tl.load(more + token)).to(dtype).to(tl.float32)
    share = (1 / (1 + tl.exp(-logit))).to(dtype)
    if scales is not None:
        tl.store(scales + token, tl.load(scales + token) * share.to(tl.float32))
    else:
        column = tl.arange(0, SIZE_BLOCK)
        place = values + token * SIZE + column
        tl.store(place, tl.load(place, mask=column < SIZE, other=0.0) * share, mask=column < SIZE)
