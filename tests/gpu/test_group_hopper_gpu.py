"""Products of many rows with weights in groups of 4 bits on Hopper: against the weights that are meant, in float64."""

import pytest
import torch
import torch.nn.functional as F

from llm.config import Activation
from llm.core.weight_groups import WeightGroups, dequantize, pack
from llm.kernels import group_hopper, linear as products
from llm.kernels.linear import Linear, Weights
from llm.kernels.tiles import HopperTile, Tile

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not IS_HOPPER, reason="needs a Hopper GPU")]

DEVICE = torch.device("cuda")
TILES = [HopperTile(64, 1, 6), HopperTile(64, 4, 6), HopperTile(128, 1, 4), HopperTile(128, 2, 4)]
ROUNDING = {torch.float16: 1e-3, torch.bfloat16: 4e-3}


def create_weights(num_outputs: int, num_inputs: int, size: int, dtype: torch.dtype, *, has_bias: bool) -> Weights:
    """Random codes, scales of which some are nought, and zeros."""
    codes = torch.randint(0, 16, (num_outputs, num_inputs), device=DEVICE, dtype=torch.uint8)
    shape = num_inputs // size, num_outputs
    scales = torch.rand(shape, device=DEVICE) / 100 * (torch.rand(shape, device=DEVICE) > 0.1)
    zeros = torch.randint(0, 17, shape, device=DEVICE, dtype=torch.uint8)
    groups = WeightGroups(scales.half(), zeros, None, size, 128).joined()
    bias = torch.randn(num_outputs, device=DEVICE).to(dtype) if has_bias else None
    return Weights(pack(codes, 128), bias, groups=groups)


def product(x: torch.Tensor, weights: Weights, tile: HopperTile, *, gated: bool = False) -> torch.Tensor:
    """By this tile: gated, or added to ones."""
    assert weights.groups is not None
    output = x.new_ones(len(x), len(weights) // (2 if gated else 1))
    return group_hopper.hopper_product(
        x, weights.operand, weights.groups, output, Linear(DEVICE).scratch, tile, Activation.SILU if gated else None,
        adds=not gated,
    )  # fmt: skip


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("num_rows", [33, 65, 128, 200, 512])
@pytest.mark.parametrize(("size", "dtype"), [(128, torch.bfloat16), (256, torch.float16), (2048, torch.bfloat16)])
@pytest.mark.parametrize("gated", [False, True])
def test_products_equal_float64(tile, num_rows, size, dtype, gated):
    """Twice: the second call finds the counters of programs as the first left them."""
    torch.manual_seed(num_rows)
    weights = create_weights(512, 2048, size, dtype, has_bias=not gated)
    x, linear = torch.randn(num_rows, 2048, device=DEVICE).to(dtype), Linear(DEVICE)
    expected = F.linear(x.double(), dequantize(weights.weight, weights.groups).double())
    if gated:
        gate, up = expected.chunk(2, -1)
        expected = F.silu(gate) * up
    else:
        expected += weights.bias.double() + 1
    for _ in range(2):
        output = x.new_ones(num_rows, expected.shape[1])
        group_hopper.hopper_product(
            x, weights.operand, weights.groups, output, linear.scratch, tile, Activation.SILU if gated else None,
            adds=not gated,
        )  # fmt: skip
        error = (output.double() - expected).norm() / expected.norm()
        assert error < ROUNDING[dtype]
    assert not linear.scratch[1].any()


@pytest.mark.parametrize("gated", [False, True])
def test_height_of_tiles_changes_no_bit(gated, monkeypatch):
    """Nor do rows beside a row, and Triton's tiles, whose sums have units too, give the same."""
    torch.manual_seed(0)
    weights = create_weights(512, 2048, 128, torch.bfloat16, has_bias=False)
    x = torch.randn(150, 2048, device=DEVICE).bfloat16()
    high = product(x, weights, HopperTile(128, 1, 4), gated=gated)
    assert torch.equal(product(x, weights, HopperTile(64, 1, 6), gated=gated), high)
    assert torch.equal(product(x[:40].contiguous(), weights, HopperTile(64, 1, 6), gated=gated), high[:40])
    monkeypatch.setattr(products, "hopper_tile", lambda *_: None)
    monkeypatch.setattr(products, "group_tile", lambda *_: Tile(128, 64, 128, 1, False, 4, 3))
    output = torch.ones_like(high)
    Linear(DEVICE)._tiled(x, weights, output, gated_by=Activation.SILU if gated else None, adds=not gated)
    assert torch.equal(output, high)


@pytest.mark.parametrize(
    ("size", "has_order", "num_rows", "expected"),
    [(128, False, 100, True), (128, True, 300, True), (64, False, 100, False), (128, False, 600, False)],
)
def test_which_products_go_this_way(size, has_order, num_rows, expected, monkeypatch):
    """Groups of whole spans do, act-order or not; the others go as before. All equal the weights that are meant."""
    torch.manual_seed(0)
    weights = create_weights(4096, 14336, size, torch.bfloat16, has_bias=True)
    if has_order:
        order = torch.randperm(14336, device=DEVICE).int()
        groups = WeightGroups(weights.groups.scales, None, order, size, 128)
        weights = Weights(weights.weight, weights.bias, groups=groups)
    x, calls = torch.randn(num_rows, 14336, device=DEVICE).bfloat16(), []
    run = products.hopper_product
    monkeypatch.setattr(products, "hopper_product", lambda *args, **options: calls.append(1) or run(*args, **options))
    output = Linear(DEVICE)(x, weights)
    exact = F.linear(x.double(), dequantize(weights.weight, weights.groups).double(), weights.bias.double())
    assert (output.double() - exact).norm() / exact.norm() < 2 * ROUNDING[torch.bfloat16]
    assert bool(calls) == expected
