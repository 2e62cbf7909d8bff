"""Vectors: requests like any other, equal to the plain model's hidden states, pooled, however they are scheduled.

The graph runner's kernels run in Triton's interpreter where there is no GPU.
"""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from small_engines import VOCAB_SIZE, check_idle, create_engine, create_model, create_requests, each_depth, run_steps

from llm.attention.dense import DenseContext
from llm.config import EngineConfig
from llm.errors import EngineError, InvalidRequestError
from llm.models.decoder import DecoderModel
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import FinishReason, GenerationRequest, Grammar, GrammarKind, Pooling

LENGTHS = [1, 2, 40, 7, 100, 16, 33]
EMBEDDINGS = [Pooling.LAST, Pooling.MEAN]
each_pooling = pytest.mark.parametrize("pooling", EMBEDDINGS)
each_shape = pytest.mark.parametrize(
    "shape", [{}, {"window_size": 12}, {"window_size": 12, "window_layers": (1,)}], ids=["full", "window", "one layer"]
)


def create_prompts(lengths: list[int] = LENGTHS) -> list[tuple[int, ...]]:
    """The longer ones begin alike, so that the prefix cache has something to find."""
    ids = torch.randint(0, VOCAB_SIZE, (max(lengths),), generator=torch.Generator().manual_seed(3)).tolist()
    return [tuple(ids[:length]) if length > 20 else tuple(reversed(ids[:length])) for length in lengths]


@torch.inference_mode()
def expected_vector(model: DecoderModel, prompt: tuple[int, ...], pooling: Pooling) -> np.ndarray:
    """The oracle: one dense forward pass."""
    ids = torch.tensor([prompt], device=model.device)
    states = model.hidden_states(ids, torch.arange(len(prompt), device=model.device), DenseContext())[0].float()
    state = states.mean(0) if pooling is Pooling.MEAN else states[-1]
    return (state / state.norm()).cpu().numpy()


def check_vectors(vectors: np.ndarray, prompts: list[tuple[int, ...]], model: DecoderModel, pooling: Pooling) -> None:
    assert len(vectors) == len(prompts)
    for vector, prompt in zip(vectors, prompts, strict=True):
        np.testing.assert_allclose(vector, expected_vector(model, prompt, pooling), atol=1e-5, rtol=0)


@each_depth
@each_pooling
@each_shape
def test_vectors_are_pooled_hidden_states(shape, pooling, max_steps_ahead):
    """Whole in a step, in chunks of 7 or one token at a time; with what the prefix cache has, on the second time."""
    model = create_model(**shape)
    prompts = create_prompts()
    for budget in (256, 7, 1):
        batch = min(budget, 4)
        engine = create_engine(model, max_tokens_per_step=budget, max_batch_size=batch, max_steps_ahead=max_steps_ahead)
        for _ in range(2):
            check_vectors(engine.embed(prompts, pooling=pooling, progress=False), prompts, model, pooling)
        check_idle(engine)


@pytest.mark.parametrize("options", [{}, {"num_speculative_tokens": 3}], ids=["plain", "speculation"])
@each_depth
@each_pooling
def test_vectors_beside_generations(pooling, max_steps_ahead, options):
    """Neither changes the other, though they share rows, steps and the token budget."""
    model = create_model()
    prompts = create_prompts()
    wanted = [GenerationRequest(prompt_token_ids=prompt, pooling=pooling) for prompt in prompts]
    generations = create_requests(6, temperature=0.0)
    mixed = [request for pair in zip(wanted, [*generations, None], strict=True) for request in pair if request]
    small = {"max_tokens_per_step": 16, "max_batch_size": 4, "max_steps_ahead": max_steps_ahead, **options}
    engine = create_engine(model, **small)
    results = {result.request_id: result for result in engine.generate(mixed, progress=False)}
    check_idle(engine)
    vectors = [np.frombuffer(results[request.request_id].vector, np.float32) for request in wanted]
    check_vectors(vectors, prompts, model, pooling)
    for request in wanted:
        result = results[request.request_id]
        assert (result.finish_reason, result.token_ids) == (FinishReason.STOP, ())
        assert result.num_prompt_tokens == len(request.prompt_token_ids)
    for result in create_engine(model, **small).generate(generations, progress=False):
        assert results[result.request_id].token_ids == result.token_ids
        assert results[result.request_id].vector is None


