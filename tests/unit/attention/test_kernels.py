"""The Triton kernels of attention against float64: by Triton's interpreter on a CPU, for real where there is a GPU."""

import pytest
import torch

from llm.attention.dense import causal_mask
from llm.attention.rope import apply_rotary
from llm.kernels.attention.decode import PagedDecode
from llm.kernels.attention.prefill import PrefillScratch, paged_prefill, prefill_block_tokens
from llm.kernels.attention.rope import rope_and_store
from llm.kernels.attention.work import (
    Scoring,
    StepParts,
    WorkItems,
    num_decode_items,
    num_prefill_items,
    plan_decodes,
    plan_prefills,
)
from llm.kernels.norm import Norm
from llm.models.layers import RMSNorm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16] if DEVICE.type == "cuda" else [torch.float32, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
NUM_ROWS, NUM_COLUMNS, PAGE_SIZE = 12, 40, 16


def create_parts(lens: list[tuple[int, int]], num_unused: int = 2) -> StepParts:
    """Parts (new tokens, context) on scattered rows, with unused ones behind."""
    rows = torch.randperm(NUM_ROWS)[: len(lens)].tolist() + [NUM_ROWS] * num_unused
    query_lens = [new for new, _ in lens] + [0] * num_unused
    starts = [sum(query_lens[:i]) for i in range(len(query_lens))]
    contexts = [context for _, context in lens] + [0] * num_unused
    return StepParts(*(torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (rows, starts, query_lens, contexts)))


def create_pages(num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A pool full of noise, and page tables that scatter each row over it."""
    num_pages = (NUM_ROWS + 1) * NUM_COLUMNS
    kv_pages = torch.randn(2, num_pages, PAGE_SIZE, num_kv_heads, head_dim, device=DEVICE).to(dtype)
    tables = torch.randperm(num_pages, device=DEVICE).view(NUM_ROWS + 1, NUM_COLUMNS).int()
    return kv_pages, tables


def expected_attention(query, kv_pages, tables, parts, window, scoring: Scoring | None = None) -> torch.Tensor:
    """softmax(scores) V of every part, in float64; without `scoring` the scores are QKᵀ / sqrt(d)."""
    scoring = scoring or Scoring(query.shape[-1] ** -0.5)
    outputs = []
    for row, start, num_new, context_len in zip(
        *(x.tolist() for x in (parts.rows, parts.query_starts, parts.query_lens, parts.context_lens)), strict=True
    ):
        if num_new == 0:
            continue
        pages = tables[row, : -(-context_len // PAGE_SIZE)].long()
        keys, values = kv_pages[:, pages].flatten(1, 2)[:, :context_len].double()
        group = query.shape[1] // keys.shape[1]
        scores = torch.einsum("qhd,khd->hqk", query[start : start + num_new].double(), keys.repeat_interleave(group, 1))
        mask = causal_mask(num_new, context_len, window, DEVICE)
        scores = scores * scoring.scale
        scores = scores if scoring.soft_cap is None else scoring.soft_cap * (scores / scoring.soft_cap).tanh()
        scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
        if scoring.sinks is not None:
            scores = torch.cat([scores, scoring.sinks.double()[:, None, None].expand(-1, num_new, 1)], -1)
        weights = scores.softmax(-1)[..., :context_len]
        outputs.append(torch.einsum("hqk,khd->qhd", weights, values.repeat_interleave(group, 1)))
    return torch.cat(outputs)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖; NaN where something was not written."""
    return float((actual.double() - expected).norm() / expected.norm())


SHAPES = [(8, 2, 16), (4, 4, 32), (6, 1, 24), (14, 2, 64)]
CASES = pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "dtype"),
    [(*shape, DTYPES[i % 2]) for i, shape in enumerate(SHAPES)]  # the interpreter takes a second for each
    if DEVICE.type == "cpu"
    else [(*shape, dtype) for shape in SHAPES for dtype in DTYPES],
)


def create_scoring(kind: str, num_heads: int) -> Scoring | None:
    sinks = torch.randn(num_heads, device=DEVICE) * 2
    return {
        "plain": None,
        "scale and soft cap": Scoring(0.2, 1.5),
        "sinks": Scoring(0.3, sinks=sinks),
        "all": Scoring(0.2, 4.0, sinks.to(DTYPES[1])),
    }[kind]


