"""Guessing from the prompt changes no output, and takes fewer steps where text repeats itself."""

import random
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import event, given, settings, strategies as st
from scheduler_pipeline import Device, Pipeline, create_scheduler, in_sight, run_random_load
from small_engines import (
    MODELS,
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
from llm.models.decoder import DecoderModel
from llm.scheduling.scheduler import Scheduler
from llm.scheduling.sequence import Sequence, StepPlan
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import FinishReason, GenerationRequest, GenerationResult
from llm.serving.step_packer import PackedPlan
from llm.tokenization.simple_tokenizer import SimpleCharacterTokenizer

DEMO = Path(__file__).parents[3] / "configs" / "demo"
NUM_GUESSES = 6
NUM_TOKENS = 6
SAMPLING = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.4},
    "cut": {"temperature": 0.7, "top_k": 3, "top_p": 0.9},
    "biased": {"temperature": 0.4, "logit_bias": {3: 2.0}, "min_new_tokens": 15},
    "penalised": {"temperature": 0.2, "presence_penalty": 0.5},
}
CONFIGS = {
    "batched": {},
    "chunked": {"max_tokens_per_step": 12},
    "two rows": {"max_batch_size": 2},
    "preempted": {"num_pages": 34, "max_seq_len": 100},
    "preempted without cache": {
        "num_pages": 34,
        "max_seq_len": 100,
        "enable_prefix_caching": False,
        "max_tokens_per_step": 16,
    },
}


def create_babbler(**shape) -> DecoderModel:
    """A model that knows few tokens, and so repeats itself."""
    return create_model(vocab_size=NUM_TOKENS, **shape)


def create_repeating_requests(**params) -> list[GenerationRequest]:
    """Prompts that repeat themselves, beside others that do not; some begin alike."""
    defaults = {"max_new_tokens": 40, "seed": 5}
    patterns = [(5,), (1, 2), (4, 2, 1, 0), tuple(range(NUM_TOKENS))]
    prompts = [pattern * (30 // len(pattern)) for pattern in patterns]
    prompts += [tuple(t % NUM_TOKENS for t in request.prompt_token_ids) for request in create_requests(4)]
    return [GenerationRequest(prompt_token_ids=prompt, **{**defaults, **params}) for prompt in prompts]


def facts(results: list[GenerationResult]) -> list[tuple]:
    return [(r.token_ids, r.text, r.finish_reason, r.stop_reason, r.num_prompt_tokens) for r in results]


@cache
def facts_alone(sampling_name: str) -> list[tuple]:
    """What each request says alone and without guesses, the same for every configuration."""
    requests = create_repeating_requests(**SAMPLING[sampling_name])
    return facts([run_alone(request, create_babbler()) for request in requests])


def count_steps(engine: ContinuousBatchingEngine, requests: list[GenerationRequest]) -> tuple[int, list]:
    """Steps launched while the requests run to their end, and their results."""
    num_steps = 0
    launch = engine.runner.launch

    def counted(plan: PackedPlan):
        nonlocal num_steps
        num_steps += 1
        return launch(plan)

    engine.runner.launch = counted
    results = engine.generate(requests, progress=False)
    return num_steps, results


CASES = [
    (config_name, sampling_name, (row + column) % 2)
    for row, config_name in enumerate(CONFIGS)
    for column, sampling_name in enumerate(SAMPLING)
]
"""Every sampling in every configuration, and each of them in step with the host and ahead of it."""


@pytest.mark.parametrize(("config_name", "sampling_name", "max_steps_ahead"), CASES)
def test_same_tokens_as_without(config_name, sampling_name, max_steps_ahead):
    """Every request says what it says alone without guesses; where nothing forbids them, guesses were right."""
    sampling = SAMPLING[sampling_name]
    requests = create_repeating_requests(**sampling)
    engine = create_engine(
        create_babbler(), num_speculative_tokens=NUM_GUESSES, max_steps_ahead=max_steps_ahead, **CONFIGS[config_name]
    )
    results = engine.generate(requests, progress=False)
    check_idle(engine)
    assert facts(results) == facts_alone(sampling_name)
    stats = engine.stats()
    assert stats.num_generated_tokens == sum(len(result.token_ids) for result in results)
    assert 0 <= stats.num_accepted_tokens <= stats.num_proposed_tokens
    if "presence_penalty" in sampling:
        assert stats.num_proposed_tokens == 0
    else:
        assert stats.num_accepted_tokens > 0


@pytest.mark.parametrize("shape", MODELS.values(), ids=MODELS.keys())
def test_same_tokens_with_every_attention(shape):
    """Windows, few heads: what is behind a window is dropped by accepted tokens only."""
    model = create_babbler(**shape)
    requests = create_repeating_requests(temperature=0.0)
    engine = create_engine(model, num_speculative_tokens=NUM_GUESSES, num_pages=40, max_seq_len=90)
    results = engine.generate(requests, progress=False)
    check_idle(engine)
    assert facts(results) == facts([run_alone(request, model) for request in requests])
    assert engine.stats().num_accepted_tokens > 0


@each_depth
def test_fewer_steps_where_text_repeats(max_steps_ahead):
    """A model that says one thing only gets nine tokens a step, in one output each."""
    request = GenerationRequest(prompt_token_ids=(3, 4), max_new_tokens=80, logit_bias={5: 100.0})
    model = create_babbler()
    plain_steps, plain = count_steps(create_engine(model), [request])
    engine = create_engine(model, num_speculative_tokens=8, max_steps_ahead=max_steps_ahead)
    steps, results = count_steps(engine, [request])
    assert facts(results) == facts(plain)
    assert plain_steps >= 80
    assert steps <= 16
    stats = engine.stats()
    assert stats.num_accepted_tokens >= 0.9 * stats.num_proposed_tokens


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 17, 31])
def test_length_is_exact(max_new_tokens):
    engine = create_engine(create_babbler(), num_speculative_tokens=8)
    requests = create_repeating_requests(temperature=0.0, max_new_tokens=max_new_tokens)
    for result in engine.generate(requests, progress=False):
        assert (len(result.token_ids), result.finish_reason) == (max_new_tokens, FinishReason.LENGTH)
    check_idle(engine)


