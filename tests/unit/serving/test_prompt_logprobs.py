"""Log probabilities of prompts: those of the model over the whole prompt, in whatever steps it is read."""

import pytest
import torch
from small_engines import check_idle, create_engine, create_model, each_depth, run_steps

from llm.config import EngineConfig
from llm.models.decoder import DecoderModel
from llm.serving import eager_runner, graph_runner
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import FinishReason, GenerationRequest, GenerationResult

VOCAB_SIZE = 48


def create_prompts(num: int = 5) -> list[tuple[int, ...]]:
    """Of different lengths; the longer begin as the one before does."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCAB_SIZE, (80,), generator=generator).tolist()
    return [tuple(ids[: 1 + 9 * i]) for i in range(num)]


def scoring(prompt: tuple[int, ...], **params) -> GenerationRequest:
    defaults = {"prompt_logprobs": 3, "max_new_tokens": 4, "seed": 1, "ignore_eos": True}
    return GenerationRequest(prompt_token_ids=prompt, **{**defaults, **params})


def assert_scores_are_the_models(result: GenerationResult, model: DecoderModel, prompt: tuple[int, ...]) -> None:
    """One entry for each token but the first: its own log probability, and the likeliest in its place."""
    expected = model([list(prompt)])[0, :-1].float().log_softmax(-1)
    assert result.prompt_logprobs is not None
    assert [entry.token_id for entry in result.prompt_logprobs] == list(prompt[1:])
    for row, entry in zip(expected, result.prompt_logprobs, strict=True):
        assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-4)
        values, ids = row.topk(3)
        assert [token_id for token_id, _ in entry.top] == ids.tolist()
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-4)


@each_depth
@pytest.mark.parametrize(
    "config",
    [{}, {"max_tokens_per_step": 16}, {"num_pages": 22, "max_seq_len": 80}, {"num_speculative_tokens": 3}],
    ids=["whole", "chunks", "preempted", "guesses"],
)
@torch.inference_mode()
def test_scores_are_the_models(config: dict, max_steps_ahead: int, monkeypatch):
    """Beside others, a few at a time; the tokens are those of the same request that asks for no log probabilities."""
    monkeypatch.setattr(eager_runner, "MAX_SCORED_AT_ONCE", 5)
    model = create_model()
    engine = create_engine(model, max_steps_ahead=max_steps_ahead, **config)
    prompts = create_prompts()
    plain = [scoring(prompt, prompt_logprobs=None, max_new_tokens=20) for prompt in prompts]
    scored = [scoring(prompt, max_new_tokens=20) for prompt in prompts]
    results = engine.generate([*scored, *plain], progress=False)
    for prompt, result, other in zip(prompts, results, results[len(prompts) :], strict=False):
        assert_scores_are_the_models(result, model, prompt)
        assert result.token_ids == other.token_ids
        assert other.prompt_logprobs is None
    check_idle(engine)
    if "num_pages" in config:
        assert engine.stats().num_preemptions


@torch.inference_mode()
def test_a_cached_prompt_is_scored_whole():
    model = create_model()
    engine = create_engine(model)
    prompt = create_prompts()[-1]
    for _ in range(2):
        (result,) = engine.generate([scoring(prompt)], progress=False)
        assert_scores_are_the_models(result, model, prompt)
        assert result.num_cached_tokens == 0
    (plain,) = engine.generate([scoring(prompt, prompt_logprobs=None)], progress=False)
    assert plain.num_cached_tokens > 0


@torch.inference_mode()
def test_a_prompt_may_be_read_and_nothing_generated():
    model = create_model()
    engine = create_engine(model)
    prompts = create_prompts()
    results = engine.generate([scoring(prompt, max_new_tokens=0) for prompt in prompts], progress=False)
    for prompt, result in zip(prompts, results, strict=True):
        assert (result.token_ids, result.text, result.finish_reason) == ((), "", FinishReason.LENGTH)
        assert_scores_are_the_models(result, model, prompt)
    check_idle(engine)


def test_scores_come_with_the_first_output_only():
    engine = create_engine(max_tokens_per_step=8)
    request = scoring(create_prompts()[-1])
    engine.add_request(request)
    outputs = run_steps(engine)
    assert len(outputs) == 4
    assert [output.prompt_logprobs is not None for output in outputs] == [True, False, False, False]


@torch.inference_mode()
def test_a_prompt_may_be_read_and_neither_scored_nor_continued():
    """It is in the prefix cache then, and is taken from there when it is read again."""
    engine = create_engine()
    prompt = create_prompts()[-1]
    first, second = (
        engine.generate([scoring(prompt, max_new_tokens=0, prompt_logprobs=None)], progress=False)[0] for _ in range(2)
    )
    for result in (first, second):
        assert (result.token_ids, result.finish_reason) == ((), FinishReason.LENGTH)
        assert not result.prompt_logprobs
    assert 0 == first.num_cached_tokens < second.num_cached_tokens
    check_idle(engine)


@pytest.mark.parametrize("fields", [{"prompt_logprobs": 21}, {"pooling": "last"}, {"prompt_logprobs": -1}])
def test_what_makes_no_sense_is_refused(fields: dict):
    with pytest.raises(ValueError, match="prompt_logprobs"):
        scoring((1, 2), **fields)


@torch.inference_mode()
def test_kernels_score_as_the_reference_does(monkeypatch):
    """In chunks, some tokens at a time, beside vectors, log probabilities of draws, and rows that ask for nothing."""
    monkeypatch.setattr(graph_runner, "MAX_SCORED_AT_ONCE", 7)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = create_model(num_layers=1).to(device)
    prompts = create_prompts(3)
    requests = [scoring(prompt, max_new_tokens=1) for prompt in prompts]
    requests += [scoring(prompts[0], max_new_tokens=1, prompt_logprobs=None, logprobs=2)]
    requests += [GenerationRequest(prompt_token_ids=prompts[1], pooling="mean")]
    requests += [scoring(prompts[2], max_new_tokens=0, prompt_logprobs=0)]
    config = EngineConfig(
        attention_backend="triton", max_batch_size=4, max_tokens_per_step=16, num_pages=64, page_size=16,
        max_seq_len=64,
    )  # fmt: skip
    engine = ContinuousBatchingEngine(model, config=config)
    results = engine.generate(requests, progress=False)
    for prompt, result in zip(prompts, results, strict=False):
        assert_scores_are_the_models(result, model, prompt)
    last = results[-1].prompt_logprobs
    assert last is not None
    assert [entry.token_id for entry in last] == list(prompts[2][1:])
    assert not any(entry.top for entry in last)
    check_idle(engine)
