"""Numbers of 8 bits: E4M3 (Micikevicius et al. 2022, arXiv:2209.05433), 4 bits of exponent and 3 of fraction.

A row of numbers shares one float32 scale, so that its largest number is the largest that the format has. No kernel does
nothing but round or scale, where the kernel before or behind a product can do it in passing: the first writes
`EightBitRows`, the second reads a `ScaledProduct`.
"""

from dataclasses import dataclass
from functools import cache
from typing import Self

import torch
import triton
import triton.language as tl

from llm.kernels.launch import launch_options, num_warps, wait_for_inputs

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
_LARGEST = tl.constexpr(LARGEST)
_SMALLEST_SCALE = 1e-12
"""Of rows that are zero, which no division may turn into NaN."""
_SMALLEST = tl.constexpr(_SMALLEST_SCALE)
_SCALED_BLOCK = 2048
"""Numbers that a program scales: a part of a row, which needs no sum over the whole one."""
_LEAST_LIBRARY_SCALED = 4096
"""Rows from which the library scales rows and outputs for nothing. With fewer its products take up to twice as long."""
USE_FAST_ACCUM = True
"""Whether products are summed up in the tensor cores' own, shorter numbers: twice as fast."""


@dataclass(frozen=True, slots=True)
class EightBitRows:
    """Activations in 8 bits; `values * scales` is meant.

    Attributes:
        values: (rows, in), contiguous.
        scales: (rows, 1) float32.
        dtype: of what is meant.
    """

    values: torch.Tensor
    scales: torch.Tensor
    dtype: torch.dtype

    @classmethod
    def allocate(cls, num_rows: int, num_columns: int, device: torch.device, dtype: torch.dtype) -> Self:
        """Room for rows that a kernel will write."""
        values = torch.empty(num_rows, num_columns, dtype=FP8, device=device)
        return cls(values, torch.empty(num_rows, 1, device=device), dtype)


@dataclass(frozen=True, slots=True)
class ScaledProduct:
    """A product of 8-bit factors as the library leaves it; `values * row_scales * scales + bias` is meant.

    Attributes:
        values: (rows, out), contiguous.
        row_scales: (rows, 1) float32.
        scales: (out,) float32.
        bias: (out,), or None for none.
        dtype: of what is meant.
    """

    values: torch.Tensor
    row_scales: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None
    dtype: torch.dtype

    def scaled(self) -> torch.Tensor:
        """What is meant, in plain torch."""
        product = self.values.float() * self.row_scales * self.scales
        return (product if self.bias is None else product + self.bias.float()).to(self.dtype)


def scaled(product: torch.Tensor | ScaledProduct) -> torch.Tensor:
    """A product as plain numbers, for readers that scale nothing themselves. Its own memory is used again if it can be.

    Computed as `load_product` does, so that it makes no difference who scales.
    """
    if not isinstance(product, ScaledProduct):
        return product
    values = product.values
    output = values if values.dtype == product.dtype else torch.empty_like(values, dtype=product.dtype)
    num_rows, size = values.shape
    _scale_rows[num_rows, triton.cdiv(size, _SCALED_BLOCK)](
        values, output, size, **scale_arguments(product), BLOCK=_SCALED_BLOCK, num_warps=num_warps(_SCALED_BLOCK),
        **launch_options(values.device),
    )  # fmt: skip
    return output


def unscaled(product: "torch.Tensor | ScaledProduct") -> torch.Tensor:
    """The numbers that a kernel reads, to be scaled there if `scale_arguments` says so."""
    return product.values if isinstance(product, ScaledProduct) else product


def scale_arguments(product: "torch.Tensor | ScaledProduct | None") -> dict[str, object]:
    """Keyword arguments of kernels that read a product by `load_product`."""
    if not isinstance(product, ScaledProduct):
        return {"row_scales": None, "scales": None, "bias": None}
    return {"row_scales": product.row_scales, "scales": product.scales, "bias": product.bias}


