"""Experts with each token's adapters against the plain layer: by Triton's interpreter, or on a GPU."""

import numpy as np
import pytest
import torch
from test_adapter_kernels import HALF, NUM_SLOTS, entries_of
from test_experts import (
    DEVICE,
    GROUPS,
    SHAPES,
    TOLERANCE,
    all_apart,
    create_coded,
    create_experts,
    random,
    relative_error,
)

from llm.kernels.experts import ExpertMixture
from llm.kernels.linear import Weights
from llm.kernels.norm import Norm, ResidualStream
from llm.kernels.quantization import quantize_weight
from llm.kernels.routing import ExpertShape
from llm.models.adapters import AdaptedModule, AdapterLayout, AdapterMemory, TokenAdapters
from llm.models.experts import Experts
from llm.models.kernel_adapters import KernelAdapters
from llm.models.kernel_arguments import weights_of
from llm.models.layers import RMSNorm


def memory_of(experts: Experts, rank: int, dtype: torch.dtype) -> AdapterMemory:
    """Random adapters on the router and on all projections, in slots of this rank."""
    num_experts, size, hidden_size = experts.num_experts, experts.size, experts.router.weight.shape[1]
    shapes = {
        "router": (hidden_size, num_experts, 1, ((0, 0, num_experts),), None),
        "gate_up_proj": (hidden_size, 2 * size, 2, ((0, 0, size), (1, size, 2 * size)), num_experts),
        "down_proj": (size, hidden_size, 1, ((0, 0, hidden_size),), num_experts),
    }
    modules, end = {}, 0
    for name, (num_inputs, num_outputs, num_parts, ranges, stack) in shapes.items():
        first_b = end + (stack or 1) * num_parts * rank * num_inputs
        first_b = -(-first_b // 64) * 64
        modules[name] = AdaptedModule(num_inputs, num_outputs, num_parts, ranges, end, first_b, stack)
        end = -(-(first_b + (stack or 1) * num_outputs * rank) // 64) * 64
    memory = AdapterMemory(experts, AdapterLayout(modules, rank, end), NUM_SLOTS, dtype)
    memory.slots.normal_(std=0.15)
    memory.ranks[:] = rank
    return memory


def slots_of(num_tokens: int) -> np.ndarray:
    """Of each token; the last slot is nobody's."""
    slots = np.random.default_rng(num_tokens).integers(-1, NUM_SLOTS - 1, num_tokens).astype(np.int32)
    return np.array([2], np.int32) if num_tokens == 1 else slots


def check(
    experts: Experts, shape: ExpertShape, num_tokens: int, dtype: torch.dtype, rank: int, weights: list[Weights],
    *, deterministic: bool = False,
) -> None:  # fmt: skip
    """Equal to the layer with the same adapters; tokens without one get the bits of a step of the model alone."""
    norm = RMSNorm(shape.hidden_size, 1e-5).to(DEVICE, dtype).requires_grad_(False)
    total = random(num_tokens, shape.hidden_size, dtype=dtype)
    memory = memory_of(experts, rank, dtype)
    slots = slots_of(num_tokens)
    which = entries_of(slots, memory.ranks, deterministic=deterministic)
    mixture = ExpertMixture(shape, num_tokens, dtype, DEVICE, deterministic=deterministic)
    router, offset = experts.router, None if shape.swiglu_limit is None else 0.0
    arguments = (
        Norm(norm.weight, norm.eps, offset),
        router.weight,
        *weights,
        router.bias,
        router.e_score_correction_bias,
    )
    adapters = KernelAdapters(memory, deterministic=deterministic).of_experts(experts, which)
    plain, adapted = ResidualStream(total.clone()), ResidualStream(total.clone())
    with torch.inference_mode():
        mixture(plain, *arguments)
        mixture(adapted, *arguments, adapters=adapters)
        layer = experts.float()
        wide = AdapterMemory(layer, memory.layout, NUM_SLOTS, torch.float32)
        wide.slots.copy_(memory.slots)
        made = layer(norm(total).float(), TokenAdapters(wide, torch.from_numpy(slots).to(DEVICE).long()))
    assert relative_error(adapted.total.float() - total, made) < 4 * TOLERANCE[dtype]
    alone = torch.from_numpy(slots == -1).to(DEVICE)
    assert num_tokens == 1 or torch.equal(adapted.total[alone], plain.total[alone])
    assert relative_error(adapted.total[~alone].float(), plain.total[~alone].float()) > 20 * TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("name", "num_tokens", "dtype", "rank", "deterministic"),
    [
        ("powers of two", 1, HALF, 16, False),
        ("odd shape", 19, HALF, 48, False),
        ("biases and bounds", 40, HALF, 16, False),
        ("large tiles", 150, HALF, 32, False),
        ("sigmoids in groups", 35, torch.float32, 16, True),
        ("biases and bounds of an odd shape", 23, torch.float32, 16, False),
    ],
)
def test_experts_with_adapters_equal_the_layer(name, num_tokens, dtype, rank, deterministic):
    """In 16 bits and in 32, of one token and of many; `large tiles` has the pairs on the left."""
    torch.manual_seed(num_tokens)
    shape = SHAPES[name]
    experts = create_experts(shape, dtype, all_apart).requires_grad_(False)
    weights = [weights_of(experts.gate_up_proj), weights_of(experts.down_proj)]
    check(experts, shape, num_tokens, dtype, rank, weights, deterministic=deterministic)


@pytest.mark.parametrize("name", ["mxfp4", "8 bits", "8 bits by row"])
def test_adapters_on_experts_in_codes(name):
    """They add to what the codes stand for."""
    torch.manual_seed(0)
    shape = ExpertShape(4, 2, 64, 128, True)
    experts = create_experts(shape, HALF, all_apart).requires_grad_(False)
    weights = []
    for part in ("gate_up_proj", "down_proj"):
        projections = getattr(experts, part)
        if name == "8 bits by row":
            quantized, scales = quantize_weight(projections.weight.data)
            weights.append(Weights(quantized, None, scales))
            projections.weight.data = (quantized.float() * scales[..., None]).to(HALF)
        else:
            coded = create_coded(projections, GROUPS[name])
            weights.append(weights_of(coded))
            projections.weight.data = torch.stack([coded.dequantized(i) for i in range(shape.num_experts)])
    check(experts, shape, 20, HALF, 16, weights)
