"""The engine on a small random model: the same request gives the same tokens however it is run."""

from functools import cache
from itertools import combinations, product

import pytest
import torch
from pydantic import ValidationError
from small_engines import (
    CONFIGS,
    MODELS,
    SAMPLING,
    VOCAB_SIZE,
    check_idle,
    create_engine,
    create_model,
    create_requests,
    each_depth,
    run_alone,
    run_steps,
    tokens_of,
)

from llm.config import EngineConfig
from llm.core.kv_cache import KVCache
from llm.errors import ConfigError, InvalidRequestError
from llm.models.decoder import DecoderModel
from llm.scheduling.prefix_cache import PageHashes
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import FinishReason, GenerationRequest
from llm.tokenization.simple_tokenizer import SimpleCharacterTokenizer

ALPHABET = [chr(ord("a") + i) for i in range(26)]


@pytest.mark.parametrize("shape", MODELS.values(), ids=MODELS.keys())
def test_greedy_equals_the_model_itself(shape):
    """The engine says what argmax over a full recomputation says, token for token."""
    model = create_model(**shape)
    for request in create_requests(temperature=0.0):
        tokens = list(request.prompt_token_ids)
        with torch.inference_mode():
            for _ in range(request.max_new_tokens):
                tokens.append(int(model(tokens)[0, -1].argmax()))
        assert run_alone(request, model).token_ids == tuple(tokens[len(request.prompt_token_ids) :])


@cache
def tokens_alone(model_name: str, sampling_name: str) -> list[tuple[int, ...]]:
    """What each request gets in an engine of its own; the same for every configuration."""
    model = create_model(**MODELS[model_name])
    return [run_alone(request, model).token_ids for request in create_requests(**SAMPLING[sampling_name])]


