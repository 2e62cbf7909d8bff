"""Products with weights in groups, of 4 and 8 bits: by Triton's interpreter on a CPU, for real on a GPU."""

import pytest
import torch
import torch.nn.functional as F

from llm.config import Activation
from llm.core.weight_groups import FP8, WeightGroups, dequantize, pack, span_of, unpack
from llm.kernels import linear as products
from llm.kernels.group_numbers import written_out
from llm.kernels.linear import Linear, Weights
from llm.kernels.norm import Norm, ResidualStream
from llm.kernels.tiles import (
    HOPPER_OUTPUTS,
    HOPPER_SPAN,
    MAX_GROUP_ROWS,
    MAX_HOPPER_ROWS,
    MULTIPROCESSORS,
    Tile,
    group_tile,
    hopper_tile,
    scratch_sizes,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # the interpreter takes bfloat16 for integers
TIGHT = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Relative error, by norm, of a product: the rounding of its result."""

KINDS = {
    "4 bits, 128": (4, 128, True, False),
    "4 bits, 32": (4, 32, True, False),
    "4 bits, one group, no zeros": (4, None, False, False),
    "4 bits, 64, apart": (4, 64, True, False),
    "4 bits, act-order": (4, 64, True, True),
    "8 bits, 128": (8, 128, False, False),
}
SHAPES = [(128, 512), (64, 384), (112, 256)]
"""Sums that are cut and not, and outputs that our kernels do not take."""


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(HALF)


def create_weights(kind: str, num_outputs: int, num_inputs: int, *, has_bias: bool = False) -> Weights:
    num_bits, size, has_zeros, has_order = KINDS[kind]
    size = size or num_inputs
    span, shape = span_of(num_inputs, size, num_bits), (num_inputs // size, num_outputs)
    scales = torch.rand(shape, device=DEVICE) / (100 if num_bits == 4 else 30) + 0.01
    zeros = torch.randint(5, 17, shape, device=DEVICE, dtype=torch.uint8) if has_zeros else None
    order = torch.randperm(num_inputs, device=DEVICE).int() if has_order else None
    if num_bits == 4:
        codes = pack(torch.randint(0, 16, (num_outputs, num_inputs), device=DEVICE, dtype=torch.uint8), span)
    else:
        codes = torch.randn(num_outputs, num_inputs, device=DEVICE).to(FP8)
    groups = WeightGroups(scales.half() if num_bits == 4 else scales, zeros, order, size, span)
    if num_bits == 4 and "apart" not in kind:
        groups = groups.joined()
        assert groups.scales.dtype == torch.int32, "scales of 16 bits leave room for zeros"
    return Weights(codes, random(num_outputs) if has_bias else None, groups=groups)


def meant(weights: Weights) -> torch.Tensor:
    assert weights.groups is not None
    return dequantize(weights.weight, weights.groups).double()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖; NaN where something was not written."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("span", [4, 16, 64, 128])
def test_packed_codes_are_unpacked_again(span):
    codes = torch.randint(0, 16, (3, 512), dtype=torch.uint8)
    assert pack(codes, span).shape == (3, 256)
    assert torch.equal(unpack(pack(codes, span), span), codes)


@pytest.mark.parametrize(
    ("num_inputs", "size", "num_bits", "span"),
    [(4096, 128, 4, 128), (4096, 32, 4, 128), (896, 128, 4, 128), (4096, 4096, 4, 128), (192, 32, 4, 64),
     (96, 32, 4, 32), (4096, 128, 8, 128), (4096, 4096, 8, 128), (96, 32, 8, 32)],
)  # fmt: skip
def test_no_quarter_of_a_span_is_in_two_groups(num_inputs, size, num_bits, span):
    assert span_of(num_inputs, size, num_bits) == span


@pytest.mark.parametrize("has_zeros", [True, False])
def test_scales_and_zeros_are_joined_and_taken_apart(has_zeros):
    """Bit by bit, unless a scale needs more than 16 bits."""
    for dtype in (torch.float16, torch.bfloat16):
        scales = torch.randn(3, 64).to(dtype)
        zeros = torch.randint(0, 17, (3, 64), dtype=torch.uint8) if has_zeros else None
        apart = WeightGroups(scales, zeros, None, 32, 64).joined().apart()
        assert torch.equal(apart.scales, scales.float())
        assert torch.equal(apart.zeros, zeros if has_zeros else torch.full((3, 64), 8, dtype=torch.uint8))
    exact = WeightGroups(torch.full((3, 64), 0.1), None, None, 32, 64)
    assert exact.joined() is exact


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_written_out(kind, shape):
    """Each number is what is meant, rounded once."""
    torch.manual_seed(0)
    weights = create_weights(kind, *shape)
    expected = meant(weights)
    torch.testing.assert_close(written_out(weights.weight, weights.groups, HALF).double(), expected, rtol=4e-3, atol=0)
    exact = written_out(weights.weight, weights.groups, torch.float32)
    torch.testing.assert_close(exact.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_rows", [1, 17, 70])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_of_groups(kind, num_rows, shape):
    """As good as the weights that are meant, whichever path it takes; with a bias where no path is our kernels'."""
    torch.manual_seed(num_rows)
    num_outputs, num_inputs = shape
    weights = create_weights(kind, *shape, has_bias=num_outputs in (128, 112))
    x, linear = random(num_rows, num_inputs), Linear(DEVICE)
    bias = None if weights.bias is None else weights.bias.double()
    exact = F.linear(x.double(), meant(weights), bias)
    for _ in range(2):  # the second call finds the scratch memory as the first left it
        output = linear(x, weights)
        assert output.dtype == HALF
        assert relative_error(output, exact) < 2 * TIGHT[HALF]


@pytest.mark.parametrize("kind", KINDS)
def test_more_rows_of_groups(kind, monkeypatch):
    """Sums have units, plain and gated; some groups' scales are nought, the first and the last of some outputs too."""
    monkeypatch.setattr(products, "MAX_SUMMED_ROWS", 16)
    monkeypatch.setattr(
        products, "group_tile", lambda _rows, _outputs, _inputs, k, _swiglu: Tile(32, 64, k, 1, False, 4, 2)
    )
    torch.manual_seed(0)
    weights, x, linear = create_weights(kind, 128, 512), random(40, 512), Linear(DEVICE)
    assert weights.groups is not None
    scales = weights.groups.scales
    is_nought = torch.rand(scales.shape, device=DEVICE) < 0.2
    if scales.dtype == torch.int32:
        scales[is_nought] &= 255
    else:
        scales[is_nought] = 0
    exact = x.double() @ meant(weights).t()
    assert relative_error(linear(x, weights), exact) < 2 * TIGHT[HALF]
    gated = linear._tiled(x, weights, x.new_empty(40, 64), gated_by=Activation.SILU)
    gate, up = exact.chunk(2, -1)
    assert relative_error(gated, F.silu(gate) * up) < 3 * TIGHT[HALF]


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("num_rows", [2, 33, 65, 129, MAX_GROUP_ROWS])
def test_programs_that_share_sums_have_room(num_rows, swiglu):
    """For parts of sums, twice as many of gated ones, and for counters."""
    num_partial, num_arrivals = scratch_sizes(deterministic=False)
    for num_outputs in range(64, 20_000, 64):
        for num_inputs in (512, 4096, 14_336):
            tile = group_tile(num_rows, num_outputs, num_inputs, 128, swiglu)
            if tile.is_shared:
                num_blocks = -(-num_outputs // tile.outputs) * -(-num_rows // tile.rows)
                assert num_blocks <= num_arrivals
                assert num_blocks * tile.num_parts * tile.rows * tile.outputs * (1 + swiglu) <= num_partial


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("num_rows", [33, 64, 65, 128, 192, MAX_GROUP_ROWS, MAX_HOPPER_ROWS])
def test_programs_on_hopper_that_share_sums_have_room(num_rows, swiglu):
    """Parts are whole spans, and as many programs share sums as run at once; each of two groups of warps counts."""
    num_partial, num_arrivals = scratch_sizes(deterministic=False)
    tiles = {}
    for num_outputs in range(64, 40_000, 64):
        for num_inputs in (512, 4096, 14_336, 128 * 37):
            tile = hopper_tile(num_rows, num_outputs, num_inputs, swiglu)
            if tile is None:
                continue
            tiles[num_outputs, num_inputs] = tile
            assert num_outputs * (1 + swiglu) % HOPPER_OUTPUTS == 0
            assert num_inputs % (HOPPER_SPAN * tile.num_parts) == 0
            num_tiles = num_outputs * (1 + swiglu) // HOPPER_OUTPUTS * -(-num_rows // tile.rows)
            if tile.num_parts > 1:
                assert num_tiles * tile.num_parts <= MULTIPROCESSORS
                assert 2 * num_tiles <= num_arrivals
                assert num_tiles * tile.num_parts * HOPPER_OUTPUTS * tile.rows <= num_partial
    assert len(tiles) > 100 or (num_rows <= 64 and not swiglu)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_rows", [1, 3])
def test_mlp_of_groups(kind, num_rows):
    """From a stream through both products to the stream."""
    torch.manual_seed(num_rows)
    size, hidden_size = 128, 256
    total, norm = random(num_rows, hidden_size), Norm(random(hidden_size), 1e-5)
    gate_up, down = create_weights(kind, 2 * size, hidden_size), create_weights(kind, hidden_size, size)
    stream = ResidualStream(total.clone())
    Linear(DEVICE).mlp(stream, norm, gate_up, down)
    wide = total.double()
    normed = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight
    gate, up = (normed @ meant(gate_up).t()).chunk(2, -1)
    assert relative_error(stream.total - total, (F.silu(gate) * up) @ meant(down).t()) < 0.02


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_outputs", [72, 128])
def test_deterministic_linear_of_groups(kind, num_outputs):
    """A row alone and among others is the same, bit by bit."""
    torch.manual_seed(0)
    weights, linear = create_weights(kind, num_outputs, 512), Linear(DEVICE, deterministic=True)
    x = random(70, 512)
    together = linear(x, weights)
    assert relative_error(together, x.double() @ meant(weights).t()) < TIGHT[HALF]
    assert torch.equal(linear(x[7:8].contiguous(), weights), together[7:8])
