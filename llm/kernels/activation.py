"""SwiGLU's elementwise half."""

import torch
import triton
import triton.language as tl

from llm.kernels.launch import launch_options, wait_for_inputs

_BLOCK = 1024


def silu_mul(gate_up: torch.Tensor, output: torch.Tensor) -> None:
    """Write silu(gate) * up.

    Args:
        gate_up: (tokens, 2 size), contiguous, gate first.
        output: (tokens, size), contiguous.
    """
    num_tokens, size = output.shape
    _silu_mul[(num_tokens, triton.cdiv(size, _BLOCK))](
        gate_up, output, size, BLOCK=_BLOCK, num_warps=4, **launch_options(output.device)
    )


@triton.jit
def _silu_mul(gate_up, output, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Program (token, block)."""
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < size
    gate = tl.load(gate_up + token * 2 * size + column, mask=mask, other=0.0)
    up = tl.load(gate_up + token * 2 * size + size + column, mask=mask, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1 + tl.exp(-wide))).to(gate.dtype)  # rounded here, as torch's silu is
    tl.store(output + token * size + column, silu * up, mask=mask)