def test_context_ends_a_sequence():
    """Nobody guesses past the context's end."""
    (request,) = create_repeating_requests(temperature=0.0, max_new_tokens=500)[:1]
    model = create_babbler()
    engine = create_engine(model, num_speculative_tokens=8)
    assert facts(engine.generate([request], progress=False)) == facts([run_alone(request, model)])
    assert engine.max_seq_len == 128


def stopping_requests(temperature: float, stop_token_id: int) -> list[GenerationRequest]:
    return create_repeating_requests(temperature=temperature, stop_token_ids=(stop_token_id,), min_new_tokens=12)


@cache
def facts_of_stopping_alone(temperature: float, stop_token_id: int) -> list[tuple]:
    """The same for both depths."""
    model = create_babbler()
    return facts([run_alone(request, model) for request in stopping_requests(temperature, stop_token_id)])


@pytest.mark.parametrize("temperature", [0.0, 0.4])
@each_depth
def test_stop_ids_among_accepted_tokens(temperature, max_steps_ahead):
    """Tokens after the one that ends a sequence are dropped, whichever of a step's tokens it is."""
    model = create_babbler()
    engine = create_engine(model, num_speculative_tokens=8, max_steps_ahead=max_steps_ahead)
    for first in range(NUM_TOKENS):
        results = engine.generate(stopping_requests(temperature, first), progress=False)
        check_idle(engine)
        assert facts(results) == facts_of_stopping_alone(temperature, first)
    assert engine.stats().num_accepted_tokens > 0


