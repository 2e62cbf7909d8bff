"""The engine on a small random model: the same request gives the same tokens however it is run."""

import pytest
import torch

from llm.config import EngineConfig
from llm.core.kv_cache import KVCache
from llm.errors import ConfigError, InvalidRequestError
from llm.models.decoder import DecoderModel
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import FinishReason, GenerationRequest, GenerationResult
from llm.tokenization.simple_tokenizer import SimpleCharacterTokenizer

ALPHABET = [chr(ord("a") + i) for i in range(26)]
VOCAB_SIZE = 48


def create_model(**shape) -> DecoderModel:
    torch.manual_seed(0)
    defaults = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    model = DecoderModel(max_seq_len=128, **{**defaults, **shape})
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def create_engine(model: DecoderModel | None = None, *, tokenizer=None, **config) -> ContinuousBatchingEngine:
    defaults = {"max_batch_size": 8, "max_tokens_per_step": 64, "page_size": 4}
    return ContinuousBatchingEngine(model or create_model(), tokenizer, config=EngineConfig(**{**defaults, **config}))


def create_requests(num: int = 6, **params) -> list[GenerationRequest]:
    """Prompts of different lengths; some begin alike, so that the prefix cache has something to find."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randint(0, VOCAB_SIZE, (20,), generator=generator).tolist()
    defaults = {"max_new_tokens": 20, "seed": 11}
    requests = []
    for i in range(num):
        own = torch.randint(0, VOCAB_SIZE, (3 + 7 * i,), generator=generator).tolist()
        prompt = [*shared, *own] if i % 2 else own
        requests.append(GenerationRequest(prompt_token_ids=tuple(prompt), **{**defaults, **params}))
    return requests


def run_alone(request: GenerationRequest, model: DecoderModel | None = None) -> GenerationResult:
    """The oracle: a fresh engine with nothing else in it, whole prompt in one step, no prefix cache."""
    engine = create_engine(model, enable_prefix_caching=False, max_tokens_per_step=256)
    return engine.generate([request], progress=False)[0]


def finish(engine: ContinuousBatchingEngine) -> None:
    """Run whatever is pending, then check that no page leaked."""
    while engine.scheduler.has_pending_work:
        engine.step()
    check_idle(engine)


def check_idle(engine: ContinuousBatchingEngine) -> None:
    engine.scheduler.pool.check()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_used_pages) == (0, 0, 0)
    assert stats.num_free_pages + stats.num_cached_pages == stats.num_pages


SAMPLING = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0},
    "cut": {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "penalised": {"temperature": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.4, "repetition_penalty": 1.2},
}
MODELS = {
    "gqa": {},
    "mha": {"num_kv_heads": 4},
    "mqa": {"num_kv_heads": 1},
    "window": {"window_size": 10},
    "qk-norm, one windowed layer": {"qk_norm": True, "window_size": 10, "window_layers": (1,)},
}


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


@pytest.mark.parametrize("sampling", SAMPLING.values(), ids=SAMPLING.keys())
@pytest.mark.parametrize("shape", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"max_tokens_per_step": 8},
        {"num_pages": 34, "max_seq_len": 100},
        {"num_pages": 34, "max_seq_len": 100, "enable_prefix_caching": False, "max_tokens_per_step": 16},
        {"attention_backend": "reference"},
    ],
    ids=["batched", "chunked", "preempted", "preempted without cache", "reference backend"],
)
def test_batched_equals_alone(sampling, shape, config):
    """Batched, chunked, preempted or from cached pages: every request gets the tokens it gets alone."""
    model = create_model(**shape)
    requests = create_requests(**sampling)
    expected = [run_alone(request, model).token_ids for request in requests]
    engine = create_engine(model, **config)
    for _ in range(2):
        results = engine.generate(requests, progress=False)
        assert [result.token_ids for result in results] == expected
        check_idle(engine)


def test_small_pool_preempts():
    """The pool of the test above is small enough for preemption to happen."""
    engine = create_engine(num_pages=34, max_seq_len=100, enable_prefix_caching=False)
    engine.generate(create_requests(), progress=False)
    assert engine.stats().num_preemptions > 0


@pytest.mark.parametrize("sampling", SAMPLING.values(), ids=SAMPLING.keys())
@pytest.mark.parametrize("num_done", [1, 7, 19])
def test_resumed_equals_uninterrupted(sampling, num_done):
    """A request taken over with the tokens so far goes on as if nothing had happened, and sends only new ones."""
    (request,) = create_requests(1, **sampling)
    whole = run_alone(request)
    engine = create_engine()
    resumed = request.model_copy(update={"output_token_ids": whole.token_ids[:num_done]})
    engine.add_request(resumed)
    outputs = []
    while engine.scheduler.has_pending_work:
        outputs += engine.step()
    assert tuple(token for output in outputs for token in output.token_ids) == whole.token_ids[num_done:]
    assert outputs[-1].finish_reason is whole.finish_reason


def test_request_without_seed_gets_one():
    """Two requests without a seed differ; each repeats itself with the seed it was given."""
    first, second = (GenerationRequest(prompt_token_ids=(1, 2), max_new_tokens=30) for _ in range(2))
    assert first.seed != second.seed
    assert run_alone(first).token_ids != run_alone(second).token_ids
    assert run_alone(first).token_ids == run_alone(first).token_ids


def test_prefix_cache_saves_tokens_and_says_so():
    engine = create_engine()
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


def test_abort_frees_pages_at_once():
    """Aborted while waiting, prefilling and decoding; the rest goes on undisturbed."""
    engine = create_engine(max_tokens_per_step=16, max_batch_size=2)
    kept, *others = create_requests(4, temperature=0.0, max_new_tokens=30)
    for request in (kept, *others):
        engine.add_request(request)
    tokens: list[int] = []
    for step in range(200):
        tokens += [t for output in engine.step() if output.request_id == kept.request_id for t in output.token_ids]
        if step == 2:
            assert all(engine.abort(request.request_id) for request in others)
            assert not engine.abort(others[0].request_id)
        if not engine.scheduler.has_pending_work:
            break
    assert tuple(tokens) == run_alone(kept).token_ids
    check_idle(engine)


def test_failed_step_ends_its_requests_only(monkeypatch):
    """If the model raises, the requests of that step end with an error each; a later one is served."""
    engine = create_engine()
    good, bad = create_requests(2, temperature=0.0)
    engine.add_request(bad)
    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "hidden_states", lambda *_: (_ for _ in ()).throw(RuntimeError("device on fire")))
        (output,) = engine.step()
    assert output.finish_reason is FinishReason.ERROR
    assert output.error == "RuntimeError: device on fire"
    check_idle(engine)
    assert engine.generate([good], progress=False)[0].token_ids == run_alone(good).token_ids


def test_text_and_stop_string_across_tokens():
    """Text ends before the stop string, tokens end with the one that completed it."""
    tokenizer = SimpleCharacterTokenizer(ALPHABET)
    model = create_model()
    plain = GenerationRequest(prompt="hello", max_new_tokens=20, temperature=0.0)
    engine = create_engine(model, tokenizer=tokenizer)
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
        ({"prompt_token_ids": (1, VOCAB_SIZE)}, "prompt", "token id 48 is past the vocabulary of 48"),
        ({"prompt": "text"}, "prompt", "no tokenizer"),
        ({"prompt_token_ids": (1,), "stop": ("x",)}, "stop", "need an engine with a tokenizer"),
        ({"prompt_token_ids": (1,), "logit_bias": {99: 1.0}}, "logit_bias", "past the vocabulary"),
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


def test_windowed_sequence_may_outgrow_the_pool():
    """With a window in every layer a sequence holds the window, so it may be longer than the pool."""
    model = create_model(window_size=8)
    engine = create_engine(model, num_pages=10, max_tokens_per_step=16)
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
