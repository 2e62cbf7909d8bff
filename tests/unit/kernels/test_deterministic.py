"""Batch invariance: a row's product and a token's attention, bit by bit, are the same in any company.

On a CPU the kernels run in Triton's interpreter, whose own products sum in a fixed order here; on a GPU they are real.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from llm.core.paged_kv_cache import PagedKVCache
from llm.core.recurrent_state import RecurrentStates
from llm.kernels.attention.prefill import paged_prefill, prefill_block_tokens
from llm.kernels.attention.work import Scoring, StepParts, WorkItems, num_prefill_items, plan_prefills
from llm.kernels.linear import Linear, Weights
from llm.kernels.norm import Norm, ResidualStream
from llm.models.decoder import DecoderModel
from llm.models.kernel_operations import KernelOperations
from llm.models.kernel_workspace import KernelWorkspace
from llm.models.packed_step import PackedStep, StepTokens

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # the interpreter takes bfloat16 for integers
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
PAGE_SIZE = 16


def sum_in_order(
    builder: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, *options: object
) -> TensorHandle:
    """a @ b + d, each number summed over the inner dimension from first to last, whatever the shapes.

    The interpreter itself asks numpy, whose BLAS picks a kernel, and with it an order of summation, by the shapes and
    the processor: on some machines `(a @ b)[:n]` differs from `a[:n] @ b`, which says nothing about the kernels here.
    """
    total = np.zeros_like(d.data)
    term = np.empty_like(total)
    wide_a, wide_b = a.data.astype(total.dtype), b.data.astype(total.dtype)
    for k in range(wide_b.shape[0]):
        np.multiply(wide_a[:, k, None], wide_b[k], out=term)
        total += term
    return TensorHandle(total + d.data, d.dtype.scalar)


@pytest.fixture(autouse=True)
def products_sum_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the interpreter only: a GPU's product has an order of its own, which these tests then check."""
    monkeypatch.setattr(InterpreterBuilder, "create_dot", sum_in_order)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖; NaN where something was not written."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def ints(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize(
    ("num_outputs", "num_inputs", "dtype"),
    [
        (64, 256, HALF), (192, 2048, HALF), (72, 1000, HALF), (33, 90, HALF), (128, 8192, HALF),
        (72, 1000, torch.float32), (33, 90, torch.float32),  # of which every shape is cut alike
    ],
    ids=["one part", "cut sum", "odd sizes", "odder sizes", "wide tile", "odd sizes float32", "odder sizes float32"],
)  # fmt: skip
def test_row_of_a_product_does_not_depend_on_the_others(num_outputs, num_inputs, dtype):
    """One row, few, a whole tile, several blocks of rows: sums cut among programs and in one."""
    torch.manual_seed(0)
    sizes = [1, 2, 17, 32, 33, 100] if dtype is torch.float32 else [1, 2, 16, 17, 100, 256, 300, 600]
    x = torch.randn(sizes[-1], num_inputs, device=DEVICE).to(dtype)
    weight = torch.randn(num_outputs, num_inputs, device=DEVICE).to(dtype)
    bias = torch.randn(num_outputs, device=DEVICE).to(dtype)
    linear = Linear(DEVICE, deterministic=True)
    weights = Weights(weight, bias)
    whole = linear(x, weights)
    assert relative_error(whole, F.linear(x.double(), weight.double(), bias.double())) < TOLERANCE[dtype]
    for size in sizes[:-1]:
        # At another place of the tile than among all rows; what costs little at the same place too.
        for first in (0, 41) if size < 32 else (41,):
            alone = linear(x[first : first + size].contiguous(), weights)
            assert torch.equal(alone, whole[first : first + size]), f"{size} rows from {first}"


def test_mlp_of_a_row_does_not_depend_on_the_others():
    torch.manual_seed(0)
    x, norm = torch.randn(70, 256, device=DEVICE).to(HALF), Norm(torch.ones(256, device=DEVICE, dtype=HALF), 1e-6)
    gate_up = Weights(torch.randn(2 * 128, 256, device=DEVICE).to(HALF) / 16)
    down = Weights(torch.randn(256, 128, device=DEVICE).to(HALF) / 16)
    whole, alone = ResidualStream(x.clone()), ResidualStream(x[3:4].clone())
    for stream in (whole, alone):
        Linear(DEVICE, deterministic=True).mlp(stream, norm, gate_up, down)
    assert torch.equal(alone.total, whole.total[3:4])
    wide = x.double()
    normed = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    gate, up = F.linear(normed, gate_up.weight.double()).chunk(2, -1)
    expected = wide + F.linear(F.silu(gate) * up, down.weight.double())
    assert relative_error(whole.total, expected) < 2 * TOLERANCE[HALF]