SCORINGS = ["scale and soft cap", "sinks", "all"]


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "dtype", "window", "kind"),
    [(*shape, DTYPES[i % 2], window, "plain") for i, shape in enumerate(SHAPES) for window in (None, 1, 100, 400)]
    + [(*SHAPES[i], DTYPES[i % 2], window, kind) for i, kind in enumerate(SCORINGS) for window in (None, 100)]
    + [(2, 1, 256, DTYPES[1], 100, "plain")]
    if DEVICE.type == "cpu"  # the interpreter takes a second for each
    else [
        (*shape, dtype, window, kind)
        for shape in [*SHAPES, (2, 1, 256)]
        for dtype in DTYPES
        for window in (None, 1, 100, 400)
        for kind in ("plain", *SCORINGS)
    ],
)
def test_decode_equals_float64(num_heads, num_kv_heads, head_dim, window, kind, dtype, monkeypatch):
    """Contexts of one token, of less and more than a chunk, and of the longest a table holds.

    In memory for many more parts than there are: where parts are few, so are programs.
    """
    monkeypatch.setattr("llm.kernels.attention.work._SPARE_ITEMS", 2)
    max_parts = 100
    torch.manual_seed(num_heads)
    parts = create_parts([(1, 1), (1, 17), (1, 300), (1, 640), (1, 128), (1, 129)])
    kv_pages, tables = create_pages(num_kv_heads, head_dim, dtype)
    qkv = torch.randn(parts.num_parts, num_heads + 2 * num_kv_heads, head_dim, device=DEVICE).to(dtype)
    query = qkv[:, :num_heads]
    items = WorkItems.allocate(num_decode_items(max_parts), max_parts, DEVICE)
    output = torch.full(query.shape, torch.nan, dtype=dtype, device=DEVICE)
    scoring = create_scoring(kind, num_heads)
    plan_decodes(parts, items, window)
    PagedDecode(max_parts, num_heads, num_kv_heads, head_dim, DEVICE)(
        query, kv_pages, tables, parts, items, window, output, scoring
    )
    expected = expected_attention(query, kv_pages, tables, parts, window, scoring)
    assert relative_error(output[:6], expected) < TOLERANCE[dtype]
    assert output[6:].isnan().all(), "what belongs to no part is left alone"


PREFILLS = [
    (None, False, False),
    (1, False, False),
    (50, False, False),
    (130, False, True),
    (None, False, True),
    (None, True, False),
    (50, True, False),
]


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "dtype", "window", "is_split", "is_large", "kind"),
    [
        (*SHAPES[s], DTYPES[s % 2], *prefill, "plain")
        for i, prefill in enumerate(PREFILLS)
        for s in ((1, 2) if i % 2 else (0, 3))
    ]
    + [(*SHAPES[i], DTYPES[i % 2], *PREFILLS[j], kind) for i, kind in enumerate(SCORINGS) for j in (2, 5)]
    + [(2, 1, 256, dtype, *PREFILLS[2], "plain") for dtype in DTYPES]
    if DEVICE.type == "cpu"  # each shape with windows, splits and large tiles
    else [
        (*shape, dtype, *prefill, kind)
        for shape in [*SHAPES, (2, 1, 256)]
        for dtype in DTYPES
        for prefill in PREFILLS
        for kind in ("plain", *SCORINGS)
    ],
)
def test_prefill_equals_float64(
    num_heads, num_kv_heads, head_dim, window, is_split, is_large, kind, dtype, monkeypatch
):
    """Whole prompts, later chunks of prompts, and decodes beside them that are somebody else's business.

    In tiles for small steps and for large ones, alone and with programs that share a tile's context.
    """
    monkeypatch.setattr("llm.kernels.attention.prefill._MANY_TOKENS", 1 if is_large else 10_000)
    torch.manual_seed(num_heads)
    lens = [(1, 33), (1, 5), (2, 2), (70, 70), (33, 200), (129, 130), (2, 300)]
    parts = create_parts(lens)
    num_tokens = sum(new for new, _ in lens)
    kv_pages, tables = create_pages(num_kv_heads, head_dim, dtype)
    query = torch.randn(num_tokens, num_heads, head_dim, device=DEVICE).to(dtype)
    block_tokens = prefill_block_tokens(num_heads, num_kv_heads, head_dim * dtype.itemsize, num_tokens)
    items = WorkItems.allocate(num_prefill_items(num_tokens, parts.num_parts, block_tokens), parts.num_parts, DEVICE)
    output = torch.full(query.shape, torch.nan, dtype=dtype, device=DEVICE)
    plan_prefills(parts, items, block_tokens)
    scratch = None
    if is_split:
        monkeypatch.setattr("llm.kernels.attention.prefill._MIN_SPLIT_BLOCKS", 1)
        scratch = PrefillScratch(num_heads, num_kv_heads, head_dim, dtype, torch.device(DEVICE))
        scratch.partial.fill_(torch.nan)
        scratch.partial_lse.fill_(torch.nan)
    scoring = create_scoring(kind, num_heads)
    paged_prefill(query, kv_pages, tables, parts, items, window, output, scratch, scoring=scoring)
    expected = expected_attention(query, kv_pages, tables, parts, window, scoring)
    assert relative_error(output[2:], expected[2:]) < TOLERANCE[dtype]
    assert output[:2].isnan().all(), "decodes are left alone"