@each_depth
@pytest.mark.parametrize("stop", ["ab", "ba", "a", "bab", "zz"])
def test_stop_strings_among_accepted_tokens(stop, max_steps_ahead):
    """Text and tokens end where they do without guesses. The bias makes the model say "a" and "b" alone."""
    tokenizer = SimpleCharacterTokenizer([chr(ord("a") + i) for i in range(26)])
    model = create_model()
    bias = dict.fromkeys(tokenizer.encode("ab"), 100.0)
    requests = [
        GenerationRequest(
            prompt=prompt, max_new_tokens=40, seed=i, temperature=2.0 * (i % 2), stop=(stop,), min_new_tokens=15,
            logit_bias=bias,
        )
        for i, prompt in enumerate(["abababab", "aaaaaaaa", "bbabbabbab", "abbbabbbabbb"])
    ]  # fmt: skip
    plain = create_engine(model, tokenizer=tokenizer)
    engine = create_engine(model, tokenizer=tokenizer, num_speculative_tokens=8, max_steps_ahead=max_steps_ahead)
    assert facts(engine.generate(requests, progress=False)) == facts(plain.generate(requests, progress=False))
    check_idle(engine)
    assert engine.stats().num_accepted_tokens > 0
    assert engine.stats().num_generated_tokens == plain.stats().num_generated_tokens


def test_log_probabilities_of_accepted_tokens():
    """One entry for each token, of its own position."""
    requests = create_repeating_requests(temperature=0.0, logprobs=2)
    model = create_babbler()
    engine = create_engine(model, num_speculative_tokens=8)
    for result, request in zip(engine.generate(requests, progress=False), requests, strict=True):
        expected = run_alone(request, model)
        assert [entry.token_id for entry in result.logprobs] == list(expected.token_ids)
        for entry, wanted in zip(result.logprobs, expected.logprobs, strict=True):
            assert entry.logprob == pytest.approx(wanted.logprob, abs=1e-4)
    assert engine.stats().num_accepted_tokens > 0


