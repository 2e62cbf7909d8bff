"""The elementwise half of gated feed-forwards, SwiGLU and GeGLU."""

import torch
import triton
import triton.language as tl

from llm.config import Activation
from llm.kernels.launch import launch_options, num_warps, triton_type, wait_for_inputs
from llm.kernels.quantization import (
    EightBitRows,
    ScaledProduct,
    destination,
    load_product,
    scale_arguments,
    store_row,
    unscaled,
)
from llm.kernels.tiles import MULTIPROCESSORS

_BLOCK = 1024
_REGISTERS_FOR_TWO = 64
"""Of a thread, so that two programs of 16 warps fit a multiprocessor: one loads while the other computes. 8,192 rows of
14,336 take 252 instead of 376 µs, where the compiler would take 75 registers."""


def activate_gated(
    gate_up: torch.Tensor | ScaledProduct,
    output: torch.Tensor | EightBitRows,
    activation: Activation = Activation.SILU,
) -> None:
    """Write activation(gate) * up.

    Args:
        gate_up: (tokens, 2 size), contiguous, gate first.
        output: (tokens, size), contiguous.
    """
    values, output_scales = destination(output)
    num_tokens, size = values.shape
    options = launch_options(values.device)
    block = _BLOCK if output_scales is None else triton.next_power_of_2(size)  # who finds a row's scale reads all of it
    if num_warps(block) == 16 and num_tokens > MULTIPROCESSORS:
        options = {**options, "maxnreg": _REGISTERS_FOR_TWO}
    _activate_gated[(num_tokens, triton.cdiv(size, block))](
        unscaled(gate_up), values, output_scales, size, **scale_arguments(gate_up),
        DTYPE=triton_type(gate_up.dtype), GELU=activation is Activation.GELU_TANH, BLOCK=block,
        num_warps=max(num_warps(block), 4), **options,
    )  # fmt: skip


@triton.jit
def swiglu(gate, up, dtype: tl.constexpr):
    """silu(gate) * up in `dtype`, rounded where torch's product, silu and multiplication round."""
    gate = gate.to(dtype).to(tl.float32)
    silu = (gate / (1 + tl.exp(-gate))).to(dtype)
    return silu * up.to(dtype)


@triton.jit
def geglu(gate, up, dtype: tl.constexpr):
    """gelu(gate) * up in `dtype`, by the approximation with tanh, rounded like `swiglu`."""
    gate = gate.to(dtype).to(tl.float32)
    # x (1 + tanh(y)) / 2 is x / (1 + exp(-2 y)), here with y = sqrt(2 / pi) (x + 0.044715 x^3).
    twice_y = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    gelu = (gate / (1 + tl.exp(-twice_y))).to(dtype)
    return gelu * up.to(dtype)


@triton.jit
def bounded_swiglu(gate, up, dtype: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr):
    """(up + 1) * gate * sigmoid(ALPHA * gate) in `dtype`, gate bounded from above and up from both sides; NaN stays."""
    gate = gate.to(dtype).to(tl.float32)
    up = up.to(dtype).to(tl.float32)
    gate = tl.where(gate > LIMIT, LIMIT, gate)
    up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    return ((up + 1) * (gate / (1 + tl.exp(-ALPHA * gate)))).to(dtype)


@triton.jit
def gated(gate, up, dtype: tl.constexpr, GELU: tl.constexpr):
    """The gated feed-forward's product: `geglu` if GELU, else `swiglu`."""
    return geglu(gate, up, dtype) if GELU else swiglu(gate, up, dtype)


@triton.jit
def _activate_gated(
    gate_up, output, output_scales, size, row_scales, scales, bias,
    DTYPE: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (token, block)."""
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < size
    start = token * 2 * size
    gate = load_product(gate_up, start + column, mask, token, column, row_scales, scales, bias, DTYPE)
    up = load_product(gate_up, start + size + column, mask, token, size + column, row_scales, scales, bias, DTYPE)
    store_row(gated(gate, up, DTYPE, GELU), output, output_scales, token, token * size + column, mask)
