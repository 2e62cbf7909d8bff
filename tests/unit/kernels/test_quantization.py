"""8-bit numbers: rounding, and products with 8-bit weights. By Triton's interpreter on a CPU, for real on a GPU.

The interpreter rounds to 8 bits worse than a chip does: 127 to 64, where the next number up is the power of two 128.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from llm.kernels.activation import activate_gated
from llm.kernels.attention.rope import rope_and_store
from llm.kernels.linear import Linear, Weights
from llm.kernels.norm import Norm, ResidualStream, rms_norm
from llm.kernels.quantization import FP8, LARGEST, EightBitRows, ScaledProduct, quantize_rows, quantize_weight, scaled

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


def assert_near(rows: EightBitRows, expected: torch.Tensor) -> None:
    """Each row, whatever its size, to within the rounding; zeros are zeros."""
    assert rows.values.dtype == FP8
    assert rows.scales.shape == (len(expected), 1)
    for ours, row in zip(rows.values.double() * rows.scales, expected, strict=True):
        assert relative_error(ours, row) < EIGHT_BITS if row.any() else not ours.any()


@pytest.mark.parametrize("size", [16, 200, 1024])
def test_quantized_rows_are_near_the_rows(size):
    """Rows of very different sizes, one of zeros."""
    torch.manual_seed(size)
    x = random(5, size) * torch.tensor([1e-2, 1, 60, 0, 1], device=DEVICE)[:, None].to(HALF)
    assert_near(quantize_rows(x), x)


def create_product(num_rows: int, size: int, *, has_bias: bool) -> ScaledProduct:
    """As `eight_bit_product` leaves it: far from what is meant."""
    values = torch.randn(num_rows, size, device=DEVICE) * 500
    values = values.to(torch.bfloat16 if torch.bfloat16 == HALF else torch.float32)
    row_scales, scales = torch.rand(num_rows, 1, device=DEVICE) / 20, torch.rand(size, device=DEVICE) / 20
    return ScaledProduct(values, row_scales, scales, random(size) if has_bias else None, HALF)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_narrow", [False, True])
@pytest.mark.parametrize("size", [64, 200])
def test_norm_adds_a_scaled_product_and_narrows(size, is_narrow, has_bias):
    """The product is scaled and added to the stream; the norm comes out as it is or in 8 bits."""
    torch.manual_seed(size)
    total, product, norm = random(7, size), create_product(7, size, has_bias=has_bias), Norm(random(size), 1e-5)
    stream = ResidualStream(total.clone(), product)
    output = EightBitRows.allocate(7, size, DEVICE, HALF) if is_narrow else torch.full_like(total, torch.nan)
    rms_norm(stream, norm, output)
    summed = total + product.scaled()
    assert stream.pending is None
    torch.testing.assert_close(stream.total, summed, rtol=1e-2, atol=1e-3)
    wide = stream.total.double()
    expected = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight
    if isinstance(output, EightBitRows):
        assert_near(output, expected)
    else:
        assert relative_error(output, expected) < 2 * TIGHT[HALF]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [HALF, torch.float32])
@pytest.mark.parametrize("size", [64, 5000])
def test_a_product_is_scaled_by_a_kernel_as_in_plain_torch(size, dtype, has_bias):
    """But for the last bit, since factors are multiplied in another order; in place where formats are the same."""
    torch.manual_seed(size)
    product = replace(create_product(7, size, has_bias=has_bias), dtype=dtype)
    expected = product.scaled()
    output = scaled(product)
    assert (output.data_ptr() == product.values.data_ptr()) == (dtype == product.values.dtype)
    torch.testing.assert_close(output, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    assert scaled(output) is output


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_narrow", [False, True])
@pytest.mark.parametrize("size", [48, 1500])
def test_a_gated_activation_takes_a_scaled_product_and_narrows(size, is_narrow, has_bias):
    torch.manual_seed(size)
    product = create_product(3, 2 * size, has_bias=has_bias)
    output = EightBitRows.allocate(3, size, DEVICE, HALF) if is_narrow else random(3, size)
    activate_gated(product, output)
    gate, up = product.scaled().double().chunk(2, -1)
    if isinstance(output, EightBitRows):
        assert_near(output, F.silu(gate) * up)
    else:
        assert relative_error(output, F.silu(gate) * up) < 3 * TIGHT[HALF]


def whole(product: torch.Tensor | ScaledProduct) -> torch.Tensor:
    return product.scaled() if isinstance(product, ScaledProduct) else product


@pytest.mark.parametrize("num_rows", [1, 2, 17, 64, 65, 513])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), SHAPES, ids=SHAPE_IDS)
def test_linear_of_8_bit_weights(num_rows, num_outputs, num_inputs):
    """As good as 16-bit weights for what the 8-bit weights say; several rows lose once more by 8-bit activations.

    With a bias where a sum is cut or not for our kernels.
    """
    has_bias = num_outputs in (128, 112)
    torch.manual_seed(num_rows)
    x, weight = random(num_rows, num_inputs), random(num_outputs, num_inputs) / 16
    bias = random(num_outputs) if has_bias else None
    quantized, scales = quantize_weight(weight)
    linear = Linear(DEVICE)
    is_rounded = num_rows > 1 or num_outputs % 64 != 0
    for _ in range(2):  # the second call finds the scratch memory as the first left it
        output = whole(linear(x, Weights(quantized, bias, scales)))
        assert output.dtype == HALF
        wide_bias = None if bias is None else bias.double()
        exact = F.linear(x.double(), quantized.double() * scales[:, None], wide_bias)
        assert relative_error(output, exact) < (EIGHT_BITS if is_rounded else TIGHT[HALF])
        assert relative_error(output, F.linear(x.double(), weight.double(), wide_bias)) < 2 * EIGHT_BITS


@pytest.mark.parametrize(
    ("num_rows", "dtype", "has_bias"), [(3, HALF, False), (3, HALF, True), (4096, torch.bfloat16, False)]
)
def test_a_part_of_a_sum_over_gpus_is_scaled(num_rows, dtype, has_bias):
    """By a kernel behind the library's product, or, with many rows, by the product itself."""
    torch.manual_seed(num_rows)
    (values, row_scales), (weight, scales) = quantize_weight(random(num_rows, 64)), quantize_weight(random(32, 64) / 16)
    bias = random(32) if has_bias else None
    rows = EightBitRows(values, row_scales[:, None], dtype)
    part = Linear(DEVICE).part(rows, Weights(weight, bias, scales))
    exact = F.linear(values.double() * row_scales[:, None], weight.double() * scales[:, None])
    assert part.dtype == dtype
    assert relative_error(part, exact if bias is None else exact + bias) < 2 * TIGHT[torch.bfloat16]


