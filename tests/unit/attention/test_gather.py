"""Contexts copied out of their pages."""

import numpy as np
import pytest
import torch

from llm.kernels.attention.gather import GatheredContexts
from llm.kernels.attention.hopper_prefill import num_gathered_tokens
from llm.kernels.attention.work import StepParts

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_ROWS, NUM_COLUMNS, PAGE_SIZE = 6, 10, 16


@pytest.mark.parametrize("stored", [torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("lens", [[(40, 40)], [(1, 30), (3, 160), (1, 9), (16, 33), (2, 2), (50, 77)]])
def test_contexts_of_prefills_lie_one_behind_the_other(lens, stored):
    """Those of decodes are not copied; what lies behind the last is left alone."""
    torch.manual_seed(0)
    num_kv_heads, head_dim = 3, 24
    num_pages = NUM_ROWS * NUM_COLUMNS
    kv_pages = torch.randn(2, num_pages, PAGE_SIZE, num_kv_heads, head_dim).to(stored).to(DEVICE)
    tables = torch.randperm(num_pages).view(NUM_ROWS, NUM_COLUMNS).int().to(DEVICE)
    rows = torch.randperm(NUM_ROWS)[: len(lens)].tolist()
    unused = [0, 0]
    query_lens, context_lens = [new for new, _ in lens] + unused, [context for _, context in lens] + unused
    starts = [sum(query_lens[:i]) for i in range(len(query_lens))]
    parts = StepParts(
        *(torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (rows + unused, starts, query_lens, context_lens))
    )
    gathered = [(row, context) for row, (new, context) in zip(rows, lens, strict=True) if new > 1]
    total = sum(context for _, context in gathered)

    contexts = GatheredContexts(total + 20, parts.num_parts, num_kv_heads, head_dim, torch.float16, DEVICE)
    contexts.plan(parts, tables, PAGE_SIZE, total)
    contexts.copy(kv_pages, total)

    slots = kv_pages.float().flatten(1, 2)
    for copies, pool in zip((contexts.keys, contexts.values), slots, strict=True):
        expected = torch.cat(
            [pool.unflatten(0, (-1, PAGE_SIZE))[tables[row].long()].flatten(0, 1)[:n] for row, n in gathered]
        )
        torch.testing.assert_close(copies[:total].float(), expected, rtol=0, atol=0)
        assert not copies[total:].any()
    begins = [sum(context for _, context in gathered[:i]) for i in range(len(gathered))]
    assert [n for n, new in zip(contexts.starts.tolist(), query_lens, strict=True) if new > 1] == begins


def test_a_plan_of_no_contexts_is_empty():
    """As warming up makes it: it must not follow the tables of parts that are not there."""
    nothing = torch.zeros(16, dtype=torch.int32, device=DEVICE)
    parts = StepParts(nothing, nothing, nothing, nothing)
    contexts = GatheredContexts(64, 16, 1, 16, torch.float16, DEVICE)
    contexts.plan(parts, torch.full((1, 1), 10**9, dtype=torch.int32, device=DEVICE), PAGE_SIZE, 1)
    contexts.copy(torch.ones(2, 1, PAGE_SIZE, 1, 16, dtype=torch.float16, device=DEVICE), 1)
    assert contexts.starts.tolist() == [0] * 16


@pytest.mark.parametrize(
    ("lens", "expected"),
    [
        ([(8192, 8192)], 8192),
        ([(5000, 5000)], 8192),  # padded
        ([(1024, 1024)], 0),  # such small steps have graphs of their own
        ([(5000, 10_000)], 0),  # too short to be launched kernel by kernel
        ([(8192, 98_304)], 98_304),
        ([(1696, 100_000)], 100_000),
        ([(2048, 2048)] * 4, 8192),
        ([(1, 5000), (8000, 8000)], 8192),
        ([(192, 100_000)], 0),  # too few rows to fill the chip without sharing the context
        ([(200, 2000)] * 40, 0),  # the copies would take longer than they save
        ([(150, 150)] * 40, 0),
        ([(1, 30_000)] * 100, 0),
        ([(8192, 150_000)], 0),  # more than there is room for
    ],
)
def test_contexts_are_copied_where_it_pays(lens, expected):
    queries, contexts = np.array(lens, dtype=np.int32).T
    assert num_gathered_tokens(queries, contexts, 32, few_tokens=8192, max_tokens=139_264) == expected