@pytest.mark.parametrize("window", [None, 256])
@pytest.mark.parametrize("max_parts", [8, 500])
def test_decode_work_covers_every_context_once(window, max_parts):
    """Chunks of equal size, each part's in order, never more than there are programs for these parts."""
    lens = [(1, n) for n in (1, 12_000, 128, 7, 511)] + [(40, 900)]
    parts = create_parts(lens)
    items = WorkItems.allocate(num_decode_items(max_parts), max_parts, DEVICE)
    plan_decodes(parts, items, window)
    num_items, chunk_size = items.summary.tolist()
    visible = [min(n, window or n) if new == 1 else 0 for new, n in lens]
    expected = [(part, chunk) for part, n in enumerate(visible) for chunk in range(-(-n // chunk_size))]
    assert list(zip(items.parts.tolist(), items.chunks.tolist(), strict=True))[:num_items] == expected
    assert num_items <= num_decode_items(parts.num_parts)


def test_contexts_are_cut_as_finely_as_there_are_programs():
    """Each of 30 contexts of 1,500 tokens in four, for 124 programs: five would need 150, and three would end later."""
    ids, lens = torch.arange(30, dtype=torch.int32, device=DEVICE), torch.full((30,), 1500, device=DEVICE).int()
    items = WorkItems.allocate(num_decode_items(30), 30, DEVICE)
    plan_decodes(StepParts(ids, ids, torch.ones_like(ids), lens), items, None)
    assert items.summary.tolist() == [120, 384]


@CASES
@pytest.mark.parametrize(("has_norm", "offset"), [(False, None), (True, None), (True, 1.0)])
@pytest.mark.parametrize("rotary_share", [1, 0.75])
def test_rope_and_store_equals_the_layers(num_heads, num_kv_heads, head_dim, has_norm, offset, rotary_share, dtype):
    """Queries rotated, keys rotated and values as they are in their slots, nothing else touched."""
    dim = int(head_dim * rotary_share) // 2 * 2
    torch.manual_seed(head_dim)
    positions = torch.tensor([0, 5, 639, 16, 31], dtype=torch.int32, device=DEVICE)
    rows = torch.tensor([3, 1, 0, 11, 12], dtype=torch.int32, device=DEVICE)
    kv_pages, tables = create_pages(num_kv_heads, head_dim, dtype)
    qkv = torch.randn(5, num_heads + 2 * num_kv_heads, head_dim, device=DEVICE).to(dtype)
    angles = torch.outer(torch.arange(640), 10000 ** -(torch.arange(0, dim, 2) / dim)).to(DEVICE)
    rope_table = torch.stack([angles.cos(), angles.sin()])
    norms = [RMSNorm(head_dim, 1e-6, offset).to(DEVICE, dtype) for _ in range(2)]
    for norm in norms:
        norm.weight.data.normal_()
    query, key, value = qkv.clone().split([num_heads, num_kv_heads, num_kv_heads], 1)
    if has_norm:
        query, key = norms[0](query), norms[1](key)
    cos, sin = rope_table[:, positions.long()].unsqueeze(-2)
    expected_pages = kv_pages.clone()
    pages = tables[rows.long(), positions.long() // PAGE_SIZE].long()
    expected_pages[0, pages, positions.long() % PAGE_SIZE] = apply_rotary(key, cos, sin)
    expected_pages[1, pages, positions.long() % PAGE_SIZE] = value

    query_scales = torch.rand(640, device=DEVICE) + 0.5 if offset is not None else None
    expected_query = apply_rotary(query, cos, sin)
    if query_scales is not None:
        expected_query = expected_query * query_scales[positions.long(), None, None].to(dtype)
    kernel_norms = tuple(Norm(norm.weight.data, 1e-6, offset) for norm in norms) if has_norm else None
    rotated = torch.full((5, num_heads, head_dim), torch.nan, device=DEVICE, dtype=dtype)
    rope_and_store(qkv.flatten(1), rotated, kv_pages, tables, rows, positions, rope_table, kernel_norms, query_scales)
    torch.testing.assert_close(rotated, expected_query, rtol=1.6e-2, atol=1e-5)
    torch.testing.assert_close(kv_pages, expected_pages, rtol=1.6e-2, atol=1e-5)