def destination(rows: torch.Tensor | EightBitRows) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Where kernels put numbers and scales by `store_row`."""
    return (rows.values, rows.scales) if isinstance(rows, EightBitRows) else (rows, None)


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight (…, out, in) to 8 bits; returns it and the scale of each output, (…, out) float32.

    weight ≈ quantized * scales[…, None], each number to within 1/16 of itself or 1/1024 of its scale.
    """
    scales = (weight.abs().amax(-1).float() / LARGEST).clamp_min(_SMALLEST_SCALE)
    return (weight.float() / scales[..., None]).clamp(-LARGEST, LARGEST).to(FP8), scales


def quantize_rows(x: torch.Tensor) -> EightBitRows:
    """Round activations (rows, in), contiguous, to 8 bits."""
    num_rows, num_inputs = x.shape
    rows = EightBitRows.allocate(num_rows, num_inputs, x.device, x.dtype)
    block = triton.next_power_of_2(num_inputs)
    _quantize_rows[(num_rows,)](
        x, rows.values, rows.scales, num_inputs, BLOCK=block, num_warps=num_warps(block), **launch_options(x.device)
    )
    return rows


def eight_bit_product(
    x: EightBitRows, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> ScaledProduct:
    """x Wᵀ + bias by the vendor's library, which is fastest with one scale for everything: here 1.

    Args:
        x: of `in` columns.
        weight: (out, in), of 8 bits; both sizes multiples of 16.
        scales: (out,) float32, of the weight's rows.
        bias: (out,), or None.
    """
    # Before they are scaled, sums are too large for float16.
    wide = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    one = _one(weight.device)
    values = torch._scaled_mm(
        x.values, weight.t(), scale_a=one, scale_b=one, out_dtype=wide, use_fast_accum=USE_FAST_ACCUM
    )
    return ScaledProduct(values, x.scales, scales, bias, x.dtype)


def scaled_product(
    x: EightBitRows, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The same as plain numbers, (rows, out): scaled by the library itself where it takes no longer for that."""
    if len(x.values) < _LEAST_LIBRARY_SCALED or x.dtype != torch.bfloat16 or bias is not None:
        return scaled(eight_bit_product(x, weight, scales, bias))
    return torch._scaled_mm(
        x.values, weight.t(), scale_a=x.scales, scale_b=scales[None], out_dtype=x.dtype, use_fast_accum=USE_FAST_ACCUM
    )


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
def load_product(product, offsets, mask, row, column, row_scales, scales, bias, dtype: tl.constexpr):
    """Numbers of a product's `row` at `offsets`, in `dtype`; scaled if there are scales."""
    x = tl.load(product + offsets, mask=mask, other=0.0)
    if scales is not None:
        wide = x.to(tl.float32) * (tl.load(row_scales + row) * tl.load(scales + column, mask=mask, other=0.0))
        if bias is not None:
            wide += tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
        x = wide.to(dtype)
    return x


@triton.jit
def store_row(x, values, scales, row, offsets, mask):
    """Store a whole row; in 8 bits, with its scale, if there is a place for scales."""
    if scales is not None:
        wide = x.to(tl.float32)
        scale = tl.maximum(tl.max(tl.abs(wide), 0) / _LARGEST, _SMALLEST)
        tl.store(scales + row, scale)
        tl.store(values + offsets, to_format(wide * (1 / scale), values.dtype.element_ty), mask=mask)
    else:
        tl.store(values + offsets, x, mask=mask)


@triton.jit
def _scale_rows(values, output, size, row_scales, scales, bias, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Program: BLOCK numbers of one row."""
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < size
    offsets = row * size + column
    dtype: tl.constexpr = output.dtype.element_ty
    x = load_product(values, offsets, mask, row, column, row_scales, scales, bias, dtype)
    tl.store(output + offsets, x, mask=mask)


@triton.jit
def _quantize_rows(x, values, scales, num_inputs, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Program: one row."""
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < num_inputs
    offsets = row * num_inputs + column
    store_row(tl.load(x + offsets, mask=mask, other=0.0), values, scales, row, offsets, mask)
