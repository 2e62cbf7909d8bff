"""Paged attention backends agree with the reference, which agrees with attention over the whole sequence."""

import pytest
import torch

from llm.attention.backends import choose_backend, make_backend
from llm.attention.dense import DenseContext
from llm.attention.paged import PackedBatch, PagedContext
from llm.attention.rope import RotaryEmbedding
from llm.attention.spec import AttentionSpec
from llm.core.page_groups import PageGroup
from llm.core.paged_kv_cache import PagedKVCache
from llm.errors import ConfigError

PAGE_SIZE, HEAD_DIM = 4, 16


def create_batch(lens: list[tuple[int, int]], num_pages: int, generator: torch.Generator) -> PackedBatch:
    """A step of sequences (new tokens, context), on pages scattered over the pool; the first group's are none."""
    lens = sorted(lens, key=lambda pair: pair[0] > 1)
    pages = torch.randperm(num_pages, generator=generator).tolist()
    num_columns = max(-(-context // PAGE_SIZE) for _, context in lens)
    tables, slots, positions = [], [], []
    for num_new, context in lens:
        table = [pages.pop() for _ in range(-(-context // PAGE_SIZE))]
        span = range(context - num_new, context)
        positions += span
        slots += [table[i // PAGE_SIZE] * PAGE_SIZE + i % PAGE_SIZE for i in span]
        tables.append(table + [num_pages] * (num_columns - len(table)))
    return PackedBatch(
        query_lens=tuple(num_new for num_new, _ in lens),
        context_lens=tuple(context for _, context in lens),
        page_tables=torch.stack([torch.full((len(lens), num_columns), num_pages), torch.tensor(tables)]),
        slots=torch.stack([torch.full((len(slots),), num_pages * PAGE_SIZE), torch.tensor(slots)]),
        positions=torch.tensor(positions),
        page_size=PAGE_SIZE,
        rows=torch.arange(len(lens)),
    )


def create_kv_cache(num_pages: int, num_kv_heads: int) -> PagedKVCache:
    """A pool full of noise, so that reading a slot that was never written shows."""
    cache = PagedKVCache(
        [PageGroup(None, (0,)), PageGroup(8, (1,))],
        num_pages=num_pages,
        page_size=PAGE_SIZE,
        num_kv_heads=num_kv_heads,
        head_dim=HEAD_DIM,
        device="cpu",
        dtype=torch.float32,
    )
    cache.layers[0].normal_()
    return cache


@pytest.mark.parametrize("name", ["reference", "sdpa"])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (8, 2), (6, 1)])
@pytest.mark.parametrize("window", [None, 1, 5, 30])
@pytest.mark.parametrize(
    "lens",
    [[(1, 1)], [(1, 9), (1, 200), (1, 3), (1, 64)], [(7, 7), (1, 13), (30, 90), (1, 128), (40, 40)]],
    ids=["one token", "decodes", "mixed"],
)
def test_backend_equals_dense_attention(name, num_heads, num_kv_heads, window, lens):
    """A packed, paged step gives each sequence what dense attention over its whole context gives."""
    generator = torch.Generator().manual_seed(0)
    batch = create_batch(lens, num_pages=150, generator=generator)
    kv_cache = create_kv_cache(150, num_kv_heads)
    layer = 1
    context = PagedContext(make_backend(name), kv_cache, batch)
    spec = AttentionSpec(num_heads, num_kv_heads, HEAD_DIM, RotaryEmbedding(HEAD_DIM, 512, 1e4), window)
    num_tokens = sum(batch.query_lens)
    query = torch.randn(num_tokens, num_heads, HEAD_DIM, generator=generator)
    key, value = torch.randn(2, num_tokens, num_kv_heads, HEAD_DIM, generator=generator)

    output = context.attend(layer, spec, query, key, value)

    start = 0
    for i, (num_new, context_len) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
        pages = batch.page_tables[1, i, : -(-context_len // PAGE_SIZE)]
        keys, values = kv_cache.layers[layer][:, pages].flatten(1, 2)[:, :context_len]
        assert torch.equal(keys[-num_new:], key[start : start + num_new]), "the new keys are stored"
        padded = torch.zeros(context_len, num_heads, HEAD_DIM)
        padded[-num_new:] = query[start : start + num_new]
        expected = DenseContext().attend(0, spec, padded[None], keys[None], values[None])[0, -num_new:]
        torch.testing.assert_close(output[start : start + num_new], expected, rtol=1e-5, atol=1e-5)
        start += num_new


def attention_by_hand(query, keys, values, spec: AttentionSpec, sinks) -> torch.Tensor:
    """One sequence in float64, a head at a time: what each token's exponentials say."""
    num_new, context_len = len(query), len(keys)
    output = torch.zeros(query.shape, dtype=torch.float64)
    for i in range(num_new):
        position = context_len - num_new + i
        first = 0 if spec.window is None else max(position + 1 - spec.window, 0)
        for head in range(spec.num_heads):
            kv_head = head // (spec.num_heads // spec.num_kv_heads)
            seen = slice(first, position + 1)
            scores = keys[seen, kv_head].double() @ query[i, head].double() * spec.softmax_scale
            if spec.soft_cap is not None:
                scores = spec.soft_cap * (scores / spec.soft_cap).tanh()
            weights = scores.exp()
            total = weights.sum() + (sinks[head].double().exp() if spec.has_sinks else 0)
            output[i, head] = weights @ values[seen, kv_head].double() / total
    return output


SCORES = {
    "scale": {"scale": 0.7},
    "soft cap": {"scale": 0.5, "soft_cap": 1.5},
    "sinks": {"has_sinks": True},
    "all": {"scale": 0.3, "soft_cap": 2.0, "has_sinks": True},
}


@pytest.mark.parametrize("name", ["reference", "sdpa", "dense"])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_scales_soft_caps_and_sinks(name, window, scores):
    """Of prompts, chunks and decodes, in every backend and in dense attention."""
    generator = torch.Generator().manual_seed(0)
    batch = create_batch([(7, 7), (1, 13), (5, 30), (1, 9), (20, 20)], num_pages=150, generator=generator)
    kv_cache = create_kv_cache(150, 2)
    spec = AttentionSpec(6, 2, HEAD_DIM, RotaryEmbedding(HEAD_DIM, 512, 1e4), window, **scores)
    sinks = torch.randn(6, generator=generator)
    num_tokens = sum(batch.query_lens)
    query = torch.randn(num_tokens, 6, HEAD_DIM, generator=generator)
    key, value = torch.randn(2, num_tokens, 2, HEAD_DIM, generator=generator)
    backend = make_backend("sdpa" if name == "dense" else name)
    output = PagedContext(backend, kv_cache, batch).attend(1, spec, query, key, value, sinks)
    start = 0
    for i, (num_new, context_len) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
        pages = batch.page_tables[1, i, : -(-context_len // PAGE_SIZE)]
        keys, values = kv_cache.layers[1][:, pages].flatten(1, 2)[:, :context_len]
        part = query[start : start + num_new]
        actual = output[start : start + num_new]
        if name == "dense":
            padded = torch.zeros(context_len, 6, HEAD_DIM)
            padded[-num_new:] = part
            actual = DenseContext().attend(0, spec, padded[None], keys[None], values[None], sinks)[0, -num_new:]
        expected = attention_by_hand(part, keys, values, spec, sinks)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
        start += num_new


def test_unknown_backend_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"unknown attention_backend 'flash'; known: reference, sdpa"):
        choose_backend("flash", torch.device("cpu"))
