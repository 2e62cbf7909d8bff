"""Shrinking and expanding by each token's adapter, against float64: by Triton's interpreter, or on a GPU."""

import itertools

import numpy as np
import pytest
import torch
from test_deterministic import sum_in_order
from triton.runtime.interpreter import InterpreterBuilder

from llm.config import Activation
from llm.kernels.adapted_product import AdaptedProduct, new_flags
from llm.kernels.adapters import (
    ENTRY_FIELDS,
    AdapterEntries,
    AdapterFactors,
    entry_rows,
    expand,
    expand_gated,
    most_entries,
    shrink,
)
from llm.kernels.linear import Linear, Weights
from llm.models.layers import activate
from llm.serving.step_adapters import group_by_adapter

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # the interpreter takes bfloat16 for integers
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
NUM_SLOTS = 5
STEPS = itertools.count()


def entries_of(slots: np.ndarray, ranks: np.ndarray, *, deterministic: bool) -> AdapterEntries:
    """As an engine pads them."""
    rows = entry_rows(len(slots), deterministic=deterministic)
    order, entries = group_by_adapter(slots, ranks, rows)
    padded = np.zeros((most_entries(len(slots), NUM_SLOTS, rows), ENTRY_FIELDS), np.int32)
    padded[: len(entries)] = entries
    active = np.unique(slots[slots >= 0])
    active = np.concatenate([[len(active)], active, np.full(NUM_SLOTS - len(active), 99)]).astype(np.int32)
    tensors = (torch.from_numpy(each).to(DEVICE) for each in (order, padded, slots, active))
    order, entries, slots, active = tensors
    return AdapterEntries(
        order, entries, rows, slots, active, torch.tensor([next(STEPS)], dtype=torch.int32).to(DEVICE)
    )


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(*shape) / 4).to(DEVICE, dtype)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [HALF, torch.float32])
@pytest.mark.parametrize(
    ("num_tokens", "rank", "num_inputs", "ranges"),
    [
        (1, 16, 128, ((0, 0, 64),)),
        (23, 16, 200, ((0, 0, 130), (1, 130, 150), (2, 150, 170))),
        (40, 48, 96, ((0, 0, 20), (1, 20, 40))),
        (300, 16, 64, ((0, 3, 70),)),
        (9, 256, 64, ((0, 0, 40), (1, 48, 64))),
    ],
    ids=["one token", "parts", "odd rank", "many tokens", "largest rank"],
)
def test_tokens_get_what_their_own_adapters_make(num_tokens, rank, num_inputs, ranges, dtype, deterministic):
    """Adapters of lower ranks, tokens without one, outputs of no part: all of it leaves the rest alone."""
    torch.manual_seed(0)
    rng = np.random.default_rng(num_tokens)
    num_outputs = ranges[-1][2] + 5
    num_parts = 1 + max(part for part, _, _ in ranges)
    slots = rng.integers(-1, NUM_SLOTS, num_tokens).astype(np.int32) if num_tokens > 1 else np.array([3], np.int32)
    ranks = np.array([rank, 1, 7, 5, rank // 2], np.int32)
    memory = random(NUM_SLOTS, num_parts * rank * num_inputs + num_outputs * rank + 3, dtype=dtype)
    end = num_parts * rank * num_inputs
    factor_a = memory[:, :end].unflatten(1, (num_parts * rank, num_inputs))
    factor_b = memory[:, end : end + num_outputs * rank].unflatten(1, (num_outputs, rank))
    x, output = random(num_tokens, num_inputs, dtype=dtype), random(num_tokens, num_outputs, dtype=dtype)
    expected = output.double()
    for token, slot in enumerate(slots):
        for part, first, last in ranges if slot >= 0 else ():
            own = slice(part * rank, part * rank + ranks[slot])
            numbers = factor_a[slot, own].double() @ x[token].double()
            expected[token, first:last] += factor_b[slot, first:last, : ranks[slot]].double() @ numbers
    factors, which = (
        AdapterFactors.of(factor_a, factor_b, ranges),
        entries_of(slots, ranks, deterministic=deterministic),
    )
    expand(shrink(x, which, factors, deterministic=deterministic), which, factors, output)
    error = (output.double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[dtype]
    untouched = torch.from_numpy(slots == -1).to(DEVICE)
    assert torch.equal(output[untouched].double(), expected[untouched])


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
def test_a_token_gets_the_same_bits_whatever_is_beside_it(dtype, monkeypatch):
    """If the engine asks for it; other tokens, of its own adapter or of others, make no difference."""
    monkeypatch.setattr(InterpreterBuilder, "create_dot", sum_in_order)
    torch.manual_seed(0)
    rank, num_inputs, num_outputs = 16, 300, 140
    factor_a, factor_b = (random(NUM_SLOTS, *shape, dtype=dtype) for shape in ((rank, num_inputs), (num_outputs, rank)))
    factors = AdapterFactors.of(factor_a, factor_b, ((0, 0, num_outputs),))
    x, ranks = random(290, num_inputs, dtype=dtype), np.full(NUM_SLOTS, rank, np.int32)
    slots = (np.arange(290) % NUM_SLOTS).astype(np.int32)

    def run(tokens: slice) -> torch.Tensor:
        which = entries_of(slots[tokens], ranks, deterministic=True)
        output = torch.zeros(len(slots[tokens]), num_outputs, dtype=dtype, device=DEVICE)
        expand(shrink(x[tokens].contiguous(), which, factors, deterministic=True), which, factors, output)
        return output

    together = run(slice(0, 290))
    for token in (0, 7, 131):
        assert torch.equal(run(slice(token, token + 1))[0], together[token])
    assert torch.equal(run(slice(100, 140)), together[100:140])


def test_entries_hold_each_token_once():
    rng = np.random.default_rng(0)
    ranks = np.arange(1, 9, dtype=np.int32)
    for num_tokens, num_slots in ((1, 1), (16, 1), (17, 2), (64, 8), (300, 8), (5000, 3)):
        slots = rng.integers(-1, num_slots, num_tokens).astype(np.int32)
        rows = entry_rows(num_tokens)
        order, entries = group_by_adapter(slots, ranks, rows)
        assert sorted(order) == list(range(num_tokens))
        assert len(entries) <= most_entries(num_tokens, num_slots, rows)
        covered = 0
        for slot, first, count, rank in entries:
            tokens = order[first : first + count]
            assert (slots[tokens] == (slot if rank else -1)).all()
            assert 0 < count <= rows
            assert (first, rank) == (covered, ranks[slot] if rank else 0)
            covered += count
        assert covered == num_tokens


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
@pytest.mark.parametrize(
    ("num_tokens", "size", "num_parts", "activation"),
    [(23, 150, 2, Activation.SILU), (70, 128, 1, Activation.GELU_TANH)],
    ids=["gate and up", "one part"],
)
def test_gated_expansion_equals_expansion_and_activation(num_tokens, size, num_parts, activation, dtype):
    """For tokens without an adapter too."""
    torch.manual_seed(0)
    rank, num_inputs = 16, 64
    slots = np.random.default_rng(0).integers(-1, NUM_SLOTS, num_tokens).astype(np.int32)
    which = entries_of(slots, np.array([16, 1, 7, 5, 8], np.int32), deterministic=False)
    ranges = ((0, 0, size), (1, size, 2 * size)) if num_parts == 2 else ((0, 0, 2 * size),)
    factor_a = random(NUM_SLOTS, num_parts * rank, num_inputs, dtype=dtype)
    factors = AdapterFactors.of(factor_a, random(NUM_SLOTS, 2 * size, rank, dtype=dtype), ranges)
    x, gate_up = random(num_tokens, num_inputs, dtype=dtype), random(num_tokens, 2 * size, dtype=dtype)
    shrunk = shrink(x, which, factors, deterministic=False)
    output = torch.full((num_tokens, size), torch.nan, dtype=dtype, device=DEVICE)
    expand_gated(shrunk, which, factors, gate_up, output, activation)
    expand(shrunk, which, factors, gate_up)
    gate, up = gate_up.chunk(2, dim=1)
    torch.testing.assert_close(output, activate(gate, activation) * up, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize(
    ("num_rows", "num_inputs", "ranges", "rank"),
    [
        (1, 256, ((0, 0, 64),), 16),
        (23, 256, ((0, 0, 128), (1, 128, 192), (2, 192, 256)), 16),
        (40, 1024, ((0, 0, 128),), 16),
        (64, 2048, ((0, 0, 64),), 32),
        (50, 128, ((0, 64, 128),), 80),
    ],
    ids=["one row", "parts", "blocks of rows", "shared sums", "outputs without adapters"],
)
def test_a_product_with_adapters_equals_its_kernels(num_rows, num_inputs, ranges, rank, adds):
    """In one launch, and by the kernels that shrink, multiply and expand; rows without an adapter bit by bit."""
    torch.manual_seed(0)
    num_outputs, num_parts = ranges[-1][2] if rank != 80 else 192, 1 + max(part for part, _, _ in ranges)
    slots = np.random.default_rng(num_rows).choice([-1, 0, 3, 4], num_rows).astype(np.int32)
    slots[0] = 3
    factor_a, factor_b = factors_of(num_parts * rank, num_inputs, num_outputs, rank)
    factors = AdapterFactors.of(factor_a, factor_b, ranges)
    weights = Weights(random(num_outputs, num_inputs, dtype=HALF), random(num_outputs, dtype=HALF))
    product = AdaptedProduct(weights, factors, 2, 7, new_flags(DEVICE))
    assert product.takes(num_rows, HALF)
    linear, x = Linear(DEVICE), random(num_rows, num_inputs, dtype=HALF)
    before = random(num_rows, num_outputs, dtype=HALF)
    which = entries_of(slots, np.full(NUM_SLOTS, rank, np.int32), deterministic=False)
    output = product.run(linear, x, which, before.clone(), adds=adds)
    expected = torch.nn.functional.linear(x.float(), weights.weight.float(), weights.bias.float())
    expected += before.float() if adds else 0
    plain = linear(x, weights) + (before if adds else 0)
    expand(shrink(x, which, factors, deterministic=False), which, factors, expected)
    error = (output.float() - expected).norm() / expected.norm()
    assert error < TOLERANCE[HALF]
    alone = torch.from_numpy(slots == -1).to(DEVICE)
    assert num_rows == 1 or torch.equal(output[alone], plain[alone])
    assert (output[~alone].float() - plain[~alone].float()).norm() > 0.1 * expected[~alone].norm()
    assert (linear.scratch[1] == 0).all()


def factors_of(num_numbers: int, num_inputs: int, num_outputs: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of all slots, which lie in one memory."""
    end = num_numbers * num_inputs
    memory = random(NUM_SLOTS, end + num_outputs * rank + 64, dtype=HALF)
    factor_b = memory[:, end : end + num_outputs * rank].unflatten(1, (num_outputs, rank))
    return memory[:, :end].unflatten(1, (num_numbers, num_inputs)), factor_b


@pytest.mark.parametrize("activation", [Activation.SILU, Activation.GELU_TANH])
def test_gate_and_up_with_adapters_equal_their_kernels(activation):
    torch.manual_seed(0)
    num_rows, num_inputs, size, rank = 37, 256, 128, 16
    slots = np.random.default_rng(0).integers(-1, NUM_SLOTS, num_rows).astype(np.int32)
    factor_a, factor_b = factors_of(2 * rank, num_inputs, 2 * size, rank)
    factors = AdapterFactors.of(factor_a, factor_b, ((0, 0, size), (1, size, 2 * size)))
    weights = Weights(random(2 * size, num_inputs, dtype=HALF))
    product = AdaptedProduct(weights, factors, 0, 1, new_flags(DEVICE))
    assert product.takes(num_rows, HALF, swiglu=True)
    x = random(num_rows, num_inputs, dtype=HALF)
    which = entries_of(slots, np.full(NUM_SLOTS, rank, np.int32), deterministic=False)
    output = torch.empty(num_rows, size, dtype=HALF, device=DEVICE)
    product.run(Linear(DEVICE), x, which, output, gated_by=activation)
    gate_up = torch.nn.functional.linear(x.float(), weights.weight.float())
    expand(shrink(x, which, factors, deterministic=False), which, factors, gate_up)
    gate, up = gate_up.chunk(2, dim=1)
    expected = activate(gate, activation) * up
    assert (output.float() - expected).norm() / expected.norm() < TOLERANCE[HALF]


def test_each_step_waits_for_its_own_numbers():
    """With the same flags, step after step and product after product."""
    torch.manual_seed(0)
    num_inputs, num_outputs, rank = 128, 128, 16
    weights = Weights(random(num_outputs, num_inputs, dtype=HALF))
    flags, linear, x = new_flags(DEVICE), Linear(DEVICE), random(8, num_inputs, dtype=HALF)
    products = []
    for number in range(2):
        factors = AdapterFactors.of(*factors_of(rank, num_inputs, num_outputs, rank), ((0, 0, num_outputs),))
        products.append(AdaptedProduct(weights, factors, number, 2, flags))
    for slot in (0, 1, 0):
        which = entries_of(np.full(8, slot, np.int32), np.full(NUM_SLOTS, rank, np.int32), deterministic=False)
        for product in products:
            output = product.run(linear, x, which, x.new_empty(8, num_outputs))
            expected = x.float() @ weights.weight.float().t()
            expand(shrink(x, which, product.factors, deterministic=False), which, product.factors, expected)
            assert (output.float() - expected).norm() / expected.norm() < TOLERANCE[HALF]
