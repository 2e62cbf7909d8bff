"""The gated delta rule's kernels against plain PyTorch: by Triton's interpreter, or on a GPU."""

from collections.abc import Iterator

import pytest
import torch

from llm.attention.delta_rule import mix_tokens
from llm.core.recurrent_state import DeltaSpec, RecurrentState
from llm.kernels.attention.gates import gate_heads
from llm.kernels.attention.work import StepParts
from llm.kernels.delta_chunks import LEAST_TOKENS, gated_delta_chunks
from llm.kernels.delta_rule import gate_by_norm, gated_delta_rule, short_convolution, store_tails
from llm.kernels.quantization import ScaledProduct
from llm.models.delta import DeltaMixer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # the interpreter takes bfloat16 for integers
SPECS = {
    "groups of three heads": DeltaSpec(2, 6, 16, 16, 4),
    "odd sizes": DeltaSpec(1, 2, 20, 12, 3),
    "two tokens in the convolution": DeltaSpec(2, 2, 16, 8, 2),
}
NUM_ROWS = 6


def ints(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def create_mixer(spec: DeltaSpec, dtype: torch.dtype) -> DeltaMixer:
    torch.manual_seed(1)
    mixer = DeltaMixer(spec, 1e-6).to(DEVICE, dtype)
    for name, parameter in mixer.named_parameters():
        parameter.data.uniform_(0.5, 1.5) if "norm" in name else parameter.data.normal_()
    return mixer.requires_grad_(False)


def create_states(spec: DeltaSpec, dtype: torch.dtype) -> RecurrentState:
    """Full of what earlier sequences left."""
    zeros = RecurrentState.zeros(spec, NUM_ROWS, DEVICE, dtype)
    return RecurrentState(torch.randn_like(zeros.tail), torch.randn_like(zeros.matrix))


def run_kernels(
    spec: DeltaSpec, mixer: DeltaMixer, mixed: torch.Tensor | ScaledProduct, decay: torch.Tensor,
    state: RecurrentState, parts: list[tuple[int, int, int]], num_padding: int = 3, *, by_chunks: bool = False,
) -> torch.Tensor:  # fmt: skip
    """A step of (row, start, tokens) parts, with padding behind tokens and parts; outputs of the real tokens."""
    rows, starts, lens = zip(*parts, strict=True)
    ends = torch.tensor(lens).cumsum(0).tolist()
    num_tokens = ends[-1]
    token_rows = [row for row, _, num in parts for _ in range(num)] + [NUM_ROWS - 1] * num_padding
    positions = [start + i for _, start, num in parts for i in range(num)] + [0] * num_padding
    tokens = ints(*token_rows), ints(*positions)
    none = [0] * num_padding
    step = StepParts(
        ints(*rows, *[NUM_ROWS - 1] * num_padding), ints(*(e - n for e, n in zip(ends, lens, strict=True)), *none),
        ints(*lens, *none), ints(*(s + n for s, n in zip(starts, lens, strict=True)), *none),
    )  # fmt: skip
    convolved = torch.full((num_tokens + num_padding, spec.conv_size), torch.nan, device=DEVICE, dtype=decay.dtype)
    output = torch.full((num_tokens + num_padding, spec.output_size), torch.nan, device=DEVICE, dtype=decay.dtype)
    short_convolution(mixed, mixer.conv1d.weight, state.tail, *tokens, convolved)
    if max(lens) > 1:
        store_tails(mixed, state.tail, step)
    rule = spec, convolved, decay, mixer.A_log, mixer.dt_bias, state.matrix, step, output
    gated_delta_rule(*rule, most_tokens=LEAST_TOKENS - 1 if by_chunks else None)
    if by_chunks:
        gated_delta_chunks(*rule)
    gate_by_norm(spec, mixed, mixer.norm.weight, mixer.norm.eps, output)
    return output[:num_tokens]


def run_torch(
    spec: DeltaSpec, mixer: DeltaMixer, mixed: torch.Tensor, decay: torch.Tensor, state: RecurrentState,
    parts: list[tuple[int, int, int]],
) -> Iterator[torch.Tensor]:  # fmt: skip
    """The same by the reference, a part at a time; it writes `state` too."""
    first = 0
    for row, start, num in parts:
        tokens, first = slice(first, first + num), first + num
        inputs, gate = mixed[tokens].split_with_sizes((spec.conv_size, spec.output_size), dim=-1)
        share, rate = decay[tokens, : 2 * spec.num_value_heads].chunk(2, dim=-1)
        before = RecurrentState(*(tensor[row : row + 1] * (start > 0) for tensor in state))
        output, after = mix_tokens(
            spec, inputs[None], mixer.conv1d.weight, mixer.log_decay(rate)[None], share.float().sigmoid()[None], before
        )
        for own, new in zip(state, after, strict=True):
            own[row] = new[0]
        yield mixer.gated_norm(output[0], gate.view_as(output[0])).flatten(-2)


def create_inputs(spec: DeltaSpec, num_tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """With room for padding."""
    torch.manual_seed(num_tokens)
    width = spec.conv_size + spec.output_size
    return random(num_tokens + 3, width, dtype=dtype), random(num_tokens + 3, 2 * spec.num_value_heads + 5, dtype=dtype)


STEPS = {
    "decodes": [(2, 5, 1), (0, 1, 1), (4, 0, 1), (1, 2, 1)],
    "prefills": [(3, 0, 1), (1, 4, 1), (0, 0, 7), (2, 9, 2), (4, 1, 2)],
}
CHUNKS = [(1, 7, 1), (3, 0, 100), (0, 9, 70), (2, 5, LEAST_TOKENS), (4, 3, LEAST_TOKENS - 1)]
"""Chunks in part and in whole, of parts that begin and go on, beside parts that are walked through."""


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_chunks_equal_the_reference(spec, dtype):
    check_step(spec, CHUNKS, dtype, by_chunks=True)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("parts", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_step_equals_the_reference(spec, parts, dtype):
    check_step(spec, parts, dtype)


def check_step(
    spec: DeltaSpec, parts: list[tuple[int, int, int]], dtype: torch.dtype, *, by_chunks: bool = False
) -> None:
    """Rows that go on and rows that begin among what others left; the states behind them too, and nobody else's."""
    mixer, state = create_mixer(spec, dtype), create_states(spec, dtype)
    for row, start, _ in parts:  # a sequence that has begun has nothing of an earlier one in its tail
        state.tail[row, : max(spec.kernel_size - 1 - start, 0) if start else 0] = 0
    expected_state = RecurrentState(*(tensor.clone() for tensor in state))
    mixed, decay = create_inputs(spec, sum(num for _, _, num in parts), dtype)
    output = run_kernels(spec, mixer, mixed, decay, state, parts, by_chunks=by_chunks)
    expected = torch.cat(list(run_torch(spec, mixer, mixed, decay, expected_state, parts)))
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(output, expected, **tolerance)
    for own, wanted in zip(state, expected_state, strict=True):
        torch.testing.assert_close(own[: NUM_ROWS - 1], wanted[: NUM_ROWS - 1], **tolerance)


def test_chunks_do_not_change_a_bit():
    """A sequence in one step, in two, and token by token, beside another."""
    spec = SPECS["groups of three heads"]
    mixer = create_mixer(spec, HALF)
    mixed, decay = create_inputs(spec, 10, HALF)
    outputs = []
    for chunks in ([10], [4, 6], [3, 1, 2, 4], [1] * 10):
        state, made, first = create_states(spec, HALF), [], 0
        for num in chunks:
            tokens = slice(first, first + num + 3)  # what comes behind stands in for the padding
            made.append(run_kernels(spec, mixer, mixed[tokens].contiguous(), decay[tokens].contiguous(), state,
                                    [(2, first, num)]))  # fmt: skip
            first += num
        outputs.append((torch.cat(made), state.tail[2], state.matrix[2]))
    for other in outputs[1:]:
        assert all(torch.equal(one, two) for one, two in zip(outputs[0], other, strict=True))


def test_products_to_be_scaled_are_read():
    """As 8-bit weights leave them."""
    spec = SPECS["odd sizes"]
    mixer, parts = create_mixer(spec, torch.float32), STEPS["prefills"]
    values, decay = create_inputs(spec, sum(num for _, _, num in parts), torch.float32)
    product = ScaledProduct(values, random(len(values), 1).abs(), random(values.shape[1]), None, torch.float32)
    states = [create_states(spec, torch.float32) for _ in range(2)]
    states[1] = RecurrentState(*(tensor.clone() for tensor in states[0]))
    one = run_kernels(spec, mixer, product, decay, states[0], parts)
    other = run_kernels(spec, mixer, product.scaled(), decay, states[1], parts)
    torch.testing.assert_close(one, other)


def test_gates_scale_heads():
    output, qkv = random(3, 2, 12), random(3, (2 * 2 + 2) * 12)
    expected = output * qkv.view(3, 6, 12)[:, 1:4:2].sigmoid()
    gate_heads(output, qkv)
    torch.testing.assert_close(output, expected)
