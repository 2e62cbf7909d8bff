"""Vectors on a GPU: those of the plain model, in chunks, beside streams, in 8 bits, and bit by bit the same."""

import numpy as np
import pytest
import torch
from known_shapes import SHAPES

from llm.attention.dense import DenseContext
from llm.config import EngineConfig
from llm.models.decoder import DecoderModel
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import GenerationRequest, Pooling

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LENGTHS = [1, 2, 16, 100, 700, 1500, 2300]
MODELS = ["llama-3.1-8b", "qwen3-0.6b", "mistral with a window"]
EMBEDDINGS = [Pooling.LAST, Pooling.MEAN]
each_pooling = pytest.mark.parametrize("pooling", EMBEDDINGS)


def create_model(name: str, dtype: torch.dtype = torch.bfloat16) -> DecoderModel:
    torch.manual_seed(0)
    return DecoderModel(vocab_size=4000, num_layers=2, max_seq_len=4096, device="cuda", dtype=dtype, **SHAPES[name])


def create_engine(model: DecoderModel, **config: object) -> ContinuousBatchingEngine:
    defaults = {"max_batch_size": 64, "max_seq_len": 4096, "num_pages": 1200}
    return ContinuousBatchingEngine(model, config=EngineConfig.model_validate({**defaults, **config}))


def create_prompts(lengths: list[int] = LENGTHS) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.randint(0, 4000, (length,), generator=generator).tolist()) for length in lengths]


@torch.inference_mode()
def expected_vectors(model: DecoderModel, prompts: list[tuple[int, ...]], pooling: Pooling) -> np.ndarray:
    """The oracle: one dense forward pass a prompt."""
    vectors = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device="cuda")
        positions = torch.arange(len(prompt), device="cuda")
        states = model.hidden_states(ids, positions, DenseContext())[0].float()
        state = states.mean(0) if pooling is Pooling.MEAN else states[-1]
        vectors.append((state / state.norm()).cpu().numpy())
    return np.stack(vectors)


def check_alike(vectors: np.ndarray, expected: np.ndarray, least_cosine: float) -> None:
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    cosines = (vectors * expected).sum(1)
    assert cosines.min() > least_cosine, cosines


@each_pooling
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("config", "least_cosine"),
    [({}, 0.9995), ({"max_tokens_per_step": 256}, 0.9995), ({"num_speculative_tokens": 4}, 0.9995),
     ({"deterministic": True}, 0.9995), ({"quantization": "fp8"}, 0.95), ({"kv_cache_dtype": "fp8"}, 0.99)],
    ids=["whole", "chunks", "speculation", "deterministic", "fp8 weights", "fp8 cache"],
)  # fmt: skip
def test_vectors_are_the_plain_models(name, config, least_cosine, pooling):
    """The second time by replayed graphs, and with what the prefix cache holds."""
    expected = expected_vectors(create_model(name), create_prompts(), pooling)
    engine = create_engine(create_model(name), **config)
    for _ in range(3):
        check_alike(engine.embed(create_prompts(), pooling=pooling, progress=False), expected, least_cosine)


@each_pooling
def test_float32_vectors_are_equal(pooling):
    model = create_model("qwen3-0.6b", torch.float32)
    expected = expected_vectors(model, create_prompts(), pooling)
    vectors = create_engine(model).embed(create_prompts(), pooling=pooling, progress=False)
    np.testing.assert_allclose(vectors, expected, atol=2e-3)
    check_alike(vectors, expected, 0.99999)


def test_vectors_beside_streams():
    """Steps that draw and pool, one step ahead: neither changes the other."""
    model = create_model("qwen3-0.6b")
    streams = [
        GenerationRequest(prompt_token_ids=prompt, max_new_tokens=64, temperature=0, ignore_eos=True)
        for prompt in create_prompts([5, 40, 300, 900])
    ]
    wanted = [(prompt, pooling) for prompt in create_prompts() for pooling in EMBEDDINGS]
    vectors = [GenerationRequest(prompt_token_ids=prompt, pooling=pooling) for prompt, pooling in wanted]
    fixed = {"deterministic": True, "max_batch_size": 8, "max_tokens_per_step": 512, "enable_prefix_caching": False}
    mixed = [*vectors[:5], *streams[:2], *vectors[5:10], *streams[2:], *vectors[10:]]
    results = {result.request_id: result for result in create_engine(model, **fixed).generate(mixed, progress=False)}
    for stream in streams:
        (alone,) = create_engine(model, **fixed).generate([stream], progress=False)
        assert results[stream.request_id].token_ids == alone.token_ids
    for request, (prompt, pooling) in zip(vectors, wanted, strict=True):
        alone = create_engine(model, **fixed).embed([prompt], pooling=pooling, progress=False)[0]
        np.testing.assert_array_equal(np.frombuffer(results[request.request_id].vector, np.float32), alone)


@each_pooling
def test_chunks_change_no_bit_where_it_is_deterministic(pooling):
    model = create_model("qwen3-0.6b")
    engines = [create_engine(model, deterministic=True, max_tokens_per_step=budget) for budget in (4096, 192)]
    whole, chunked = (engine.embed(create_prompts(), pooling=pooling, progress=False) for engine in engines)
    np.testing.assert_array_equal(whole, chunked)


def test_many_short_inputs_take_few_steps():
    """2,048 inputs fill the rows of each step."""
    engine = create_engine(create_model("qwen3-0.6b"), max_batch_size=256, num_pages=4096)
    num_steps = 0
    launch = engine.runner.launch

    def count(plan):
        nonlocal num_steps
        num_steps += 1
        return launch(plan)

    engine.runner.launch = count
    assert engine.embed(create_prompts([12] * 2048), progress=False).shape == (2048, 1024)
    assert num_steps <= 20
