"""Products, norms, activation and embedding against the plain layers: by Triton's interpreter, or on a GPU."""

import pytest
import torch
import torch.nn.functional as F

from llm.config import Activation
from llm.kernels.activation import activate_gated
from llm.kernels.linear import MAX_FEW_ROWS, Linear, Weights
from llm.kernels.norm import Norm, ResidualStream, embed_tokens, rms_norm
from llm.kernels.soft_cap import cap_softly
from llm.models.layers import RMSNorm, activate

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
HALF = torch.bfloat16 if ON_GPU else torch.float16  # the interpreter takes bfloat16 for integers
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖; NaN where something was not written."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def norm_of(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """RMSNorm in float64."""
    wide = x.double()
    factor = norm.weight.double() + (norm.offset or 0)
    return wide * (wide.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * factor


def create_norm(hidden_size: int, dtype: torch.dtype, offset: float | None = None) -> Norm:
    return Norm(random(hidden_size, dtype=dtype), 1e-5, offset)


SHAPES = pytest.mark.parametrize(
    ("num_outputs", "num_inputs"), [(128, 1024), (64, 384), (192, 2048), (100, 256)],
    ids=["sum cut in two", "one block", "single tile each", "odd shape"],
)  # fmt: skip


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
@pytest.mark.parametrize("num_rows", [1, 2, 17, 64, 65, 129])
@SHAPES
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_equals_float64(num_rows, num_outputs, num_inputs, has_bias, dtype):
    """Whole sums and cut ones, one row and many, shapes that only the vendor's library takes."""
    torch.manual_seed(num_rows)
    x, weight = random(num_rows, num_inputs, dtype=dtype), random(num_outputs, num_inputs, dtype=dtype)
    bias = random(num_outputs, dtype=dtype) * 30 if has_bias else None
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    linear = Linear(DEVICE)
    for _ in range(2):  # the second call finds the scratch memory as the first left it
        assert relative_error(linear(x, Weights(weight, bias)), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("num_rows", "dtype"), [(1, HALF), (2, HALF), (17, HALF), (65, HALF), (129, HALF), (3, torch.float32)]
)
@SHAPES
def test_products_between_streams_equal_float64(num_rows, num_outputs, num_inputs, dtype):
    """The product of a stream's norm, and one that is added to a stream; with a bias where a sum is cut or odd."""
    has_bias = num_outputs in (128, 100)
    torch.manual_seed(num_rows)
    x, weight = random(num_rows, num_inputs, dtype=dtype) * 3, random(num_outputs, num_inputs, dtype=dtype)
    weights = Weights(weight, random(num_outputs, dtype=dtype) * 30 if has_bias else None)
    bias = 0 if weights.bias is None else weights.bias.double()
    norm, linear = create_norm(num_inputs, dtype), Linear(DEVICE)
    product = linear.of_norm(ResidualStream(x.clone()), norm, weights)
    assert relative_error(product, norm_of(x, norm) @ weight.double().t() + bias) < 2 * TOLERANCE[dtype]

    total = random(num_rows, num_outputs, dtype=dtype) * 30
    stream = ResidualStream(total.clone())
    for _ in range(2):
        linear.add(stream, x, weights)
    expected = total.double() + 2 * (x.double() @ weight.double().t() + bias)
    assert stream.pending is None
    assert relative_error(stream.total, expected) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("num_rows", [1, 3, MAX_FEW_ROWS, 70, 130])
@pytest.mark.parametrize(
    ("size", "hidden_size", "has_bias", "dtype"),
    [(128, 1024, False, HALF), (384, 2048, False, HALF), (60, 128, True, HALF), (60, 128, False, torch.float32)],
)
def test_mlp_equals_float64(num_rows, size, hidden_size, has_bias, dtype):
    """SwiGLU of a stream's norm, added to the stream."""
    torch.manual_seed(num_rows)
    total = random(num_rows, hidden_size, dtype=dtype)
    gate_up = Weights(
        random(2 * size, hidden_size, dtype=dtype) / 16, random(2 * size, dtype=dtype) if has_bias else None
    )
    down = Weights(random(hidden_size, size, dtype=dtype) / 16)
    norm, stream = create_norm(hidden_size, dtype), ResidualStream(total.clone())
    Linear(DEVICE).mlp(stream, norm, gate_up, down)
    bias = 0 if gate_up.bias is None else gate_up.bias.double()
    gate, up = (norm_of(total, norm) @ gate_up.weight.double().t() + bias).chunk(2, -1)
    expected = total.double() + (F.silu(gate) * up) @ down.weight.double().t()
    assert relative_error(stream.total, expected) < 3 * TOLERANCE[dtype]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("num_rows", [1, 3, 70])
