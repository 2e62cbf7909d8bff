"""8-bit numbers: rounding, and products with 8-bit weights. By Triton's interpreter on a CPU, for real on a GPU.

The interpreter rounds to 8 bits worse than a chip does: 127 to 64, where the next number up is the power of two 128.
"""

import pytest
import torch
import torch.nn.functional as F

from llm.attention.kernels.rope import rope_and_store
from llm.kernels.linear import Linear
from llm.kernels.quantization import FP8, LARGEST, quantize_rows, quantize_weight

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # the interpreter takes bfloat16 for integers
TIGHT = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Relative error, by norm, of a product with weights that are widened: the rounding of its result."""
EIGHT_BITS = 0.03 if DEVICE.type == "cuda" else 0.1
"""Relative error, by norm, of rounding normal random numbers to E4M3: half a step is 1/32 to 1/16 of a number."""

SHAPES = [(128, 1024), (64, 384), (192, 2048), (112, 256)]
SHAPE_IDS = ["sum cut in two", "one block", "single tile each", "not for our kernels"]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(HALF)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖; NaN where something was not written."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def test_quantized_weight_is_near_the_weight():
    """Each number to within 1/16 of itself, or half of the smallest number's step; the largest exactly."""
    torch.manual_seed(0)
    weight = random(48, 64) * torch.logspace(-3, 1, 48, device=DEVICE)[:, None].to(HALF)
    weight[7] = 0
    quantized, scales = quantize_weight(weight)
    assert quantized.dtype == FP8
    assert scales.shape == (48,)
    back = quantized.double() * scales[:, None]
    error = (back - weight.double()).abs()
    assert (error <= weight.double().abs() / 16 + scales[:, None] * 2**-10).all()
    assert torch.equal(quantized.float().abs().amax(1) == LARGEST, weight.abs().amax(1) > 0)
    assert not back[7].any()


@pytest.mark.parametrize("size", [16, 200, 1024])
def test_quantized_rows_are_near_the_rows(size):
    """Rows of very different sizes, one of zeros."""
    torch.manual_seed(size)
    x = random(5, size) * torch.tensor([1e-2, 1, 60, 0, 1], device=DEVICE)[:, None].to(HALF)
    quantized, scales = quantize_rows(x)
    assert quantized.dtype == FP8
    assert scales.shape == (5, 1)
    back = quantized.double() * scales
    for row in (0, 1, 2, 4):
        assert relative_error(back[row], x[row]) < EIGHT_BITS
    assert not back[3].any()


@pytest.mark.parametrize("num_rows", [1, 2, 17, 64, 65, 513])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), SHAPES, ids=SHAPE_IDS)
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_of_8_bit_weights(num_rows, num_outputs, num_inputs, has_bias):
    """As good as 16-bit weights for what the 8-bit weights say; many rows lose once more by 8-bit activations."""
    torch.manual_seed(num_rows)
    x, weight = random(num_rows, num_inputs), random(num_outputs, num_inputs) / 16
    bias = random(num_outputs) if has_bias else None
    quantized, scales = quantize_weight(weight)
    linear = Linear(DEVICE)
    is_wide = num_rows > 64 or num_outputs % 64 != 0
    for _ in range(2):  # the second call finds the scratch memory as the first left it
        output = linear(x, quantized, bias, scales)
        assert output.dtype == HALF
        wide_bias = None if bias is None else bias.double()
        exact = F.linear(x.double(), quantized.double() * scales[:, None], wide_bias)
        assert relative_error(output, exact) < (EIGHT_BITS if is_wide else TIGHT[HALF])
        assert relative_error(output, F.linear(x.double(), weight.double(), wide_bias)) < 2 * EIGHT_BITS


@pytest.mark.parametrize("num_rows", [1, 3, 64, 70])
@pytest.mark.parametrize(("size", "num_inputs"), [(128, 1024), (64, 2048), (48, 128)])
def test_swiglu_of_8_bit_weights(num_rows, size, num_inputs):
    torch.manual_seed(num_rows)
    x, gate_up = random(num_rows, num_inputs), random(2 * size, num_inputs) / 16
    quantized, scales = quantize_weight(gate_up)
    gate, up = F.linear(x.double(), quantized.double() * scales[:, None]).chunk(2, -1)
    is_wide = num_rows > 64 or size % 64 != 0
    tolerance = 3 * EIGHT_BITS if is_wide else 2 * TIGHT[HALF]
    assert relative_error(Linear(DEVICE).swiglu(x, quantized, None, scales), F.silu(gate) * up) < tolerance


@pytest.mark.parametrize("num_rows", [1, 40, 300])
def test_deterministic_linear_of_8_bit_weights(num_rows):
    """Weights are widened however many rows there are."""
    torch.manual_seed(num_rows)
    x, weight = random(num_rows, 2048), random(72, 2048) / 16
    quantized, scales = quantize_weight(weight)
    output = Linear(DEVICE, deterministic=True)(x, quantized, None, scales)
    assert relative_error(output, F.linear(x.double(), quantized.double() * scales[:, None])) < TIGHT[HALF]


def test_keys_and_values_too_large_for_8_bits_become_the_largest():
    """1000 is stored as 448, not as NaN."""
    num_heads, num_kv_heads, head_dim, page_size = 4, 2, 16, 16
    qkv = torch.ones(2, num_heads + 2 * num_kv_heads, head_dim, device=DEVICE, dtype=HALF)
    qkv[0] = 1000
    qkv[0, -1] = -1000
    kv_pages = torch.zeros(2, 3, page_size, num_kv_heads, head_dim, device=DEVICE, dtype=FP8)
    ints = {"dtype": torch.int32, "device": DEVICE}
    tables, rows = torch.tensor([[2]], **ints), torch.zeros(2, **ints)
    positions = torch.tensor([0, 5], **ints)
    rope_table = torch.stack([torch.ones(8, head_dim // 2), torch.zeros(8, head_dim // 2)]).to(DEVICE)
    rope_and_store(qkv, kv_pages, tables, rows, positions, rope_table, None, 1e-6)
    expected = torch.zeros(kv_pages.shape, device=DEVICE)
    expected[:, 2, 0], expected[:, 2, 5] = LARGEST, 1
    expected[1, 2, 0, 1] = -LARGEST
    assert torch.equal(kv_pages.float(), expected)
