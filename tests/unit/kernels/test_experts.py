"""Mixtures of experts against the plain layer: by Triton's interpreter, or on a GPU."""

from collections.abc import Callable

import pytest
import torch

from llm.config import RoutingConfig, WeightFormat, WeightLayout
from llm.kernels import experts as kernels, pair_order
from llm.kernels.experts import ExpertMixture
from llm.kernels.linear import Weights
from llm.kernels.norm import Norm, ResidualStream
from llm.kernels.quantization import quantize_weight
from llm.kernels.routing import ExpertShape, Routes, route
from llm.models.experts import ExpertProjections, Experts
from llm.models.layers import RMSNorm
from llm.models.quantized import QuantizedExperts

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # the interpreter takes bfloat16 for integers
Spread = Callable[[torch.Tensor], None]
"""Changes a router's weights, so that tokens go where a test wants them."""
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖; NaN where something was not written."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def all_to_few(router: torch.Tensor) -> None:
    """Two experts whose logits are larger than all others, whatever the token; the others get none."""
    router[:] = 0
    router[1, 0], router[4, 0] = 1000, 900


def all_apart(router: torch.Tensor) -> None:
    router.mul_(3)


def create_experts(shape: ExpertShape, dtype: torch.dtype, spread: Spread) -> Experts:
    limit, alpha = shape.swiglu_limit, shape.swiglu_alpha
    experts = Experts(
        shape.hidden_size, shape.size, shape.num_experts, shape.per_token, normalizes=shape.normalizes,
        has_bias=limit is not None, swiglu_limit=limit, swiglu_alpha=alpha, routing=shape.routing,
    )  # fmt: skip
    for name, parameter in experts.to(DEVICE, dtype).named_parameters():
        parameter.data.normal_(std=1.0 if name.endswith("bias") else 0.2)
    spread(experts.router.weight.data)
    return experts


SIGMOIDS = RoutingConfig(uses_sigmoid=True)
SIGMOIDS_IN_GROUPS = RoutingConfig(uses_sigmoid=True, num_groups=4, num_top_groups=2)
SHAPES = {
    "powers of two": ExpertShape(8, 2, 64, 128, True),
    "odd number each": ExpertShape(16, 3, 96, 256, False),
    "odd shape": ExpertShape(5, 2, 40, 104, True),
    "all of them": ExpertShape(6, 6, 24, 64, False),
    "large tiles": ExpertShape(5, 3, 128, 256, True),
    "biases and bounds": ExpertShape(6, 4, 128, 256, True, 1.5, 1.3),
    "biases and bounds of an odd shape": ExpertShape(5, 3, 40, 104, True, 1.0),
    "tiles that do not divide the row": ExpertShape(5, 3, 40, 1344, True, 1.0),
    "sigmoids": ExpertShape(12, 3, 40, 104, True, routing=SIGMOIDS.model_copy(update={"scale": 2.5})),
    "sigmoids in groups": ExpertShape(20, 3, 64, 128, False, routing=SIGMOIDS_IN_GROUPS),
    "groups": ExpertShape(15, 4, 40, 104, False, routing=RoutingConfig(num_groups=5, num_top_groups=2, scale=16.0)),
}
NARROW = [name for name, shape in SHAPES.items() if shape.hidden_size < 1000]


@pytest.mark.parametrize("num_tokens", [1, 19, 1100])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_routes_equal_the_layers(num_tokens, shape):
    """Experts and weights of each token, and the tokens of each expert, some of which have none."""
    torch.manual_seed(num_tokens)
    router = create_experts(shape, torch.float32, all_apart).router
    x = random(num_tokens, shape.hidden_size)
    weights, experts = router(x)
    routes = Routes.allocate(shape, 1200, DEVICE)
    for _ in range(2):  # the second call finds the scratch memory as the first left it
        route(x, router.weight, routes, bias=router.bias, correction=router.e_score_correction_bias)
        routes.order_pairs(num_tokens)
    num_pairs = num_tokens * shape.per_token
    assert torch.equal(routes.experts[:num_pairs].view_as(experts), experts.int())
    torch.testing.assert_close(routes.weights[:num_pairs].view_as(weights), weights, rtol=1e-4, atol=1e-6)
    assert torch.equal(routes.order[:num_pairs].long(), experts.flatten().argsort(stable=True))
    counts = experts.flatten().bincount(minlength=shape.num_experts)
    assert routes.starts.tolist() == [0, *counts.cumsum(0).tolist()]


