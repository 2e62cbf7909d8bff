"""What the inference guide tells the library's users to write, run as they would write it."""

import pytest
import torch

from llm.core.kv_cache import KVCache, reset_all_caches
from llm.models.decoder import DecoderModel
from llm.models.lora import merge_lora
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import GenerationRequest
from llm.tokenization.simple_tokenizer import SimpleCharacterTokenizer


def test_cache_for_one_layer_and_for_a_model():
    cache = KVCache(max_batch_size=1, max_seq_len=512, num_kv_heads=8, head_dim=64, device="cpu", dtype=torch.float16)
    caches = KVCache.from_model_config(
        max_batch_size=1, max_seq_len=512, num_layers=12, num_kv_heads=8, head_dim=64, device="cpu", dtype=torch.float16
    )
    assert cache.num_bytes == 2 * 512 * 8 * 64 * 2
    assert len(caches) == 12


@pytest.mark.parametrize("as_tensor", [False, True])
def test_generation_loop(as_tensor):
    """The loop takes what `encode` gives, then one token a step, and gives what full recomputation gives."""
    torch.manual_seed(0)
    tokenizer = SimpleCharacterTokenizer(["a", "b", "c"])
    model = DecoderModel(vocab_size=tokenizer.vocab_size, hidden_size=64, num_layers=2, num_heads=4, max_seq_len=512)
    caches = KVCache.from_model_config(
        max_batch_size=1,
        max_seq_len=512,
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.hidden_size // model.num_heads,
        device="cpu",
        dtype=model.dtype,
    )
    for _ in range(2):
        prompt = tokenizer.encode("abc, abc!")
        input_ids = torch.tensor(prompt) if as_tensor else prompt
        generated = []
        for _ in range(10):
            logits = model(input_ids, kv_caches=caches, use_cache=True)
            next_token = logits[:, -1, :].argmax(dim=-1, keepdim=True)
            generated.append(int(next_token))
            input_ids = next_token
        expected = list(prompt)
        for _ in range(10):
            expected.append(int(model(expected)[0, -1].argmax()))
        assert expected[len(prompt) :] == generated
        reset_all_caches(caches)


def test_engine_loop():
    model = DecoderModel(vocab_size=32000, hidden_size=512, num_layers=6, num_heads=8, max_seq_len=512)
    engine = ContinuousBatchingEngine(
        model=model,
        tokenizer=SimpleCharacterTokenizer(["a", "b", "c"]),
        device="cpu",
        max_batch_size=16,
        max_seq_len=512,
    )
    engine.add_request(GenerationRequest(prompt="Hello", max_new_tokens=50))
    engine.add_request(GenerationRequest(prompt="World", max_new_tokens=50))
    num_tokens = 0
    while engine.scheduler.has_pending_work:
        num_tokens += sum(len(output.token_ids) for output in engine.step())
    assert num_tokens == 100


def test_grouped_queries_by_configuration():
    """A quarter of the key/value heads takes a quarter of the cache."""
    model = DecoderModel(hidden_size=1024, num_heads=16, num_kv_heads=4)
    full = DecoderModel(hidden_size=1024, num_heads=16)
    assert model([1, 2, 3]).shape == (1, 3, model.config.vocab_size)
    assert 4 * model.make_kv_caches(1)[0].num_bytes == full.make_kv_caches(1)[0].num_bytes


def test_window_by_configuration():
    """What lies outside the windows of all layers does not change the last logits, and takes no memory."""
    torch.manual_seed(0)
    model = DecoderModel(vocab_size=100, hidden_size=512, num_heads=8, num_layers=2, window_size=256)
    tokens = torch.randint(0, 100, (1, 700))
    changed = tokens.clone()
    changed[:, : 700 - 2 * 255 - 1] = 7
    with torch.inference_mode():
        torch.testing.assert_close(model(changed)[:, -1], model(tokens)[:, -1], rtol=1e-4, atol=1e-4)
    assert model.make_kv_caches(1, 2048)[0].num_bytes < 0.2 * 2 * 2048 * 512 * 4


def test_merging_without_adapters_changes_nothing():
    model = DecoderModel(vocab_size=50, hidden_size=32, num_layers=1, num_heads=2)
    before = model([1, 2, 3])
    merge_lora(model.merge_lora())
    assert torch.equal(model([1, 2, 3]), before)
