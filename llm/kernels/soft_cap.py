"""Numbers bounded by a tanh (Gemma 2, arXiv:2408.00118): scores of attention, and logits."""

import torch
import triton
import triton.language as tl

from llm.kernels.launch import launch_options, wait_for_inputs

_BLOCK = 4096


def cap_softly(logits: torch.Tensor, cap: float) -> None:
    """Replace each of the logits, contiguous, by `cap * tanh(logit / cap)`; computed in float32."""
    _cap_softly[(triton.cdiv(logits.numel(), _BLOCK),)](
        logits, logits.numel(), cap, 1 / cap, BLOCK=_BLOCK, num_warps=8, **launch_options(logits.device)
    )


@triton.jit
def tanh(x):
    """tanh(x), off by 1e-7 at most; Triton has none that its interpreter knows."""
    power = tl.exp(-2 * tl.abs(x))
    result = (1 - power) / (1 + power)
    return tl.where(x < 0, -result, result)


@triton.jit(do_not_specialize=["num_logits"])
def _cap_softly(logits, num_logits, cap, inverse_cap, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Program: a block of them."""
    wait_for_inputs(PDL)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < num_logits
    x = tl.load(logits + index, mask=mask, other=0.0)
    tl.store(logits + index, (cap * tanh(x.to(tl.float32) * inverse_cap)).to(x.dtype), mask=mask)
