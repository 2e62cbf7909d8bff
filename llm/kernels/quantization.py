"""Numbers of 8 bits: E4M3 (Micikevicius et al. 2022, arXiv:2209.05433), 4 bits of exponent and 3 of fraction.

A row of numbers shares one float32 scale, so that its largest number is the largest that the format has.
"""

import torch
import triton
import triton.language as tl

from llm.kernels.launch import launch_options, wait_for_inputs

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
_LARGEST = tl.constexpr(LARGEST)
_SMALLEST_SCALE = 1e-12
"""Of rows that are zero, which no division may turn into NaN."""


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight (out, in) to 8 bits; returns it and the scale of each output, (out,) float32.

    weight ≈ quantized * scales[:, None], each number to within 1/16 of itself or 1/1024 of its scale.
    """
    scales = (weight.abs().amax(1).float() / LARGEST).clamp_min(_SMALLEST_SCALE)
    return (weight.float() / scales[:, None]).clamp(-LARGEST, LARGEST).to(FP8), scales


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round activations (rows, in), contiguous, to 8 bits; returns them and each row's scale, (rows, 1) float32."""
    num_rows, num_inputs = x.shape
    quantized = torch.empty(x.shape, dtype=FP8, device=x.device)
    scales = torch.empty(num_rows, 1, device=x.device)
    block = triton.next_power_of_2(num_inputs)
    _quantize_rows[(num_rows,)](
        x, quantized, scales, num_inputs, BLOCK=block, SMALLEST=_SMALLEST_SCALE,
        num_warps=min(max(block // 512, 1), 16), **launch_options(x.device),
    )  # fmt: skip
    return quantized, scales


@triton.jit
def to_format(x, dtype: tl.constexpr):
    """x as `dtype`. Numbers too large for 8 bits become the largest: the chip's own rounding, but not everyone's."""
    if dtype.is_fp8():
        x = tl.clamp(x.to(tl.float32), -_LARGEST, _LARGEST)
    return x.to(dtype)


@triton.jit
def _quantize_rows(x, quantized, scales, num_inputs, BLOCK: tl.constexpr, SMALLEST: tl.constexpr, PDL: tl.constexpr):
    """Program: one row."""
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < num_inputs
    values = tl.load(x + row * num_inputs + column, mask=mask, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(values), 0) / _LARGEST, SMALLEST)
    tl.store(scales + row, scale)
    tl.store(
        quantized + row * num_inputs + column, to_format(values * (1 / scale), quantized.dtype.element_ty), mask=mask
    )
