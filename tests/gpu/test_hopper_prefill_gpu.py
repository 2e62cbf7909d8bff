"""Attention of long chunks on Hopper: against float32, and in engines against the reference backend."""

import pytest
import torch
from known_shapes import SHAPES
from test_shapes_gpu import create_model, create_requests, generate
from torch.nn.functional import scaled_dot_product_attention

from llm.kernels.attention.hopper_prefill import HopperPrefill
from llm.kernels.attention.work import StepParts, WorkItems, num_prefill_items

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not IS_HOPPER, reason="needs a Hopper GPU")]

PAGE_SIZE = 16
CASES = {
    "a tile": [(100, 300)],
    "a whole prompt": [(3000, 3000)],
    "a chunk behind a context": [(2000, 9001)],
    "several, beside decodes": [(1, 900), (2000, 5011), (700, 1500), (1, 1), (2, 2), (129, 4097), (1900, 1901)],
}


@pytest.mark.parametrize("lens", CASES.values(), ids=CASES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(32, 8, 128), (28, 4, 128), (5, 5, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_8_bits", [False, True])
def test_attention_equals_float32(lens, num_heads, num_kv_heads, head_dim, dtype, has_8_bits):
    """Parts on scattered pages; what belongs to decodes is left alone."""
    torch.manual_seed(0)
    device = torch.device("cuda")
    query_lens, context_lens = zip(*lens, strict=True)
    num_tokens, num_columns = sum(query_lens), -(-max(context_lens) // PAGE_SIZE)
    kv_pages = torch.randn(2, len(lens) * num_columns, PAGE_SIZE, num_kv_heads, head_dim, device=device).to(dtype)
    kv_pages = kv_pages.to(torch.float8_e4m3fn) if has_8_bits else kv_pages
    tables = torch.randperm(len(lens) * num_columns, device=device).view(len(lens), num_columns).int()
    starts = [sum(query_lens[:i]) for i in range(len(lens))]
    fields = [*range(len(lens))], starts, query_lens, context_lens
    parts = StepParts(*(torch.tensor(field, dtype=torch.int32, device=device) for field in fields))
    query = torch.randn(num_tokens, num_heads, head_dim, device=device).to(dtype)
    output = torch.full_like(query, torch.nan)

    num_gathered = sum(context for new, context in lens if new > 1)
    prefill = HopperPrefill(
        num_heads, num_kv_heads, head_dim, max_context=num_gathered + 5,
        max_tokens=num_tokens, max_parts=len(lens), dtype=dtype, device=device,
    )  # fmt: skip
    items = WorkItems.allocate(num_prefill_items(num_tokens, len(lens), 8), len(lens), device)
    prefill.plan(parts, tables, PAGE_SIZE, num_gathered, items)
    prefill(query, kv_pages, parts, items, num_gathered, output)

    for row, (start, new, context) in enumerate(zip(starts, query_lens, context_lens, strict=True)):
        part = slice(start, start + new)
        if new == 1:
            assert output[part].isnan().all()
            continue
        keys, values = kv_pages[:, tables[row].long()].flatten(1, 2)[:, :context].float().transpose(1, 2)
        position = torch.arange(context - new, context, device=device)
        mask = torch.arange(context, device=device)[None, :] <= position[:, None]
        expected = scaled_dot_product_attention(
            query[part].float().transpose(0, 1)[None], keys[None], values[None], mask, enable_gqa=True
        )[0].transpose(0, 1)
        error = (output[part].float() - expected).norm() / expected.norm()
        assert error < {torch.bfloat16: 6e-3, torch.float16: 1e-3}[dtype]


@pytest.mark.parametrize("config", [{}, {"kv_cache_dtype": "fp8"}], ids=["16 bits", "cache of 8 bits"])
def test_log_probabilities_equal_those_from_pages(config, monkeypatch):
    """An engine whose long chunks go this way, and one that reads them from their pages: they differ by rounding."""
    model = create_model(SHAPES["llama-3.1-8b"], torch.bfloat16, max_seq_len=21_000)
    options = {"max_seq_len": 21_000, "num_pages": 2000, "max_tokens_per_step": 8192, **config}
    requests = create_requests([20_000, 100, 5000, 600, 700], max_new_tokens=2, logprobs=0, output_token_ids=(7,))
    gathered = set()
    run = HopperPrefill.__call__

    def noted(self: HopperPrefill, *args: torch.Tensor | int) -> None:
        gathered.add(args[4])
        run(self, *args)

    monkeypatch.setattr(HopperPrefill, "__call__", noted)
    ours = generate(model, "triton", requests, **options)
    assert len(gathered) > 1, "by a graph, and kernel by kernel"
    monkeypatch.setattr("llm.kernels.attention.hopper_prefill.can_run", lambda *_: False)
    expected = generate(model, "triton", requests, **options)
    ours, expected = (torch.tensor([result.logprobs[0].logprob for result in x]) for x in (ours, expected))
    torch.testing.assert_close(ours, expected, rtol=0, atol=0.08)
