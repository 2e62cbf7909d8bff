"""Experts on a GPU, in the shapes of Qwen3-30B-A3B and gpt-oss-20b, against the plain layer on fresh random inputs."""

import pytest
import torch

from llm.config import WeightFormat, WeightLayout
from llm.kernels.experts import ExpertMixture
from llm.kernels.linear import Weights
from llm.kernels.norm import Norm, ResidualStream
from llm.kernels.quantization import quantize_weight
from llm.kernels.routing import ExpertShape
from llm.models.experts import ExpertProjections, Experts
from llm.models.layers import RMSNorm
from llm.models.quantized import QuantizedExperts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPE = ExpertShape(num_experts=128, per_token=8, size=768, hidden_size=2048, normalizes=True)
GPT_OSS = ExpertShape(num_experts=32, per_token=4, size=2880, hidden_size=2880, normalizes=True, swiglu_limit=1.5)
"""That of gpt-oss-20b, with bounds that are reached."""
MAX_TOKENS = 8192


FORMATS = {
    "mxfp4": (GPT_OSS, WeightFormat(layout=WeightLayout.MXFP4, group_size=32)),
    "awq": (SHAPE, WeightFormat(layout=WeightLayout.AWQ, group_size=128, has_zeros=True)),
    "gptq act-order, 32": (
        SHAPE,
        WeightFormat(layout=WeightLayout.GPTQ, group_size=32, has_zeros=True, has_order=True),
    ),
    "fp8 blocks": (SHAPE, WeightFormat(layout=WeightLayout.FP8, group_size=128, block_rows=128)),
}


def coded(projections: ExpertProjections, weight_format: WeightFormat) -> Weights:
    """Random codes, scales, zeros and orders of a projection's shape, and its bias."""
    num_experts, num_outputs, num_inputs = projections.weight.shape
    made = QuantizedExperts(
        num_experts, num_inputs, num_outputs, weight_format, has_bias=False, dtype=torch.bfloat16
    ).to_empty(device="cuda")
    made.reset_parameters()
    if weight_format.layout is WeightLayout.MXFP4:
        made.scales.data = torch.randint(118, 123, made.scales.shape, dtype=torch.uint8, device="cuda")
    else:
        # Twice as wide as they are made: what experts add to the stream is then far more than its rounding.
        factors = 1 + 2 * torch.rand(made.scales.shape, device="cuda")
        made.scales.data = (made.scales.float() * factors).to(made.scales)
    if made.order is not None:
        made.order.data = torch.rand(num_experts, num_inputs, device="cuda").argsort(-1).int()
    made.join()
    exact = torch.stack([made.dequantized(expert) for expert in (0, num_experts - 1)])
    weights = Weights(made.weight, projections.bias, groups=made.groups)
    written = weights.written_out(torch.float32).weight
    torch.testing.assert_close(written[[0, -1]], exact, rtol=1e-5, atol=0)
    return weights


class Layer:
    """A layer of experts, as the plain modules and as the kernels have it."""

    def __init__(
        self,
        shape: ExpertShape = SHAPE,
        weight_format: WeightFormat | None = None,
        *,
        is_rounded: bool = False,
        deterministic: bool = False,
    ) -> None:
        with torch.device("cuda"):
            self.experts = Experts(
                shape.hidden_size, shape.size, shape.num_experts, shape.per_token, normalizes=True,
                has_bias=shape.swiglu_limit is not None, swiglu_limit=shape.swiglu_limit,
            ).bfloat16()  # fmt: skip
            self.norm = RMSNorm(shape.hidden_size, 1e-6).bfloat16()
        for parameter in self.experts.parameters():
            parameter.data.normal_(std=0.03)
        self.norm.weight.data.uniform_(0.5, 1.5)
        self.mixture = ExpertMixture(
            shape, MAX_TOKENS, torch.bfloat16, torch.device("cuda"), deterministic=deterministic
        )
        self.weights = []
        for projections in (self.experts.gate_up_proj, self.experts.down_proj):
            weights = Weights(projections.weight.data, projections.bias)
            if weight_format is not None:
                weights = coded(projections, weight_format)
                projections.weight.data = weights.written_out(torch.float32).weight.bfloat16()
            if is_rounded:
                rounded, scales = quantize_weight(projections.weight.data)
                weights = Weights(rounded, projections.bias, scales)
                projections.weight.data = (rounded.float() * scales[..., None]).bfloat16()
            self.weights.append(weights)

    def add(self, total: torch.Tensor) -> None:
        """By the kernels, in place."""
        norm = Norm(self.norm.weight, self.norm.eps)
        router = self.experts.router
        self.mixture(ResidualStream(total), norm, router.weight, *self.weights, router.bias)

    def error(self, total: torch.Tensor, after: torch.Tensor) -> float:
        """‖what the kernels added − what the layer adds‖ / ‖what the layer adds‖."""
        made = self.experts(self.norm(total)).float()
        return float((after.float() - total.float() - made).norm() / made.norm())