@pytest.mark.parametrize("num_pairs", [1300, 1536, 5000])
def test_many_pairs_are_ordered(num_pairs, monkeypatch):
    """As few are, in several turns: in their order within an expert, some of which have none."""
    monkeypatch.setattr(pair_order, "_PAIRS_A_TURN", 512)
    torch.manual_seed(0)
    experts = torch.randint(3, 20, (num_pairs,), dtype=torch.int32, device=DEVICE)
    order, starts = torch.empty_like(experts), torch.empty(22, dtype=torch.int32, device=DEVICE)
    pair_order.order_by_expert(experts, 21, order, starts)
    assert torch.equal(order.long(), experts.argsort(stable=True))
    assert starts.tolist() == [0, *experts.bincount(minlength=21).cumsum(0).tolist()]


@pytest.mark.parametrize(
    ("num_tokens", "dtype", "spread", "deterministic", "names"),
    [
        (1, HALF, all_apart, False, SHAPES), (2, HALF, all_to_few, False, SHAPES),
        (35, torch.float32, all_apart, True, NARROW), (150, HALF, all_apart, False, NARROW),
        (150, HALF, all_to_few, False, ["powers of two", "large tiles", "biases and bounds"]),
        (1, torch.float32, all_to_few, False, ["powers of two"]), (1, HALF, all_apart, True, ["powers of two"]),
    ],
)  # fmt: skip
def test_mixture_equals_the_layer(num_tokens, dtype, spread, deterministic, names):
    """One token and many, where some experts get no token and where two get all."""
    for name in names:
        check_mixture(SHAPES[name], num_tokens, dtype, spread, deterministic)


def check_mixture(shape: ExpertShape, num_tokens: int, dtype: torch.dtype, spread: Spread, deterministic: bool) -> None:
    """Compare the kernels with the layer on fresh random inputs."""
    torch.manual_seed(num_tokens)
    experts, norm = create_experts(shape, dtype, spread), RMSNorm(shape.hidden_size, 1e-5).to(DEVICE, dtype)
    norm.weight.data.uniform_(0.5, 1.5)
    total = random(num_tokens, shape.hidden_size, dtype=dtype)
    if spread is all_to_few:
        total[:, 0] = total[:, 0].abs() + 1
    mixture = ExpertMixture(shape, 150, dtype, DEVICE, deterministic=deterministic)
    stream = ResidualStream(total.clone())
    weights = (Weights(part.weight, part.bias) for part in (experts.gate_up_proj, experts.down_proj))
    offset = None if shape.swiglu_limit is None else 0.0
    router = experts.router
    biases = router.bias, router.e_score_correction_bias
    with torch.inference_mode():
        mixture(stream, Norm(norm.weight, norm.eps, offset), router.weight, *weights, *biases)
        made = experts.float()(norm(total).float())  # the norm as it is rounded, or nearly tied experts change places
    assert relative_error(stream.total.float() - total, made) < 3 * TOLERANCE[dtype]


@pytest.mark.parametrize("num_tokens", [1, 9])
def test_experts_of_8_bits_equal_what_8_bits_leave_of_them(num_tokens):
    torch.manual_seed(0)
    shape = ExpertShape(8, 2, 64, 128, True)
    experts, norm = create_experts(shape, HALF, all_apart), RMSNorm(shape.hidden_size, 1e-5).to(DEVICE, HALF)
    weights = []
    for projections in (experts.gate_up_proj, experts.down_proj):
        quantized, scales = quantize_weight(projections.weight.data)
        weights.append(Weights(quantized, None, scales))
        projections.weight.data = quantized.float() * scales[..., None]
    total = random(num_tokens, shape.hidden_size, dtype=HALF)
    stream = ResidualStream(total.clone())
    with torch.inference_mode():
        ExpertMixture(shape, 16, HALF, DEVICE)(stream, Norm(norm.weight, norm.eps), experts.router.weight, *weights)
        made = experts.float()(norm(total).float())
    assert relative_error(stream.total.float() - total, made) < 3 * TOLERANCE[HALF]


GROUPS = {
    "mxfp4": WeightFormat(layout=WeightLayout.MXFP4, group_size=32),
    "4 bits, zeros": WeightFormat(layout=WeightLayout.AWQ, group_size=32, has_zeros=True),
    "4 bits, act-order": WeightFormat(layout=WeightLayout.GPTQ, group_size=32, has_zeros=True, has_order=True),
    "4 bits, one group": WeightFormat(layout=WeightLayout.PACKED),
    "8 bits": WeightFormat(layout=WeightLayout.FP8, group_size=32, block_rows=32),
}
GROUP_SHAPES = {
    "tiles that divide": ExpertShape(4, 2, 64, 128, True),
    "biases, tiles that do not": ExpertShape(3, 2, 96, 160, True, 1.5, 1.3),
}
WITHOUT_TILES = ExpertShape(5, 2, 48, 80, True)
"""Sizes that tensor cores take no codes of."""