@each_depth
@pytest.mark.parametrize("seed", range(3))
def test_aborts_at_random_times(seed, max_steps_ahead):
    """Whoever is not aborted gets all of its tokens, whoever is gets the first of them."""
    rng = random.Random(seed)
    model = create_babbler()
    engine = create_engine(
        model, num_pages=34, max_seq_len=100, max_batch_size=3, num_speculative_tokens=NUM_GUESSES,
        max_steps_ahead=max_steps_ahead,
    )  # fmt: skip
    requests = create_repeating_requests(temperature=0.0)
    for request in requests:
        engine.add_request(request)
    aborted = []

    def abort_one() -> None:
        request = rng.choice(requests)
        if rng.random() < 0.1 and engine.abort(request.request_id):
            aborted.append(request)

    outputs = run_steps(engine, after_step=abort_one)
    assert aborted
    for request, (expected, *_) in zip(requests, facts_alone("greedy"), strict=True):
        tokens = tokens_of(outputs, request)
        assert tokens == (expected[: len(tokens)] if request in aborted else expected)


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 0.4, "top_k": 8}], ids=["greedy", "cut"])
def test_graph_runner_says_the_same(params):
    """The GPU's kernels, parts with guesses among prefills and decodes; in Triton's interpreter on a CPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = create_babbler().to(device)
    requests = [
        request.model_copy(update={"prompt_token_ids": request.prompt_token_ids[:16], "max_new_tokens": 12})
        for request in create_repeating_requests(**params)[:5]
    ]

    def run(backend: str, num_speculative_tokens: int) -> tuple[list, int]:
        config = EngineConfig(
            max_batch_size=3, max_tokens_per_step=40, num_pages=64, page_size=16, attention_backend=backend,
            num_speculative_tokens=num_speculative_tokens,
        )  # fmt: skip
        engine = ContinuousBatchingEngine(model, config=config)
        results = engine.generate(requests, progress=False)
        check_idle(engine)
        return facts(results), engine.stats().num_accepted_tokens

    expected, _ = run("reference", 0)
    tokens, num_accepted = run("triton", 4)
    assert tokens == expected
    assert num_accepted > 0


def test_demo_model_answers_alike_in_fewer_steps():
    """What the demo model says of itself repeats little, but a list that it is shown and continues does."""
    plain, engine = (
        ContinuousBatchingEngine.from_pretrained(
            DEMO, device="cpu", progress=False, config=EngineConfig(num_speculative_tokens=num)
        )
        for num in (0, 8)
    )
    questions = ["Count from 1 to 40.", "Spell banana.", "What is 17 + 25?", "Write the multiplication table of 7."]
    requests = [
        GenerationRequest(
            prompt_token_ids=tuple(plain.tokenizer.apply_chat_template([{"role": "user", "content": question}])),
            temperature=0.0, max_new_tokens=250, seed=1,
        )
        for question in questions
    ]  # fmt: skip
    plain_steps, expected = count_steps(plain, requests)
    steps, results = count_steps(engine, requests)
    assert facts(results) == facts(expected)
    assert steps < plain_steps


class GuessingDevice(Device):
    """As the pipeline's device, but draws behind each guess too, and its language repeats itself.

    Keys and values of wrong guesses that anything attends to show in what is drawn.
    """

    def launch(self, plan: StepPlan) -> list[int]:
        drawn = []
        for part in plan.parts:
            token_ids = part.token_ids or [self._last_token_ids[part.row]]
            assert len(token_ids) == part.num_tokens
            assert not part.proposed or not part.sequence.uses_penalties
            for position, token_id in enumerate(token_ids, part.start):
                self.store(part, position, token_id)
            for end in range(part.end - part.num_draws + 1, part.end + 1):
                drawn.append(draw_after(self.seen(part, end), end))
                self._last_token_ids[part.row] = drawn[-1]
        return drawn


def draw_after(token_ids: tuple[int, ...], position: int) -> int:
    """Mostly the token five places back; now and then another, which depends on all in sight; 0 ends a sequence."""
    noise = hash((token_ids, position))
    return token_ids[-5] if noise % 8 and len(token_ids) >= 5 else noise // 8 % 90


def expected_output(sequence: Sequence, scheduler: Scheduler) -> list[int]:
    """What the device says to a sequence that runs alone to its end, a token a step."""
    tokens = list(sequence.prompt_ids)
    while True:
        tokens.append(draw_after(in_sight(tokens, scheduler), len(tokens)))
        num_output = len(tokens) - sequence.num_prompt_tokens
        if tokens[-1] == 0 and num_output > sequence.request.min_new_tokens:
            return tokens[sequence.num_prompt_tokens :]
        if num_output == sequence.request.max_new_tokens or len(tokens) == scheduler.max_seq_len:
            return tokens[sequence.num_prompt_tokens :]


@given(data=st.data(), max_steps_ahead=st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_any_load_finishes_in_full(data, max_steps_ahead):
    """Random prompts, budgets, windows, pool sizes, room for draws and aborts: the tokens are those of plain decoding.

    A page that has a name in the prefix cache holds what the name says, or somebody who shares it draws nonsense.
    """
    max_batch_size = data.draw(st.integers(1, 6))
    windows = data.draw(st.sampled_from([[None], [6], [9], [None, 6], [9, 6]]))
    scheduler = create_scheduler(
        num_pages=data.draw(st.integers(8, 30)) * len(windows),
        max_batch_size=max_batch_size,
        max_tokens_per_step=data.draw(st.integers(6, 30)),
        enable_prefix_caching=data.draw(st.booleans()),
        windows=windows,
        num_speculative_tokens=data.draw(st.integers(1, 9)),
        max_draws_per_step=data.draw(st.sampled_from([None, max_batch_size, max_batch_size + 5])),
    )
    scheduler.max_seq_len = scheduler.most_tokens(scheduler.max_seq_len)
    pipeline = Pipeline(scheduler, max_steps_ahead)
    pipeline._device = GuessingDevice(scheduler)
    rng = data.draw(st.randoms(use_true_random=True))
    sequences, aborted = run_random_load(
        pipeline, rng, lambda n: [1 + i % 5 for i in range(n)] if rng.random() < 0.5 else None
    )
    event(f"preemptions: {scheduler.num_preemptions > 0}, accepted: {scheduler.num_accepted_tokens > 0}")
    for sequence in sequences:
        expected = expected_output(sequence, scheduler)
        assert sequence.output_ids == (expected[: sequence.num_output_tokens] if sequence in aborted else expected)
    assert scheduler.pool.num_used == 0
