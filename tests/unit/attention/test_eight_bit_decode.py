"""Decode attention over keys and values of 8 bits against float64, by Triton's interpreter or on a GPU."""

import pytest
import torch

from llm.kernels.attention.decode import PagedDecode
from llm.kernels.attention.work import WorkItems, num_decode_items, plan_decodes
from tests.unit.attention.test_kernels import (
    DEVICE,
    NUM_ROWS,
    create_parts,
    create_scoring,
    expected_attention,
    relative_error,
)

NUM_COLUMNS = 24
FP8_NAN = 0x7F
CASES = [
    (8, 2, 128, 16, None, "plain"),
    (8, 2, 64, 16, 100, "all"),
    (16, 1, 64, 32, 1, "sinks"),
    (4, 4, 128, 48, None, "scale and soft cap"),
    (3, 1, 128, 16, 37, "plain"),
    (20, 1, 64, 64, 130, "plain"),
    (2, 1, 256, 16, None, "sinks"),
]


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim", "page_size", "window", "kind"), CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16] if DEVICE.type == "cuda" else [torch.float16])
def test_decode_over_8_bits_equals_float64(
    num_heads, num_kv_heads, head_dim, page_size, window, kind, dtype, monkeypatch
):
    """Heads of every size that is read in tiles, contexts that end anywhere in a tile, and windows that begin so.

    What lies behind a context in its last page, and in page 0, are no numbers: nothing of it may count.
    """
    monkeypatch.setattr("llm.kernels.attention.work._SPARE_ITEMS", 2)
    torch.manual_seed(head_dim + page_size)
    lens = [1, 16, 17, 33, 130, 200]
    parts = create_parts([(1, length) for length in lens])
    num_pages = (NUM_ROWS + 1) * NUM_COLUMNS + 1
    numbers = torch.randn(2, num_pages, page_size, num_kv_heads, head_dim, device=DEVICE)
    kv_pages = numbers.to(torch.float8_e4m3fn)
    tables = (1 + torch.randperm(num_pages - 1, device=DEVICE)).view(NUM_ROWS + 1, NUM_COLUMNS).int()
    codes = kv_pages.view(torch.uint8)
    codes[:, 0] = FP8_NAN
    for row, length in zip(parts.rows.tolist(), lens, strict=False):
        codes[:, tables[row, (length - 1) // page_size], (length - 1) % page_size + 1 :] = FP8_NAN
        codes[:, tables[row, (length - 1) // page_size + 1 :].long()] = FP8_NAN
    query = torch.randn(parts.num_parts, num_heads, head_dim, device=DEVICE).to(dtype)
    items = WorkItems.allocate(num_decode_items(100), 100, DEVICE)
    output = torch.full(query.shape, torch.nan, dtype=dtype, device=DEVICE)
    scoring = create_scoring(kind, num_heads)
    plan_decodes(parts, items, window)
    PagedDecode(100, num_heads, num_kv_heads, head_dim, DEVICE)(
        query, kv_pages, tables, parts, items, window, output, scoring
    )
    expected = expected_attention(query, kv_pages, tables, parts, window, scoring)
    assert relative_error(output[:6], expected) < (2e-3 if dtype == torch.float16 else 5e-3)
    assert output[6:].isnan().all(), "what belongs to no part is left alone"
