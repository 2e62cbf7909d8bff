"""Gemma 3 270M: the tokens of its own tokenizer, and transformers' probabilities and text in float32."""

import math

import pytest
import torch
from real_texts import ODD_TEXTS, PARAGRAPH

from llm.config import EngineConfig
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import GenerationRequest

KNOWN_IDS = [
    [2, 138, 13498, 5830, 9952, 236764, 496, 6937, 255968, 624, 4463, 109, 19891, 529, 1091, 251, 107],
    [2, 1789, 238527, 560, 33443, 236764, 170362, 236764, 33375, 238582, 236764, 85394],
    [2, 2063, 517, 236769, 236781, 1473, 107, 140, 2060, 16923, 236746, 2632, 870, 236781, 236764, 753, 236781, 21111,
     138, 236865, 7546, 236881, 107],
    [2, 128820, 128820, 128820, 128820, 128820, 128820, 9236, 153, 41729],
]  # fmt: skip
"""Of `ODD_TEXTS`, as transformers 5.24 reads the tokenizer out of the same file, which takes it long."""


@pytest.fixture(scope="module")
def engine(real_model) -> ContinuousBatchingEngine:
    config = EngineConfig(cpu_pool_bytes=64 << 20, max_seq_len=1024)
    path = real_model("gemma3-270m")
    return ContinuousBatchingEngine.from_pretrained(path, config=config, dtype=torch.float32, progress=False)


def test_tokens_of_texts_are_known(engine):
    """Merges are found again from the order of the tokens; runs of spaces, bytes and the beginning are as they were."""
    assert engine.tokenizer.encode("") == [2]
    for text, ids in zip(ODD_TEXTS, KNOWN_IDS, strict=True):
        assert engine.tokenizer.encode(text) == ids
        assert engine.tokenizer.decode(ids) == text


@torch.inference_mode()
def test_probabilities_and_a_greedy_text_are_transformers(engine, real_model, model_of_transformers):
    """Log probabilities within 1e-4; each greedy token is the likeliest one, or within 1e-3 of it."""
    theirs = model_of_transformers(real_model("gemma3-270m"))
    ids = engine.tokenizer.encode(PARAGRAPH[:400])
    request = GenerationRequest(prompt_token_ids=tuple(ids), max_new_tokens=5, temperature=0, prompt_logprobs=1)
    (result,) = engine.generate([request], progress=False)
    rows = theirs(torch.tensor([[*ids, *result.token_ids]])).logits[0].log_softmax(-1)
    expected = rows[: len(ids) - 1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    found = torch.tensor([entry.logprob for entry in result.prompt_logprobs])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert math.exp(-found.mean()) == pytest.approx(math.exp(-expected.mean()), rel=1e-4)
    assert math.exp(-found.mean()) < 30
    for token_id, row in zip(result.token_ids, rows[len(ids) - 1 :], strict=False):
        assert row.max() - row[token_id] < 1e-3