@pytest.mark.parametrize(("size", "dtype"), [(128, HALF), (60, HALF), (60, torch.float32)])
def test_a_layer_with_norms_behind_equals_float64(num_rows, size, dtype, deterministic):
    """As Gemma's: a product and a GeGLU, each of whose norms is added to the stream and read by the next norm.

    A single row finds a norm in front of the product that it can take along, and one that it cannot, because
    something is pending.
    """
    torch.manual_seed(num_rows)
    hidden_size = 256
    total, x = random(num_rows, hidden_size, dtype=dtype), random(num_rows, size, dtype=dtype)
    output, gate_up, down = (
        Weights(random(*shape, dtype=dtype) / 8)
        for shape in ((hidden_size, size), (2 * size, hidden_size), (hidden_size, size))
    )
    before, behind, mlp_norm, mlp_behind = (create_norm(hidden_size, dtype, 1.0) for _ in range(4))
    linear, stream = Linear(DEVICE, deterministic=deterministic), ResidualStream(total.clone())
    first = linear.of_norm(stream, before, gate_up)
    assert relative_error(first, norm_of(total, before) @ gate_up.weight.double().t()) < 2 * TOLERANCE[dtype]
    linear.add(stream, x, output, behind)
    linear.mlp(stream, mlp_norm, gate_up, down, Activation.GELU_TANH, mlp_behind)
    final = torch.full_like(total, torch.nan)
    rms_norm(stream, before, final)
    expected = total.double() + norm_of(x.double() @ output.weight.double().t(), behind)
    gate, up = (norm_of(expected, mlp_norm) @ gate_up.weight.double().t()).chunk(2, -1)
    expected += norm_of(F.gelu(gate, approximate="tanh") * up @ down.weight.double().t(), mlp_behind)
    assert stream.pending is None
    assert relative_error(stream.total, expected) < 4 * TOLERANCE[dtype]
    assert relative_error(final, norm_of(expected, before)) < 4 * TOLERANCE[dtype]


def test_a_large_swiglu_of_some_rows_equals_float64():
    """In wide tiles, of which there is about one for each multiprocessor."""
    torch.manual_seed(0)
    size, hidden_size = 107 * 128, 640
    total = random(MAX_FEW_ROWS + 6, hidden_size, dtype=HALF)
    gate_up, down = (random(*shape, dtype=HALF) / 16 for shape in ((2 * size, hidden_size), (hidden_size, size)))
    norm, stream, linear = create_norm(hidden_size, HALF), ResidualStream(total.clone()), Linear(DEVICE)
    linear.mlp(stream, norm, Weights(gate_up), Weights(down))
    gate, up = (norm_of(total, norm) @ gate_up.double().t()).chunk(2, -1)
    expected = total.double() + (F.silu(gate) * up) @ down.double().t()
    assert relative_error(stream.total, expected) < 3 * TOLERANCE[HALF]


def test_a_row_does_not_depend_on_others():
    """Whatever else is in the batch, as long as it takes the same path."""
    torch.manual_seed(0)
    x, weights = random(33, 1024, dtype=HALF), Weights(random(128, 1024, dtype=HALF))
    linear = Linear(DEVICE)
    assert torch.equal(linear(x, weights)[:3], linear(x[:3].contiguous(), weights))


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("hidden_size", [64, 96, 1024])
@pytest.mark.parametrize("offset", [None, 0.0, 1.0])
def test_rms_norm_equals_the_layer(hidden_size, offset, dtype):
    torch.manual_seed(hidden_size)
    total = random(5, hidden_size, dtype=dtype)
    layer = RMSNorm(hidden_size, 1e-5, offset).to(DEVICE, dtype)
    layer.weight.data.normal_()
    output = torch.full_like(total, torch.nan)
    rms_norm(ResidualStream(total), Norm(layer.weight.data, 1e-5, offset), output)
    assert relative_error(output, layer(total)) < TOLERANCE[dtype]


@pytest.mark.parametrize("size", [24, 1024, 1500])
@pytest.mark.parametrize("activation", Activation)
def test_gated_activations_equal_torch(size, activation):
    gate_up = random(3, 2 * size, dtype=torch.float32) * 4
    output = torch.full((3, size), torch.nan, device=DEVICE)
    activate_gated(gate_up, output, activation)
    gate, up = gate_up.chunk(2, -1)
    torch.testing.assert_close(output, activate(gate, activation) * up, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_soft_caps_equal_torch(dtype):
    """Near 0, around the cap and far beyond it."""
    logits = torch.cat([random(3, 2000, dtype=dtype) * scale for scale in (0.01, 30, 3000)], 1)
    expected = 30 * torch.tanh(logits.double() / 30)
    cap_softly(logits, 30.0)
    torch.testing.assert_close(logits.double(), expected, rtol=TOLERANCE[dtype], atol=4e-6)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_scaled_embeddings_equal_torch(dtype):
    """The scale is rounded to the embeddings' format, which shows where that is narrow."""
    table = random(50, 24, dtype=dtype)
    ids = torch.arange(50, dtype=torch.int32, device=DEVICE)
    residual = torch.full_like(table, torch.nan)
    embed_tokens(ids, ids, ids, table, residual, 3072**0.5)
    assert torch.equal(residual, table * torch.tensor(3072**0.5, dtype=dtype, device=DEVICE))


def test_embedding_resolves_tokens_that_only_the_device_knows():
    """A negative id is the one that its row drew last."""
    table = random(50, 24, dtype=torch.float32)
    token_ids, last, rows = (
        torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([7, -1, 0, -1], [11, 12, 13], [0, 2, 1, 0])
    )
    residual = torch.full((4, 24), torch.nan, device=DEVICE)
    embed_tokens(token_ids, last, rows, table, residual)
    assert torch.equal(residual, table[torch.tensor([7, 13, 0, 11], device=DEVICE)])


def test_tokens_whose_embeddings_other_ranks_hold_are_zero():
    """The table has the rows of ids 20 to 34."""
    table = random(15, 24, dtype=torch.float32)
    token_ids = torch.tensor([19, 20, 34, 35, -1, 0], dtype=torch.int32, device=DEVICE)
    last = torch.tensor([22], dtype=torch.int32, device=DEVICE)
    residual = torch.full((6, 24), torch.nan, device=DEVICE)
    embed_tokens(token_ids, last, torch.zeros_like(token_ids), table, residual, first_id=20)
    zeros = torch.zeros(24, device=DEVICE)
    assert torch.equal(residual, torch.stack([zeros, table[0], table[14], zeros, table[2], zeros]))
