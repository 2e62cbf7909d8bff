"""Numbers of 8 bits: E4M3 (Micikevicius et al. 2022, arXiv:2209.05433), 4 bits of exponent and 3 of fraction.

A row of numbers shares one float32 scale, so that its largest number is the largest that the format has.
"""

from functools import cache, partial

import torch
import triton
import triton.language as tl

from llm.kernels.launch import launch_options, wait_for_inputs

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
_LARGEST = tl.constexpr(LARGEST)
_SMALLEST_SCALE = 1e-12
"""Of rows that are zero, which no division may turn into NaN."""
_SCALE_BLOCK = 2048
USE_FAST_ACCUM = True
"""Whether products are summed up in the tensor cores' own, shorter numbers: twice as fast."""
_SCALED_APART_ROWS, _SCALED_APART_OUTPUTS = 512, 8192
"""Up to so many, the library's product with one scale and a kernel for the others is faster than its product with a
scale for each row and output: 26 and 3 instead of 40 µs for 256 rows of Llama-3.1-8B's `down` (H200)."""


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


def eight_bit_product(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x Wᵀ + bias, (rows, out), by the vendor's library, with activations made 8 bits wide.

    Args:
        x: (rows, in), contiguous, of 16 bits.
        weight: (out, in), of 8 bits; both sizes multiples of 16.
        scales: (out,) float32, of the weight's rows.
    """
    quantized, row_scales = quantize_rows(x)
    num_rows, num_outputs = len(x), len(weight)
    multiply = partial(torch._scaled_mm, quantized, weight.t(), use_fast_accum=USE_FAST_ACCUM)
    if num_rows > _SCALED_APART_ROWS or num_outputs > _SCALED_APART_OUTPUTS:
        return multiply(scale_a=row_scales, scale_b=scales.view(1, -1), bias=bias, out_dtype=x.dtype)
    # Before they are scaled, sums are too large for float16.
    wide = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    product = multiply(scale_a=_one(x.device), scale_b=_one(x.device), out_dtype=wide)
    output = product if wide == x.dtype else torch.empty(product.shape, dtype=x.dtype, device=x.device)
    _scale_product[(triton.cdiv(num_outputs, _SCALE_BLOCK), num_rows)](
        product, row_scales, scales, scales if bias is None else bias, output, num_outputs, BLOCK=_SCALE_BLOCK,
        HAS_BIAS=bias is not None, num_warps=4, **launch_options(x.device),
    )  # fmt: skip
    return output


@cache
def _one(device: torch.device) -> torch.Tensor:
    return torch.ones((), device=device)


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


@triton.jit
def _scale_product(
    product, row_scales, scales, bias, output, num_outputs,
    BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (block, row): the product times its scales, and the bias added."""
    out = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    mask = out < num_outputs
    scale = tl.load(scales + out, mask=mask, other=0.0)
    wait_for_inputs(PDL)
    scale *= tl.load(row_scales + row)
    result = tl.load(product + row * num_outputs + out, mask=mask, other=0.0).to(tl.float32) * scale
    if HAS_BIAS:
        result += tl.load(bias + out, mask=mask, other=0.0).to(tl.float32)
    tl.store(output + row * num_outputs + out, result.to(output.dtype.element_ty), mask=mask)