def attend(query, kv_pages, tables, lens: list[tuple[int, int, int]], window, scoring) -> torch.Tensor:
    """Attention of a step of parts (row, new tokens, context), whose queries follow each other in `query`."""
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = kv_pages.shape[3]
    starts = [sum(new for _, new, _ in lens[:i]) for i in range(len(lens))]
    rows, news, contexts = zip(*lens, strict=True)
    parts = StepParts(ints(list(rows)), ints(starts), ints(list(news)), ints(list(contexts)))
    block_tokens = prefill_block_tokens(num_heads, num_kv_heads, head_dim * query.itemsize)
    items = WorkItems.allocate(num_prefill_items(num_tokens, parts.num_parts, block_tokens, 1), parts.num_parts, DEVICE)
    plan_prefills(parts, items, block_tokens, 1)
    output = torch.full(query.shape, torch.nan, dtype=query.dtype, device=DEVICE)
    paged_prefill(query, kv_pages, tables, parts, items, window, output, scoring=scoring, deterministic=True)
    return output


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "dtype"),
    [(8, 2, 16, HALF), (6, 1, 24, torch.float32), (4, 4, 32, HALF)],
)
@pytest.mark.parametrize(("window", "is_plain"), [(None, True), (1, True), (50, True), (130, True), (50, False)])
def test_attention_of_a_token_does_not_depend_on_its_chunk(num_heads, num_kv_heads, head_dim, window, is_plain, dtype):
    """A prompt at once, in chunks beside another's, and token by token."""
    torch.manual_seed(num_heads)
    num_tokens, num_pages = 150, 10
    kv_pages = torch.randn(2, 2 * num_pages, PAGE_SIZE, num_kv_heads, head_dim, device=DEVICE).to(dtype)
    tables = torch.randperm(2 * num_pages, device=DEVICE).view(2, num_pages).int()
    query = torch.randn(num_tokens, num_heads, head_dim, device=DEVICE).to(dtype)
    scoring = None if is_plain else Scoring(0.2, 1.5, torch.randn(num_heads, device=DEVICE))
    whole = attend(query, kv_pages, tables, [(1, num_tokens, num_tokens)], window, scoring)
    other = torch.randn(3, num_heads, head_dim, device=DEVICE).to(dtype)
    start = 0
    for end in (7, 71, 72, 140, 150):
        step = torch.cat([other, query[start:end]])
        chunk = attend(step, kv_pages, tables, [(0, 1, 20), (0, 2, 99), (1, end - start, end)], window, scoring)
        assert not chunk.isnan().any()
        assert torch.equal(chunk[3:], whole[start:end]), f"tokens {start} to {end}"
        start = end
    for i in (0, 1, 63, 64, 65, 149):
        alone = attend(query[i : i + 1], kv_pages, tables, [(1, 1, i + 1)], window, scoring)
        assert torch.equal(alone, whole[i : i + 1])
    fast_parts = StepParts(ints([1]), ints([0]), ints([num_tokens]), ints([num_tokens]))
    block_tokens = prefill_block_tokens(num_heads, num_kv_heads, head_dim * query.itemsize)
    items = WorkItems.allocate(num_prefill_items(num_tokens, 1, block_tokens), 1, DEVICE)
    plan_prefills(fast_parts, items, block_tokens)
    fast = torch.full_like(whole, torch.nan)
    paged_prefill(query, kv_pages, tables, fast_parts, items, window, fast, scoring=scoring)
    assert relative_error(whole, fast) < 2 * TOLERANCE[dtype]


LATENTS = {
    "architecture": "DeepseekV3ForCausalLM", "num_kv_heads": 1, "head_dim": 40, "attention_scale": 0.2,
    "latent": {"rank": 32, "query_rank": 64, "plain_dim": 16, "rope_dim": 8, "value_dim": 16},
}  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    [{}, {"architecture": "Qwen3MoeForCausalLM", "num_experts": 6, "expert_size": 32}, LATENTS],
    ids=["mlp", "experts", "latents"],
)
def test_logits_do_not_depend_on_chunks_and_company(kind):
    """A sequence token by token and alone, and at once beside another: the same logits for its last token."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    model = DecoderModel(vocab_size=80, max_seq_len=64, device=DEVICE, dtype=HALF, qk_norm=True, **{**shape, **kind})
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    ids = torch.randint(0, 80, (2, 10)).tolist()

    def last_logits(steps: list[list[tuple[int, int, int]]]) -> torch.Tensor:
        """Logits of row 0's last token, after steps of parts (row, start, end)."""
        kv_cache = PagedKVCache(
            model.page_groups, num_pages=8, page_size=8, num_kv_heads=model.num_kv_heads,
            head_dim=model.config.head_size, has_values=model.config.latent is None, device=DEVICE, dtype=HALF,
        )  # fmt: skip
        workspace = KernelWorkspace(
            model, kv_cache, RecurrentStates({}, 2, DEVICE, HALF), ints([[[3, 1], [0, 5]]]), ints([0, 0]),
            max_tokens=64, max_parts=4, deterministic=True,
        )  # fmt: skip
        for step in steps:
            tokens = StepTokens(
                ints([ids[row][i] for row, start, end in step for i in range(start, end)]),
                ints([i for _, start, end in step for i in range(start, end)]),
                ints([row for row, start, end in step for _ in range(start, end)]),
            )
            query_lens = [end - start for _, start, end in step]
            starts = [sum(query_lens[:i]) for i in range(len(step))]
            parts = StepParts(
                ints([row for row, _, _ in step]), ints(starts), ints(query_lens), ints([end for _, _, end in step])
            )
            part = [row for row, _, _ in step].index(0)
            last = ints([starts[part] + query_lens[part] - 1])
            hidden = torch.empty(1, 64, dtype=HALF, device=DEVICE)
            step = PackedStep(tokens, parts, last, has_prefills=max(query_lens) > 1)
            model.run(KernelOperations(workspace, step, hidden))
        return model.logits(hidden, workspace.head)

    with torch.inference_mode():
        alone = last_logits([[(0, i, i + 1)] for i in range(10)])
        together = last_logits([[(1, 0, 10), (0, 0, 7)], [(1, 0, 10), (0, 7, 10)]])
    assert alone.isfinite().all()
    assert torch.equal(alone, together)