WAYS: dict[str, dict] = {**CONFIGS, "reference backend": {"attention_backend": "reference"}}
PAIRS = [
    (model_name, way, [*SAMPLING][(row + column) % len(SAMPLING)], (row + column // 2) % 2)
    for row, model_name in enumerate(MODELS)
    for column, way in enumerate(WAYS)
]
"""Every two of a model, a way, a sampling and a depth, though not all four with each other."""


def test_every_two_are_together():
    for one, other in combinations(range(4), 2):
        ones, others = ({case[place] for case in PAIRS} for place in (one, other))
        assert {(case[one], case[other]) for case in PAIRS} == set(product(ones, others))


@pytest.mark.parametrize(("model_name", "way", "sampling_name", "max_steps_ahead"), PAIRS)
def test_batched_equals_alone(model_name, way, sampling_name, max_steps_ahead):
    """Batched, chunked, preempted, from cached pages or ahead of the host: everyone gets the tokens it gets alone."""
    requests = create_requests(**SAMPLING[sampling_name])
    engine = create_engine(create_model(**MODELS[model_name]), max_steps_ahead=max_steps_ahead, **WAYS[way])
    for _ in range(2):
        results = engine.generate(requests, progress=False)
        assert [result.token_ids for result in results] == tokens_alone(model_name, sampling_name)
        check_idle(engine)


@each_depth
def test_small_pool_preempts(max_steps_ahead):
    """The pool of the test above is small enough for preemption to happen."""
    engine = create_engine(**CONFIGS["preempted without cache"], max_steps_ahead=max_steps_ahead)
    engine.generate(create_requests(), progress=False)
    assert engine.stats().num_preemptions > 0


@each_depth
@pytest.mark.parametrize("sampling", SAMPLING.values(), ids=SAMPLING.keys())
@pytest.mark.parametrize("num_done", [1, 7, 19])
def test_resumed_equals_uninterrupted(sampling, num_done, max_steps_ahead):
    """A request taken over with the tokens so far goes on as if nothing had happened, and sends only new ones."""
    (request,) = create_requests(1, **sampling)
    whole = run_alone(request)
    engine = create_engine(max_steps_ahead=max_steps_ahead)
    resumed = request.model_copy(update={"output_token_ids": whole.token_ids[:num_done]})
    engine.add_request(resumed)
    outputs = run_steps(engine)
    assert tokens_of(outputs, request) == whole.token_ids[num_done:]
    assert outputs[-1].finish_reason is whole.finish_reason


@pytest.mark.parametrize("num_done", [0, 1, 7, 19])
def test_the_result_of_a_resumed_request_holds_what_is_new(num_done):
    """Tokens, text and log probabilities alike: joined with what the caller had, they are the uninterrupted answer."""
    tokenizer = SimpleCharacterTokenizer([chr(97 + i) for i in range(VOCAB_SIZE - 1)])
    (request,) = create_requests(1, logprobs=1, ignore_eos=True)
    (whole,) = create_engine(tokenizer=tokenizer).generate([request], progress=False)
    done = whole.token_ids[:num_done]
    resumed = request.model_copy(update={"output_token_ids": done})
    (result,) = create_engine(tokenizer=tokenizer).generate([resumed], progress=False)
    assert done + result.token_ids == whole.token_ids
    assert tokenizer.decode(done) + result.text == whole.text
    assert [entry.token_id for entry in result.logprobs] == list(result.token_ids)
    assert len(result.text) == len(result.token_ids) == 20 - num_done


@pytest.mark.parametrize(
    "field", ["prompt_token_ids", "output_token_ids", "stop_token_ids", "logit_bias", "allowed_token_ids"]
)
@pytest.mark.parametrize("token_id", [-1, True, False, 1.0, "1", None])
def test_what_is_no_token_id_is_refused(field, token_id):
    given = {token_id: 1.0} if field == "logit_bias" else (token_id,)
    with pytest.raises(ValidationError, match=field):
        GenerationRequest(**{"prompt_token_ids": (1,), field: given})


@pytest.mark.parametrize("bias", [1e10, -1e10, float("inf"), float("nan"), True])
def test_a_bias_that_no_logit_bears_is_refused(bias):
    with pytest.raises(ValidationError, match="logit_bias"):
        GenerationRequest(prompt_token_ids=(1,), logit_bias={1: bias})


@each_depth
def test_one_past_the_vocabulary_among_others_harms_none(max_steps_ahead):
    """A request whose stop id no token has is refused, and those beside it end as if alone."""
    good = create_requests(3, min_new_tokens=4, stop_token_ids=(VOCAB_SIZE - 1,))
    engine = create_engine(max_steps_ahead=max_steps_ahead)
    for request in good:
        engine.add_request(request)
    with pytest.raises(InvalidRequestError):
        engine.add_request(good[0].model_copy(update={"request_id": "bad", "stop_token_ids": (VOCAB_SIZE,)}))
    outputs = run_steps(engine)
    assert [tokens_of(outputs, request) for request in good] == [run_alone(request).token_ids for request in good]


def test_request_without_seed_gets_one():
    """Two requests without a seed differ; each repeats itself with the seed it was given."""
    first, second = (GenerationRequest(prompt_token_ids=(1, 2), max_new_tokens=30) for _ in range(2))
    assert first.seed != second.seed
    assert run_alone(first).token_ids != run_alone(second).token_ids
    assert run_alone(first).token_ids == run_alone(first).token_ids


@each_depth
def test_prefix_cache_saves_tokens_and_says_so(max_steps_ahead):
    engine = create_engine(max_steps_ahead=max_steps_ahead)
    prompt = tuple(range(30))
    first, second = (
        engine.generate([GenerationRequest(prompt_token_ids=prompt, max_new_tokens=2)], progress=False)[0]
        for _ in range(2)
    )
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 28)
    assert second.num_prompt_tokens == 30
    assert engine.stats().num_cached_prompt_tokens == 28
    assert engine.stats().num_prompt_tokens == 60


def test_logprobs_are_the_models_own():
    """Each token's log probability is that of log_softmax over the model's logits; the top ones come in order."""
    model = create_model()
    (request,) = create_requests(1, logprobs=3, max_new_tokens=5)
    result = run_alone(request, model)
    assert result.logprobs is not None
    tokens = list(request.prompt_token_ids)
    for token_id, entry in zip(result.token_ids, result.logprobs, strict=True):
        with torch.inference_mode():
            expected = model(tokens)[0, -1].log_softmax(-1)
        assert entry.token_id == token_id
        assert entry.logprob == pytest.approx(expected[token_id].item(), abs=1e-4)
        assert [value for _, value in entry.top] == pytest.approx(expected.topk(3).values.tolist(), abs=1e-4)
        tokens.append(token_id)


@each_depth
def test_abort_frees_pages_at_once(max_steps_ahead):
    """Aborted while waiting, prefilling and decoding; the rest goes on undisturbed."""
    engine = create_engine(max_tokens_per_step=16, max_batch_size=2, max_steps_ahead=max_steps_ahead)
    kept, *others = create_requests(4, temperature=0.0, max_new_tokens=30)
    for request in (kept, *others):
        engine.add_request(request)
    outputs = [output for _ in range(3) for output in engine.step()]
    assert all(engine.abort(request.request_id) for request in others)
    assert not engine.abort(others[0].request_id)
    outputs += run_steps(engine)
    assert tokens_of(outputs, kept) == run_alone(kept).token_ids


@each_depth
def test_failed_step_ends_its_requests_only(monkeypatch, max_steps_ahead):
    """If the model raises, the requests of that step end with an error each; a later one is served."""
    engine = create_engine(max_steps_ahead=max_steps_ahead)
    good, bad = create_requests(2, temperature=0.0)
    engine.add_request(bad)
    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "hidden_states", lambda *_: (_ for _ in ()).throw(RuntimeError("device on fire")))
        (output,) = engine.step()
    assert output.finish_reason is FinishReason.ERROR
    assert output.error == "RuntimeError: device on fire"
    check_idle(engine)
    assert engine.generate([good], progress=False)[0].token_ids == run_alone(good).token_ids


