"""The gated delta rule by chunks on a GPU, in the shape of Qwen3.6 27B: against float64, beside the walk by tokens."""

import pytest
import torch

from llm.attention.delta_rule import gated_delta_rule as by_torch
from llm.core.recurrent_state import DeltaSpec
from llm.kernels.attention.work import StepParts
from llm.kernels.delta_chunks import LEAST_TOKENS, gated_delta_chunks
from llm.kernels.delta_rule import gated_delta_rule

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SPECS = {"qwen3.6-27b": DeltaSpec(16, 48, 128, 128, 4), "odd heads": DeltaSpec(3, 6, 96, 80, 3)}
LENS = [1, 31, 32, 64, 65, 700, 2048, 3, 500]


def ints(numbers: list[int]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device="cuda")


class Step:
    """Parts that begin and parts that go on, with keys that are alike and decays of all sizes."""

    def __init__(self, spec: DeltaSpec, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.spec, num_tokens, num_heads = spec, sum(LENS), spec.num_value_heads
        shared = torch.randn(spec.conv_size, device="cuda")
        self.convolved = (torch.randn(num_tokens, spec.conv_size, device="cuda") + shared).to(dtype)
        self.decay = torch.randn(num_tokens, 2 * num_heads, device="cuda").to(dtype)
        self.log_rates = torch.linspace(-4, 2, num_heads, device="cuda")
        self.bias = torch.zeros(num_heads, device="cuda", dtype=dtype)
        self.matrices = torch.randn(len(LENS), num_heads, spec.value_dim, spec.key_dim, device="cuda")
        starts = torch.tensor(LENS).cumsum(0).sub(torch.tensor(LENS)).tolist()
        contexts = [length + 100 * (i % 2) for i, length in enumerate(LENS)]
        self.parts = StepParts(ints(list(range(len(LENS)))), ints(starts), ints(LENS), ints(contexts))

    def run(self, *, by_chunks: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs and memories of all parts."""
        matrices = self.matrices.clone()
        output = torch.full((len(self.convolved), self.spec.output_size), torch.nan, device="cuda").to(self.bias.dtype)
        arguments = (
            self.spec, self.convolved, self.decay, self.log_rates, self.bias, matrices, self.parts, output,
        )  # fmt: skip
        gated_delta_rule(*arguments, most_tokens=LEAST_TOKENS - 1 if by_chunks else None)
        if by_chunks:
            gated_delta_chunks(*arguments)
        return output.double(), matrices.double()

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The same by the reference, in float64."""
        spec, outputs, matrices = self.spec, [], []
        sizes = [spec.num_key_heads * spec.key_dim] * 2 + [spec.output_size]
        share, rate = self.decay.double().chunk(2, dim=-1)
        log_decay = -(self.log_rates.double().exp() * torch.nn.functional.softplus(rate))
        first = 0
        for i, length in enumerate(LENS):
            tokens, first = slice(first, first + length), first + length
            query, key, value = self.convolved[tokens].double().split_with_sizes(sizes, dim=-1)
            query, key = (
                (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)).repeat_interleave(
                    spec.num_value_heads // spec.num_key_heads, dim=-2
                )
                for x in (each.view(length, spec.num_key_heads, spec.key_dim) for each in (query, key))
            )
            value = value.view(length, spec.num_value_heads, spec.value_dim)
            output, matrix = by_torch(
                query[None] * spec.key_dim**-0.5, key[None], value[None], log_decay[tokens][None],
                share[tokens].sigmoid()[None], self.matrices[i : i + 1].double() * (i % 2),
            )  # fmt: skip
            outputs.append(output[0].flatten(1))
            matrices.append(matrix)
        return torch.cat(outputs), torch.cat(matrices)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖; NaN where something was not written."""
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_chunks_are_as_exact_as_their_format(spec, dtype):
    """In float32 as good as the walk; in 16 bits within a few roundings of it."""
    step = Step(spec, dtype)
    exact = step.exact()
    for chunks, walk, expected in zip(step.run(by_chunks=True), step.run(by_chunks=False), exact, strict=True):
        errors = error(chunks, expected), error(walk, expected)
        print(f"{spec} {dtype}: chunks {errors[0]:.2e}, walk {errors[1]:.2e}")
        limit = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        assert errors[0] < limit