@each_depth
@each_pooling
def test_a_preempted_vector_begins_anew(pooling, max_steps_ahead):
    """Generations that arrived before take its pages while it is half done; its sum does not count tokens twice."""
    model = create_model()
    (prompt,) = create_prompts([40])
    engine = create_engine(
        model, max_tokens_per_step=4, max_batch_size=3, num_pages=14, max_seq_len=56, max_steps_ahead=max_steps_ahead,
        enable_prefix_caching=False,
    )  # fmt: skip
    engine.embed(create_prompts([5, 6, 7]), pooling=Pooling.MEAN, progress=False)  # leaves a sum at each row
    for i in range(2):
        engine.add_request(GenerationRequest(prompt_token_ids=(i + 1,), max_new_tokens=24, ignore_eos=True, seed=1))
    engine.step()
    engine.add_request(GenerationRequest(request_id="vector", prompt_token_ids=prompt, pooling=pooling))
    outputs = run_steps(engine)
    assert engine.stats().num_preemptions > 0
    (output,) = [output for output in outputs if output.request_id == "vector"]
    check_vectors([np.frombuffer(output.vector, np.float32)], [prompt], model, pooling)


def test_only_the_last_tokens_state_can_do_without_the_others():
    """What the prefix cache holds has no hidden states: the mean computes every token, the last takes what is there."""
    prompt = create_prompts([40])[0]
    engine = create_engine(max_tokens_per_step=64)
    cached = []
    for pooling in (Pooling.MEAN, Pooling.MEAN, Pooling.LAST):
        request = GenerationRequest(prompt_token_ids=prompt, pooling=pooling)
        (result,) = engine.generate([request], progress=False)
        cached.append(result.num_cached_tokens)
    assert cached == [0, 0, 36]
    assert (engine.stats().num_prompt_tokens, engine.stats().num_cached_prompt_tokens) == (120, 36)


@each_depth
def test_aborted_vectors_leave_nothing(max_steps_ahead):
    engine = create_engine(max_tokens_per_step=8, max_steps_ahead=max_steps_ahead)
    for num_steps in range(7):
        engine.add_request(
            GenerationRequest(request_id="gone", prompt_token_ids=create_prompts([40])[0], pooling=Pooling.MEAN)
        )
        outputs = [output for _ in range(num_steps) for output in engine.step()]
        assert engine.abort("gone") is not bool(outputs)
        assert run_steps(engine) == []
        check_idle(engine)


def test_a_state_that_is_not_finite_fails_its_request_alone():
    model = create_model()
    with torch.no_grad():
        model.embed_tokens.weight[5] = float("nan")
    engine = create_engine(model)
    requests = [GenerationRequest(prompt_token_ids=(i,), pooling=Pooling.LAST) for i in (4, 5, 6)]
    results = engine.generate(requests, progress=False)
    assert [result.finish_reason for result in results] == [FinishReason.STOP, FinishReason.ERROR, FinishReason.STOP]
    assert "not finite" in results[1].error
    with pytest.raises(EngineError, match="not finite"):
        engine.embed([(5,)], progress=False)


def test_what_cannot_be_embedded_is_refused():
    engine = create_engine()
    for prompt in ([VOCAB_SIZE], [1] * 128):
        with pytest.raises(InvalidRequestError):
            engine.embed([[1], prompt], progress=False)
        check_idle(engine)
    assert engine.embed([], progress=False).shape == (0, 32)
    for changes in ({"output_token_ids": (1,)}, {"grammar": Grammar(kind=GrammarKind.JSON_OBJECT)}, {"logprobs": 0}):
        with pytest.raises(ValidationError, match="pooling"):
            GenerationRequest(prompt_token_ids=(1,), pooling=Pooling.LAST, **changes)


@pytest.mark.parametrize(
    ("shape", "options"),
    [({}, {}), ({"window_size": 12, "window_layers": (1,)}, {}), ({}, {"num_speculative_tokens": 2}),
     ({}, {"deterministic": True})],
    ids=["plain", "window", "speculation", "deterministic"],
)  # fmt: skip
def test_graph_runner_gives_the_same_vectors(shape, options):
    """In chunks, more sequences than rows, beside a generation that draws, of either pooling in one step."""
    model = create_model(**shape)
    prompts = create_prompts([1, 22])
    wanted = [(prompt, pooling) for prompt in prompts for pooling in EMBEDDINGS]
    requests = [GenerationRequest(prompt_token_ids=prompt, pooling=pooling) for prompt, pooling in wanted]
    (generation,) = create_requests(1, max_new_tokens=3, temperature=0.0)
    config = {"max_batch_size": 3, "max_tokens_per_step": 16, "num_pages": 32, "page_size": 16}
    engine = ContinuousBatchingEngine(model, config=EngineConfig(attention_backend="triton", **config, **options))
    drawn, *results = engine.generate([generation, *requests], progress=False)
    check_idle(engine)
    for (prompt, pooling), result in zip(wanted, results, strict=True):
        check_vectors([np.frombuffer(result.vector, np.float32)], [prompt], model, pooling)
    (expected,) = create_engine(model, **config).generate([generation], progress=False)
    assert drawn.token_ids == expected.token_ids