@each_depth
def test_text_and_stop_string_across_tokens(max_steps_ahead):
    """Text ends before the stop string, tokens end with the one that completed it."""
    tokenizer = SimpleCharacterTokenizer(ALPHABET)
    model = create_model()
    plain = GenerationRequest(prompt="hello", max_new_tokens=20, temperature=0.0)
    engine = create_engine(model, tokenizer=tokenizer, max_steps_ahead=max_steps_ahead)
    whole = engine.generate([plain], progress=False)[0]
    assert whole.text == tokenizer.decode(whole.token_ids)
    assert whole.finish_reason is FinishReason.LENGTH
    stop = whole.text[6:8]
    stopped = engine.generate([GenerationRequest(**{**plain.model_dump(exclude={"request_id"}), "stop": (stop,)})])[0]
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert (stopped.finish_reason, stopped.stop_reason) == (FinishReason.STOP, stop)
    assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)]
    check_idle(engine)


def test_guide_loop_runs_as_written():
    """Requests in, steps until nothing is pending; characters outside the alphabet do no harm."""
    engine = ContinuousBatchingEngine(
        model=DecoderModel(vocab_size=32000, hidden_size=64, num_layers=2, num_heads=8, max_seq_len=512),
        tokenizer=SimpleCharacterTokenizer(["a", "b", "c"]),
        device="cpu",
        max_batch_size=16,
        max_seq_len=512,
    )
    ids = {engine.add_request(GenerationRequest(prompt=text, max_new_tokens=50)) for text in ("Hello", "World")}
    ended = set()
    while engine.scheduler.has_pending_work:
        ended |= {output.request_id for output in engine.step() if output.finish_reason}
    assert ended == ids
    check_idle(engine)


@pytest.mark.parametrize(
    ("request_fields", "param", "message"),
    [
        ({"prompt_token_ids": (1,) * 128}, "prompt", "context is 128 tokens"),
        ({"prompt_token_ids": (1, VOCAB_SIZE)}, "prompt", "token id 48 is beyond the vocabulary of 48"),
        ({"prompt": "text"}, "prompt", "no tokenizer"),
        ({"prompt_token_ids": (1,), "stop": ("x",)}, "stop", "need an engine with a tokenizer"),
        ({"prompt_token_ids": (1,), "logit_bias": {99: 1.0}}, "logit_bias", "id 99 is beyond the vocabulary of 48"),
        (
            {"prompt_token_ids": (1,), "allowed_token_ids": (3, 48)},
            "allowed_token_ids",
            "id 48 is beyond the vocabulary",
        ),
        (
            {"prompt_token_ids": (1,), "stop_token_ids": (3, 48)},
            "stop_token_ids",
            "id 48 is beyond the vocabulary of 48",
        ),
        ({"prompt_token_ids": (1,), "output_token_ids": (2**31,)}, "output_token_ids", "id 2147483648 is beyond"),
        ({"prompt_token_ids": (2**63,)}, "prompt", "id 9223372036854775808 is beyond"),
    ],
)
def test_requests_that_can_never_be_served_are_refused(request_fields, param, message):
    engine = create_engine()
    with pytest.raises(InvalidRequestError, match=message) as caught:
        engine.add_request(GenerationRequest(**request_fields))
    assert caught.value.param == param
    check_idle(engine)