@pytest.mark.parametrize("num_rows", [1, 3, 64, 70])
@pytest.mark.parametrize(("size", "hidden_size"), [(128, 1024), (256, 2048), (48, 128)])
def test_mlp_of_8_bit_weights(num_rows, size, hidden_size):
    """From a stream through both products to the stream, whose next norm adds what is pending."""
    torch.manual_seed(num_rows)
    total, norm = random(num_rows, hidden_size), Norm(random(hidden_size), 1e-5)
    (gate_up, gate_up_scales), (down, down_scales) = (
        quantize_weight(random(*shape) / 16) for shape in ((2 * size, hidden_size), (hidden_size, size))
    )
    stream, output = ResidualStream(total.clone()), torch.empty_like(total)
    Linear(DEVICE).mlp(stream, norm, Weights(gate_up, None, gate_up_scales), Weights(down, None, down_scales))
    rms_norm(stream, norm, output)
    wide = total.double()
    normed = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight
    gate, up = (normed @ (gate_up.double() * gate_up_scales[:, None]).t()).chunk(2, -1)
    added = (F.silu(gate) * up) @ (down.double() * down_scales[:, None]).t()
    is_rounded = num_rows > 1 or size % 64 != 0
    assert relative_error(stream.total - total, added) < (4 * EIGHT_BITS if is_rounded else 0.02)


@pytest.mark.parametrize("num_rows", [1, 40, 300])
def test_deterministic_linear_of_8_bit_weights(num_rows):
    """Weights are widened however many rows there are."""
    torch.manual_seed(num_rows)
    x, weight = random(num_rows, 2048), random(72, 2048) / 16
    quantized, scales = quantize_weight(weight)
    output = Linear(DEVICE, deterministic=True)(x, Weights(quantized, None, scales))
    assert relative_error(output, F.linear(x.double(), quantized.double() * scales[:, None])) < TIGHT[HALF]


def test_keys_and_values_too_large_for_8_bits_become_the_largest():
    """1000 is stored as 448, not as NaN."""
    num_heads, num_kv_heads, head_dim, page_size = 4, 2, 16, 16
    qkv = torch.ones(2, (num_heads + 2 * num_kv_heads) * head_dim, device=DEVICE, dtype=HALF)
    qkv[0] = 1000
    qkv[0, -head_dim:] = -1000
    query = torch.empty(2, num_heads, head_dim, device=DEVICE, dtype=HALF)
    kv_pages = torch.zeros(2, 3, page_size, num_kv_heads, head_dim, device=DEVICE, dtype=FP8)
    ints = {"dtype": torch.int32, "device": DEVICE}
    tables, rows = torch.tensor([[2]], **ints), torch.zeros(2, **ints)
    positions = torch.tensor([0, 5], **ints)
    rope_table = torch.stack([torch.ones(8, head_dim // 2), torch.zeros(8, head_dim // 2)]).to(DEVICE)
    rope_and_store(qkv, query, kv_pages, tables, rows, positions, rope_table, None)
    expected = torch.zeros(kv_pages.shape, device=DEVICE)
    expected[:, 2, 0], expected[:, 2, 5] = LARGEST, 1
    expected[1, 2, 0, 1] = -LARGEST
    assert torch.equal(kv_pages.float(), expected)


def test_rope_scales_the_product_it_reads():
    """Queries, keys and values of a product that is not scaled yet, with biases, as of one that is."""
    torch.manual_seed(0)
    num_heads, num_kv_heads, head_dim, page_size = 4, 2, 16, 16
    ints = {"dtype": torch.int32, "device": DEVICE}
    tables, rows, positions = torch.tensor([[2]], **ints), torch.zeros(3, **ints), torch.tensor([0, 5, 9], **ints)
    rope_table = torch.rand(2, 16, head_dim // 2, device=DEVICE)
    product = create_product(3, (num_heads + 2 * num_kv_heads) * head_dim, has_bias=True)
    results = []
    for qkv in (product, product.scaled()):
        kv_pages = torch.zeros(2, 3, page_size, num_kv_heads, head_dim, device=DEVICE, dtype=HALF)
        query = torch.full((3, num_heads, head_dim), torch.nan, device=DEVICE, dtype=HALF)
        rope_and_store(qkv, query, kv_pages, tables, rows, positions, rope_table, None)
        results.append((query, kv_pages))
    torch.testing.assert_close(results[0], results[1], rtol=1e-2, atol=1e-2)
