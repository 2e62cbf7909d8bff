"""`KVCache`: cached equals recomputed, a window needs O(window) memory, overflow is a clear error."""

import pytest
import torch

from llm.core.kv_cache import KVCache, reset_all_caches
from llm.errors import CapacityError
from llm.models.decoder import DecoderModel

SHAPES = {
    "mha": {},
    "gqa": {"num_kv_heads": 2},
    "mqa": {"num_kv_heads": 1},
    "window": {"window_size": 7},
    "wide window": {"window_size": 50, "num_kv_heads": 2},
    "window in one layer": {"window_size": 9, "window_layers": (1,)},
    "qk-norm": {"qk_norm": True, "num_kv_heads": 2},
}


def create_model(**shape) -> DecoderModel:
    torch.manual_seed(0)
    defaults = {"vocab_size": 50, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_seq_len": 256}
    model = DecoderModel(**{**defaults, **shape}).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("chunks", [(1,) * 200, (120, *(1,) * 80), (60, 90, 50), (3, 100, 1, 1, 95)])
@pytest.mark.parametrize("own_caches", [True, False])
@torch.inference_mode()
def test_cached_equals_recomputed(shape, chunks, own_caches):
    """Passing only new tokens gives the logits of the whole sequence at once, however it is cut."""
    model = create_model(**shape)
    input_ids = torch.randint(0, 50, (3, 200), generator=torch.Generator().manual_seed(1))
    if own_caches:
        caches = model.make_kv_caches(max_batch_size=3)
    else:
        caches = KVCache.from_model_config(4, 256, model.num_layers, model.num_kv_heads, model.config.head_size)
    expected = model(input_ids)
    for _ in range(2):
        parts = [model(part, kv_caches=caches, use_cache=True) for part in input_ids.split(chunks, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-4)
        reset_all_caches(caches)


def test_windowed_cache_holds_the_window_only():
    """Memory grows with the window, not with the longest sequence."""
    full = KVCache(1, 100_000, 2, 16)
    windowed = KVCache(1, 100_000, 2, 16, window_size=256)
    assert full.num_bytes == 2 * 100_000 * 2 * 16 * 4
    assert windowed.num_bytes == 2 * (256 + 64) * 2 * 16 * 4


@pytest.mark.parametrize("window_size", [None, 4])
def test_overflow_stores_nothing(window_size):
    """One token too many names both numbers and leaves the cache as it was."""
    cache = KVCache(1, 8, 2, 4, window_size=window_size)
    cache.append(torch.ones(1, 6, 2, 4), torch.ones(1, 6, 2, 4))
    with pytest.raises(CapacityError, match=r"6 tokens stored and 3 new ones exceed max_seq_len=8"):
        cache.append(torch.ones(1, 3, 2, 4), torch.ones(1, 3, 2, 4))
    assert cache.length == 6
    cache.append(torch.ones(1, 2, 2, 4), torch.ones(1, 2, 2, 4))


def test_batch_must_fit_and_stay():
    cache = KVCache(2, 8, 2, 4)
    with pytest.raises(CapacityError, match="max_batch_size=2"):
        cache.append(torch.ones(3, 1, 2, 4), torch.ones(3, 1, 2, 4))
    cache.append(torch.ones(2, 1, 2, 4), torch.ones(2, 1, 2, 4))
    with pytest.raises(CapacityError, match="reset the caches"):
        cache.append(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4))


def test_model_refuses_more_than_its_context():
    model = create_model(max_seq_len=16)
    with pytest.raises(CapacityError, match="17 tokens exceed the model's max_seq_len=16"):
        model([1] * 17)


def test_model_input_errors():
    """Empty input, ids outside the vocabulary and missing caches are named."""
    model = create_model()
    with pytest.raises(ValueError, match="at least one token"):
        model([])
    with pytest.raises(ValueError, match="outside the vocabulary of 50"):
        model([50])
    with pytest.raises(ValueError, match="one KVCache for each of the 2 layers"):
        model([1], use_cache=True)


def test_forward_without_cache_leaves_caches_alone():
    model = create_model()
    caches = model.make_kv_caches(1)
    model([1, 2, 3], kv_caches=caches)
    assert caches[0].length == 0
