"""The kernels of latent attention: by Triton's interpreter on a CPU, for real where there is a GPU."""

import pytest
import torch
from test_kernels import (
    DEVICE,
    DTYPES,
    NUM_COLUMNS,
    NUM_ROWS,
    PAGE_SIZE,
    TOLERANCE,
    create_parts,
    expected_attention,
    relative_error,
)

from llm.attention.rope import RotaryEmbedding
from llm.config import LatentConfig
from llm.kernels.attention.latent import LatentAttention
from llm.kernels.attention.latent_rows import LatentRows
from llm.kernels.attention.work import (
    Scoring,
    WorkItems,
    num_decode_items,
    num_prefill_items,
    plan_decodes,
    plan_prefills,
)
from llm.kernels.linear import Linear, Weights
from llm.models.latent import LatentHeads
from llm.models.latent_kernels import store_and_ask, values_of

SCALE = 0.3
SHAPES = [(8, 32, 40), (5, 24, 28), (70, 16, 24)]
"""Heads, rank and width: of powers of two, odd ones, and more heads than a tile has rows."""


def create_latents(width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A pool full of noise, and page tables that scatter each row over it."""
    num_pages = (NUM_ROWS + 1) * NUM_COLUMNS
    pages = torch.randn(num_pages, PAGE_SIZE, 1, width, device=DEVICE).to(dtype)
    return pages, torch.randperm(num_pages, device=DEVICE).view(NUM_ROWS + 1, NUM_COLUMNS).int()


def expected_values(query, pages, tables, parts, rank: int) -> torch.Tensor:
    """softmax(scores) times the first numbers of the keys, in float64."""
    both = torch.stack([pages, pages])  # keys of that width as values, too
    return expected_attention(query, both, tables, parts, None, Scoring(SCALE))[..., :rank]


@pytest.mark.parametrize(
    ("num_heads", "rank", "width", "dtype"), [(*shape, DTYPES[i % 2]) for i, shape in enumerate(SHAPES)]
)
def test_decodes_equal_float64(num_heads, rank, width, dtype, monkeypatch):
    """Contexts of one token, of less and more than a chunk, and of the longest a table holds."""
    monkeypatch.setattr("llm.kernels.attention.work._SPARE_ITEMS", 2)
    torch.manual_seed(num_heads)
    parts = create_parts([(1, 1), (1, 17), (1, 300), (1, 640), (1, 129)])
    pages, tables = create_latents(width, dtype)
    query = torch.randn(parts.num_parts, num_heads, width, device=DEVICE).to(dtype)
    items = WorkItems.allocate(num_decode_items(20), 20, DEVICE)
    output = torch.full((parts.num_parts, num_heads, rank), torch.nan, dtype=dtype, device=DEVICE)
    plan_decodes(parts, items, None)
    LatentAttention(20, num_heads, rank, width, SCALE, dtype, DEVICE).decode(query, pages, tables, parts, items, output)
    assert relative_error(output[:5], expected_values(query, pages, tables, parts, rank)) < TOLERANCE[dtype]
    assert output[5:].isnan().all(), "what belongs to no part is left alone"


@pytest.mark.parametrize(
    ("num_heads", "rank", "width", "dtype", "deterministic"),
    [(*SHAPES[0], DTYPES[1], False), (*SHAPES[1], DTYPES[0], True), (*SHAPES[2], DTYPES[1], False)],
)
def test_prefills_equal_float64(num_heads, rank, width, dtype, deterministic):
    """Chunks at the start and behind a context, of more tokens than a tile has, and beside decodes."""
    torch.manual_seed(num_heads)
    parts = create_parts([(1, 200), (2, 2), (19, 19), (33, 150), (7, 640)])
    pages, tables = create_latents(width, dtype)
    num_tokens = int(parts.query_lens.sum())
    query = torch.randn(num_tokens, num_heads, width, device=DEVICE).to(dtype)
    output = torch.full((num_tokens, num_heads, rank), torch.nan, dtype=dtype, device=DEVICE)
    attention = LatentAttention(20, num_heads, rank, width, SCALE, dtype, DEVICE, deterministic=deterministic)
    least = 1 if deterministic else 2
    items = WorkItems.allocate(num_prefill_items(num_tokens, 20, attention.block_tokens, least), 20, DEVICE)
    plan_prefills(parts, items, attention.block_tokens, least)
    attention.prefill(query, pages, tables, parts, items, output)
    expected = expected_values(query, pages, tables, parts, rank)
    first = 0 if deterministic else 1
    assert relative_error(output[first:], expected[first:]) < TOLERANCE[dtype]
    assert deterministic or output[:1].isnan().all(), "decodes are another kernel's"


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        LatentConfig(rank=24, query_rank=40, plain_dim=20, rope_dim=8, value_dim=12),
        LatentConfig(rank=32, plain_dim=16, rope_dim=4, value_dim=16, is_interleaved=False),
    ],
    ids=["queries of a latent", "halves that turn"],
)
def test_what_stands_around_equals_the_module(shape, deterministic):
    """Queries as they ask, latents as they are stored, values as they leave; for few tokens and for many."""
    dtype, num_heads, width = DTYPES[1], 3, shape.rank + shape.rope_dim
    torch.manual_seed(0)
    heads = LatentHeads(num_heads, shape).to(DEVICE, dtype).requires_grad_(False)
    for name, parameter in heads.named_parameters():
        parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(std=0.3)
    rope = RotaryEmbedding(shape.rope_dim, 640, 100.0)
    q_weights = None if heads.q_proj is None else Weights(heads.q_proj.weight)
    for num_tokens in (3, 70):
        pages, tables = create_latents(width, dtype)
        token_rows = torch.randint(0, NUM_ROWS, (num_tokens,), device=DEVICE).int()
        positions = torch.randperm(640, device=DEVICE)[:num_tokens].int()
        projected = torch.randn(num_tokens, sum(heads.sizes), device=DEVICE).to(dtype)
        rows = LatentRows(pages, tables, token_rows, positions, rope.table(DEVICE), shape.is_interleaved)
        query = store_and_ask(
            heads, projected, rows, lambda latents: Linear(DEVICE)(latents, q_weights), lambda plain, products: None,
            deterministic=deterministic,
        )  # fmt: skip
        asked = heads.queries(projected, *rope.angles(positions.long()))
        stored = pages[tables[token_rows.long(), positions.long() // PAGE_SIZE].long(), positions.long() % PAGE_SIZE]
        found = torch.randn(num_tokens, num_heads, shape.rank, device=DEVICE).to(dtype)
        values = values_of(heads, found, deterministic=deterministic)
        for ours, theirs in ((query, asked.query), (stored, asked.key), (values, heads.values(found).flatten(1))):
            assert relative_error(ours, theirs.double()) < TOLERANCE[dtype]
