"""Log probabilities of chosen tokens after a prompt: those of the model, however unlikely, in whatever steps they come.

The graph runner's kernels run in Triton's interpreter where there is no GPU.
"""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from small_engines import check_idle, create_engine, create_model, create_requests, each_depth

from llm.config import EngineConfig
from llm.errors import InvalidRequestError
from llm.models.decoder import DecoderModel
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import FinishReason, GenerationRequest, GenerationResult

VOCAB_SIZE = 48
PAIR = (31, 7)


def create_prompts(num: int = 5) -> list[tuple[int, ...]]:
    """Of different lengths; the longer begin as the one before does."""
    ids = torch.randint(0, VOCAB_SIZE, (80,), generator=torch.Generator().manual_seed(3)).tolist()
    return [tuple(ids[: 1 + 9 * i]) for i in range(num)]


def scoring(prompt: tuple[int, ...], ids: tuple[int, ...] = PAIR, **fields) -> GenerationRequest:
    return GenerationRequest(
        prompt_token_ids=prompt, allowed_token_ids=ids, scores_allowed=True, max_new_tokens=0, **fields
    )


def check_scores(result: GenerationResult, model: DecoderModel, request: GenerationRequest) -> None:
    """The scores are the whole model's, in the order that was asked for, and are all there is."""
    expected = model([list(request.prompt_token_ids)])[0, -1].float().log_softmax(-1)[list(request.allowed_token_ids)]
    assert (result.finish_reason, result.token_ids, result.logprobs) == (FinishReason.STOP, (), None)
    assert result.vector is not None
    np.testing.assert_allclose(np.frombuffer(result.vector, np.float32), expected.cpu().numpy(), atol=1e-4, rtol=0)


@each_depth
@pytest.mark.parametrize(
    "config",
    [{}, {"max_tokens_per_step": 16}, {"num_pages": 22, "max_seq_len": 80}, {"num_speculative_tokens": 3}],
    ids=["whole", "chunks", "preempted", "guesses"],
)
@torch.inference_mode()
def test_scores_are_the_models(config: dict, max_steps_ahead: int):
    """Also of the least likely tokens, in any number and order; twice, so that the prefix cache has them; and beside
    others, whose tokens do not change."""
    model = create_model()
    engine = create_engine(model, max_steps_ahead=max_steps_ahead, **config)
    least_likely_first = tuple(model([list(create_prompts()[-1])])[0, -1].argsort()[:20].tolist())
    requests = [scoring(prompt) for prompt in create_prompts()]
    requests += [scoring(create_prompts()[-1], least_likely_first), scoring(create_prompts()[2], (5,))]
    others = create_requests(4, logprobs=20, max_new_tokens=6)
    alone = [result.token_ids for result in create_engine(model).generate(others, progress=False)]
    for _ in range(2):
        results = engine.generate([*requests, *others], progress=False)
        for request, result in zip(requests, results, strict=False):
            check_scores(result, model, request)
        assert [result.token_ids for result in results[len(requests) :]] == alone
        assert [len(result.logprobs[0].top) for result in results[len(requests) :]] == [20] * 4
        check_idle(engine)
    assert results[4].num_cached_tokens > 0


@torch.inference_mode()
def test_kernels_score_as_the_reference_does():
    """Beside draws that ask for log probabilities of all tokens, of the allowed ones only as what may be drawn, and
    prompts that are scored."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = create_model(num_layers=1).to(device)
    prompts = create_prompts(3)
    scored = [scoring(prompt) for prompt in prompts] + [scoring(prompts[1], (40, 0, 47))]
    bound = {"max_new_tokens": 1, "logprobs": 5, "allowed_token_ids": PAIR}
    others = [
        GenerationRequest(prompt_token_ids=prompts[1], **bound),
        GenerationRequest(prompt_token_ids=prompts[2], max_new_tokens=1, prompt_logprobs=2),
    ]
    config = EngineConfig(
        attention_backend="triton", max_batch_size=4, max_tokens_per_step=16, num_pages=64, page_size=16,
        max_seq_len=64,
    )  # fmt: skip
    engine = ContinuousBatchingEngine(model, config=config)
    results = engine.generate([*scored, *others], progress=False)
    for request, result in zip(scored, results, strict=False):
        check_scores(result, model, request)
    likeliest = model([list(prompts[1])])[0, -1].topk(5).indices.tolist()
    assert [token_id for token_id, _ in results[-2].logprobs[0].top] == likeliest
    check_idle(engine)


def test_what_makes_no_sense_is_refused():
    for ids in ((), (3, 3), tuple(range(21))):
        with pytest.raises(ValidationError, match="allowed_token_ids"):
            scoring((1, 2), ids)
    for fields in ({"logprobs": 1}, {"prompt_logprobs": 0}, {"pooling": "last"}):
        with pytest.raises(ValidationError, match="leave out"):
            scoring((1, 2), **fields)
    with pytest.raises(ValidationError, match="max_new_tokens"):
        GenerationRequest(prompt_token_ids=(1,), allowed_token_ids=PAIR, scores_allowed=True)
    with pytest.raises(InvalidRequestError, match="beyond the vocabulary"):
        create_engine().add_request(scoring((1, 2), (1, VOCAB_SIZE)))
