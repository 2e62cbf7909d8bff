"""Gates on what attention gives."""

import torch
import triton
import triton.language as tl

from llm.kernels.launch import launch_options, wait_for_inputs
from llm.kernels.quantization import ScaledProduct, load_product, scale_arguments, unscaled


def gate_heads(output: torch.Tensor, qkv: torch.Tensor | ScaledProduct) -> None:
    """Scale each head's output by the sigmoid of its gate, in place.

    Args:
        output: (tokens, num_heads, head_dim), contiguous.
        qkv: (tokens, width), contiguous: each head's query and behind it its gate, then keys and values.
    """
    num_tokens, num_heads, head_dim = output.shape
    numbers = unscaled(qkv)
    _gate_heads[(num_tokens, num_heads)](
        output, numbers, numbers.stride(0), **scale_arguments(qkv), NUM_HEADS=num_heads, HEAD_DIM=head_dim,
        BLOCK=triton.next_power_of_2(head_dim), num_warps=1, **launch_options(output.device),
    )  # fmt: skip


@triton.jit
def _gate_heads(
    output, qkv, stride, row_scales, scales, bias,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (token, head)."""
    wait_for_inputs(PDL)
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dim = tl.arange(0, BLOCK)
    mask = dim < HEAD_DIM
    dtype: tl.constexpr = output.dtype.element_ty
    column = (2 * head + 1) * HEAD_DIM + dim
    gate = load_product(qkv, token * stride + column, mask, token, column, row_scales, scales, bias, dtype)
    sigmoid = (1 / (1 + tl.exp(-gate.to(tl.float32)))).to(dtype)
    place = output + (token * NUM_HEADS + head) * HEAD_DIM + dim
    tl.store(place, tl.load(place, mask=mask, other=0.0) * sigmoid, mask=mask)
