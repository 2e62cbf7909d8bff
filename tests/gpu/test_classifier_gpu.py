"""Classifiers on a GPU: the logits of the plain model, by replayed graphs, in chunks, in 8 bits, and bit by bit the
same."""

import numpy as np
import pytest
import torch
from known_shapes import SHAPES
from test_embedding_gpu import create_engine, create_prompts

from llm.attention.dense import DenseContext
from llm.config import ClassifierConfig
from llm.models.decoder import DecoderModel

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

NUM_LABELS = 5


def create_model(dtype: torch.dtype = torch.bfloat16) -> DecoderModel:
    torch.manual_seed(0)
    model = DecoderModel(
        vocab_size=4000, num_layers=2, max_seq_len=4096, device="cuda", dtype=dtype,
        **{**SHAPES["qwen3-0.6b"], "tie_embeddings": False, "classifier": ClassifierConfig(num_labels=NUM_LABELS)},
    )  # fmt: skip
    assert model.lm_head is None
    return model


@torch.inference_mode()
def expected_logits(model: DecoderModel) -> np.ndarray:
    """The oracle: one dense forward pass a prompt, and the head in float32."""
    found = []
    for prompt in create_prompts():
        positions = torch.arange(len(prompt), device="cuda")
        states = model.hidden_states(torch.tensor([prompt], device="cuda"), positions, DenseContext())
        found.append((states[0, -1].float() @ model.score.weight.float().t()).cpu().numpy())
    return np.stack(found)


@pytest.mark.parametrize(
    ("dtype", "config", "most"),
    [
        (torch.float32, {}, 2e-3),
        (torch.bfloat16, {}, 0.05),
        (torch.bfloat16, {"max_tokens_per_step": 256}, 0.05),
        (torch.bfloat16, {"num_pages": None, "gpu_memory_utilization": 0.5}, 0.05),
        (torch.bfloat16, {"quantization": "fp8"}, 0.2),
    ],
    ids=["float32", "whole", "chunks", "measured pool", "fp8"],
)
def test_logits_are_the_plain_models(dtype, config, most):
    """The second time by replayed graphs, and with what the prefix cache holds. Differences are the root of their mean
    square, in units of the logits' standard deviation."""
    expected = expected_logits(create_model(dtype))
    engine = create_engine(create_model(dtype), **config)
    for _ in range(3):
        found = engine.classify(create_prompts(), progress=False)
        assert np.sqrt(np.square(found - expected).mean()) < most * expected.std(), (found, expected)


def test_company_and_chunks_change_no_bit_where_it_is_deterministic():
    model = create_model()
    alone = [
        create_engine(model, deterministic=True).classify([prompt], progress=False)[0] for prompt in create_prompts()
    ]
    for budget in (4096, 192):
        engine = create_engine(model, deterministic=True, max_tokens_per_step=budget)
        np.testing.assert_array_equal(engine.classify(create_prompts(), progress=False), np.stack(alone))