@pytest.mark.parametrize("shape", [SHAPE, GPT_OSS], ids=["qwen3-30b-a3b", "gpt-oss-20b"])
@pytest.mark.parametrize("is_rounded", [False, True], ids=["bf16", "fp8"])
@torch.inference_mode()
def test_mixture_equals_the_layer(shape, is_rounded):
    """From one token to the largest step, wherever another shape of tile begins."""
    torch.manual_seed(0)
    layer = Layer(shape, is_rounded=is_rounded)
    for num_tokens in (1, 2, 16, 17, 64, 130, 256, 300, 700, 1024, 1025, 2048, MAX_TOKENS):
        total = torch.randn(num_tokens, shape.hidden_size, device="cuda").bfloat16()
        after = total.clone()
        layer.add(after)
        assert layer.error(total, after) < 2e-2, num_tokens


@pytest.mark.parametrize("name", FORMATS)
@torch.inference_mode()
def test_experts_in_groups_equal_the_layer(name):
    """In their codes, from one token to where they are written out."""
    torch.manual_seed(0)
    shape, weight_format = FORMATS[name]
    layer = Layer(shape, weight_format)
    for num_tokens in (1, 2, 16, 17, 64, 130, 256, 300, 700, 1025, 2048, MAX_TOKENS):
        total = torch.randn(num_tokens, shape.hidden_size, device="cuda").bfloat16()
        after = total.clone()
        layer.add(after)
        assert layer.error(total, after) < 2e-2, num_tokens


@torch.inference_mode()
def test_a_captured_step_goes_where_its_tokens_go():
    """Replayed with other tokens a graph goes by their experts, all of them in one place included."""
    torch.manual_seed(0)
    layer = Layer()
    for num_tokens in (1, 48, 900):
        total = torch.randn(num_tokens, 2048, device="cuda").bfloat16()
        layer.add(total.clone())
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            layer.add(total)
        for same in (False, True):
            before = torch.randn(1 if same else num_tokens, 2048, device="cuda").bfloat16().expand(num_tokens, 2048)
            total.copy_(before)
            graph.replay()
            assert layer.error(before, total) < 2e-2, (num_tokens, same)


@pytest.mark.parametrize("name", ["bf16", "fp8", *FORMATS])
@torch.inference_mode()
def test_deterministic_tokens_do_not_depend_on_each_other(name):
    """Bit by bit, whatever tiles the number of tokens asks for."""
    torch.manual_seed(0)
    shape, weight_format = FORMATS.get(name, (SHAPE, None))
    layer = Layer(shape, weight_format, is_rounded=name == "fp8", deterministic=True)
    total = torch.randn(4000, shape.hidden_size, device="cuda").bfloat16()
    whole = total.clone()
    layer.add(whole)
    assert layer.error(total, whole) < 2e-2
    for size in (1, 2, 16, 17, 64, 130, 256, 700, 1100):
        for first in (0, 129):
            part = total[first : first + size].clone()
            layer.add(part)
            assert torch.equal(part, whole[first : first + size]), f"{size} tokens from {first}"
