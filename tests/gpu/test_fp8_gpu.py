"""8-bit weights, keys and values on a GPU, in whole engines, for the shapes of known models."""

import os
from pathlib import Path

import pytest
import torch
from first_logprobs import logprobs
from known_shapes import SHAPES

from llm.config import EngineConfig
from llm.kernels.quantization import quantize_weight
from llm.models.decoder import DecoderModel
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import GenerationRequest
from llm.tokenization.hf_tokenizer import HFTokenizer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEMO = Path(__file__).parents[2] / "configs" / "demo"
NAMES = ["llama-3.1-8b", "qwen3-0.6b", "qwen2.5-14b", "mistral with a window"]


def create_model(shape: dict, *, is_rounded: bool = False) -> DecoderModel:
    """Random weights; `is_rounded`: those of the projections are what 8 bits leave of them, in bfloat16 again."""
    torch.manual_seed(0)
    model = DecoderModel(vocab_size=4000, num_layers=2, max_seq_len=4096, device="cuda", dtype=torch.bfloat16, **shape)
    if is_rounded:
        for projection in model.layers.modules():
            if isinstance(projection, torch.nn.Linear):
                quantized, scales = quantize_weight(projection.weight.data)
                projection.weight.data = (quantized.float() * scales[:, None]).bfloat16()
    return model


@pytest.mark.parametrize("lens", [[1, 2, 16, 30], [300, 700, 1500]], ids=["few rows", "many rows"])
@pytest.mark.parametrize("shape", NAMES)
def test_several_rows_are_near(shape, lens):
    """The activations are rounded to 8 bits too, a scale for each token."""
    ours = logprobs(create_model(SHAPES[shape]), lens, quantization="fp8")
    expected = logprobs(create_model(SHAPES[shape], is_rounded=True), lens, "reference")
    torch.testing.assert_close(ours, expected, rtol=0, atol=0.3)


@pytest.mark.parametrize("shape", NAMES)
def test_keys_and_values_in_8_bits_are_near(shape):
    """On average: what rounding to three bits of mantissa costs differs from prompt to prompt."""
    lens = [1, 16, 100, 700, 1500, *range(3, 200, 11)]
    ours = logprobs(create_model(SHAPES[shape]), lens, kv_cache_dtype="fp8")
    expected = logprobs(create_model(SHAPES[shape]), lens, "reference")
    errors = ours - expected
    print(f"{shape}: {errors.square().mean().sqrt():.4f} on average, {errors.abs().max():.4f} at most")
    assert errors.square().mean().sqrt() < 0.15
    assert errors.abs().max() < 0.6


@pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="the pool takes what others on the GPU leave free")
def test_pool_holds_twice_the_tokens():
    slots = {}
    for kv_cache_dtype in ("auto", "fp8"):
        model = create_model(SHAPES["qwen3-0.6b"])
        config = EngineConfig(gpu_memory_utilization=0.5, kv_cache_dtype=kv_cache_dtype, max_seq_len=4096)
        slots[kv_cache_dtype] = ContinuousBatchingEngine(model, config=config).num_slots
    assert slots["fp8"] / slots["auto"] == pytest.approx(2, rel=0.03)


@pytest.mark.parametrize("config", [{"quantization": "fp8"}, {"kv_cache_dtype": "fp8"}], ids=["weights", "cache"])
def test_demo_model_answers_alike(config):
    """A trained model is sure enough of easy answers that 8 bits do not change them."""
    tokenizer = HFTokenizer.from_pretrained(DEMO)
    questions = ["What is 17 + 25?", "Spell 'river' backwards.", "Count from 1 to 40.", "What comes next: 2, 4, 6, 8?"]
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": question}]) for question in questions]
    requests = [GenerationRequest(prompt_token_ids=tuple(prompt), temperature=0.0) for prompt in prompts]
    answers = []
    for options in ({}, config):
        engine = ContinuousBatchingEngine.from_pretrained(
            DEMO, device="cuda", progress=False, config=EngineConfig(num_pages=256, **options)
        )
        answers.append([result.text for result in engine.generate(requests, progress=False)])
    assert answers[1] == answers[0]