def create_coded(projections: ExpertProjections, weight_format: WeightFormat) -> QuantizedExperts:
    """Random codes, scales, zeros and orders in place of a projection's weights, and the same bias."""
    num_experts, num_outputs, num_inputs = projections.weight.shape
    has_bias, dtype = projections.bias is not None, projections.weight.dtype
    coded = QuantizedExperts(num_experts, num_inputs, num_outputs, weight_format, has_bias=has_bias, dtype=dtype)
    coded.to_empty(device=DEVICE).reset_parameters()
    if weight_format.layout is WeightLayout.MXFP4:
        coded.scales.data = torch.randint(122, 126, coded.scales.shape, dtype=torch.uint8, device=DEVICE)
    else:
        coded.scales.data = ((0.5 + torch.rand(coded.scales.shape, device=DEVICE)) / 20).to(coded.scales)
    if coded.order is not None:
        orders = [torch.randperm(num_inputs, device=DEVICE) for _ in range(num_experts)]
        coded.order.data = torch.stack(orders).int()
    coded.bias = projections.bias
    return coded


def check_coded(
    shape: ExpertShape, weight_format: WeightFormat, num_tokens: int, dtype: torch.dtype = HALF, *,
    deterministic: bool = False,
) -> None:  # fmt: skip
    """Compare the kernels with the layer of the same codes, in float32."""
    torch.manual_seed(num_tokens)
    experts, norm = create_experts(shape, dtype, all_apart), RMSNorm(shape.hidden_size, 1e-5).to(DEVICE, dtype)
    weights = []
    for projections in (experts.gate_up_proj, experts.down_proj):
        coded = create_coded(projections, weight_format)
        weights.append(Weights(coded.weight, coded.bias, groups=coded.groups))
        projections.weight.data = torch.stack([coded.dequantized(i) for i in range(shape.num_experts)])
    total = random(num_tokens, shape.hidden_size, dtype=dtype)
    stream = ResidualStream(total.clone())
    mixture = ExpertMixture(shape, 150, dtype, DEVICE, deterministic=deterministic)
    router = experts.router
    with torch.inference_mode():
        mixture(stream, Norm(norm.weight, norm.eps), router.weight, *weights, router.bias)
        made = experts.float()(norm(total).float())
    assert relative_error(stream.total.float() - total, made) < 3 * TOLERANCE[dtype]


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("shape", GROUP_SHAPES.values(), ids=GROUP_SHAPES)
def test_experts_in_groups_equal_the_layer(name, shape):
    """One token, and so many that tiles are larger and sums are not scaled one by one."""
    for num_tokens in (1, 60):
        check_coded(shape, GROUPS[name], num_tokens)


@pytest.mark.parametrize("name", ["mxfp4", "4 bits, zeros", "8 bits"])
def test_experts_in_groups_written_out_deterministic_and_in_float32(name, monkeypatch):
    shape = GROUP_SHAPES["tiles that divide"]
    check_coded(shape, GROUPS[name], 9, torch.float32)
    check_coded(shape, GROUPS[name], 9, deterministic=True)
    monkeypatch.setattr(kernels, "WRITTEN_OUT_PAIRS", 4)
    monkeypatch.setattr(kernels, "WRITTEN_OUT_PAIRS_OF_MXFP4", 4)
    check_coded(shape, GROUPS[name], 9)


def test_experts_without_tiles_are_written_out():
    check_coded(WITHOUT_TILES, WeightFormat(layout=WeightLayout.AWQ, group_size=8, has_zeros=True), 9)


def test_logits_that_are_not_numbers_harm_nobody_else():
    """A token that holds NaN goes to experts that exist, and the others get what they would without it."""
    torch.manual_seed(0)
    shape = ExpertShape(5, 2, 40, 104, True)
    experts = create_experts(shape, torch.float32, all_apart)
    weights = Weights(experts.gate_up_proj.weight), Weights(experts.down_proj.weight)
    norm = Norm(torch.ones(shape.hidden_size, device=DEVICE), 1e-5)
    total = random(6, shape.hidden_size)
    results = []
    for value in (0.0, torch.nan):
        stream = ResidualStream(total.clone())
        stream.total[2] = value
        with torch.inference_mode():
            ExpertMixture(shape, 8, torch.float32, DEVICE)(stream, norm, experts.router.weight, *weights)
        results.append(stream.total)
    others = [0, 1, 3, 4, 5]
    assert results[1][2].isnan().all()
    torch.testing.assert_close(results[1][others], results[0][others])