def test_generate_accepts_all_or_none():
    engine = create_engine()
    good, *_ = create_requests(1)
    with pytest.raises(InvalidRequestError):
        engine.generate([good, GenerationRequest(prompt_token_ids=(1,) * 500)], progress=False)
    assert not engine.scheduler.has_pending_work


def test_pool_smaller_than_the_context_becomes_the_context():
    """A prompt larger than the pool is refused at once, never pending for ever."""
    engine = create_engine(num_pages=5)
    assert engine.max_seq_len == 20
    with pytest.raises(InvalidRequestError, match="context is 20 tokens"):
        engine.add_request(GenerationRequest(prompt_token_ids=(1,) * 20))
    result = engine.generate([GenerationRequest(prompt_token_ids=(1,) * 15, max_new_tokens=50, ignore_eos=True)])[0]
    assert len(result.token_ids) == 5


@each_depth
@pytest.mark.parametrize("backend", ["sdpa", "triton"])
@pytest.mark.parametrize(
    "params", [{"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2}]
)
def test_logits_that_are_no_numbers_end_their_own_request_alone(backend, max_steps_ahead, params):
    """A spoiled row of the embeddings, say: the others' tokens are as ever, and nobody finds its keys and values."""
    if backend == "triton" and max_steps_ahead == 0:
        pytest.skip("it always runs ahead")
    model = create_model(num_layers=1)
    spoiled = GenerationRequest(prompt_token_ids=(*range(1, 20), VOCAB_SIZE - 1), max_new_tokens=4, seed=1, **params)
    never = {VOCAB_SIZE - 1: -1e9}
    others = create_requests(3, max_new_tokens=4, ignore_eos=True, logit_bias=never, **params)
    others = [r for r in others if VOCAB_SIZE - 1 not in (r.prompt_token_ids or ())]
    with torch.no_grad():
        model.embed_tokens.weight[VOCAB_SIZE - 1] = torch.nan
    if backend == "triton":
        config = EngineConfig(attention_backend="triton", max_batch_size=4, num_pages=32, page_size=16, max_seq_len=64)
        engine = ContinuousBatchingEngine(model, config=config)
    else:
        engine = create_engine(model, max_steps_ahead=max_steps_ahead)
    first, *results = engine.generate([spoiled, *others], progress=False)
    assert first.finish_reason is FinishReason.ERROR
    assert "NaN" in (first.error or "")
    assert first.token_ids == ()
    assert others
    for request, result in zip(others, results, strict=True):
        assert result.finish_reason is FinishReason.LENGTH
        assert result.token_ids == run_alone(request, model).token_ids
    hashes = PageHashes(engine.config.page_size).extend(spoiled.prompt_token_ids or (), 16)
    assert engine.scheduler.pool.find_prefix(hashes) == []
    check_idle(engine)


@each_depth
def test_windowed_sequence_may_outgrow_the_pool(max_steps_ahead):
    """With a window in every layer a sequence holds the window, so it may be longer than the pool."""
    model = create_model(window_size=8)
    engine = create_engine(model, num_pages=10, max_tokens_per_step=16, max_steps_ahead=max_steps_ahead)
    assert engine.num_slots < engine.max_seq_len
    (request,) = create_requests(1, temperature=0.0, max_new_tokens=100)
    assert engine.generate([request], progress=False)[0].token_ids == run_alone(request, model).token_ids


def test_configuration_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="past the model's context of 128"):
        create_engine(max_seq_len=1000)
    with pytest.raises(ConfigError, match="too small for a window"):
        create_engine(create_model(window_size=64), num_pages=2)


def test_engine_equals_library_cache():
    """Paged and contiguous caches give the same greedy text."""
    model = create_model()
    caches = KVCache.from_model_config(1, 128, model.num_layers, model.num_kv_heads, model.config.head_size)
    (request,) = create_requests(1, temperature=0.0)
    tokens: list[int] = []
    input_ids = list(request.prompt_token_ids)
    with torch.inference_mode():
        for _ in range(request.max_new_tokens):
            tokens.append(int(model(input_ids, kv_caches=caches, use_cache=True)[0, -1].argmax()))
            input_ids = [tokens[-1]]
    assert run_alone(request, model).token_ids == tuple(tokens)
