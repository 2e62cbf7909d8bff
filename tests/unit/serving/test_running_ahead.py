"""An engine that launches a step before it has read the last one's tokens gives what one that waits gives."""

import random

import pytest
from small_engines import (
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

from llm.serving.eager_runner import EagerRunner
from llm.serving.model_runner import LaunchedStep
from llm.serving.schemas import FinishReason
from llm.serving.step_packer import PackedPlan


@pytest.mark.parametrize(
    "params",
    [
        {"max_new_tokens": 1},
        {"stop_token_ids": tuple(range(0, VOCAB_SIZE, 3))},
        {"stop_token_ids": tuple(range(0, VOCAB_SIZE, 3)), "min_new_tokens": 6},
        {"logprobs": 2, "logit_bias": {3: 2.0}},
    ],
    ids=["one token", "stop ids", "min_new_tokens", "logprobs"],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_running_ahead_changes_nothing(params, temperature):
    """Requests of different lengths, more than fit at once: the same results whether the engine runs ahead or not."""
    requests = create_requests(12, **{"temperature": temperature, **params})
    if "max_new_tokens" not in params:
        requests = [r.model_copy(update={"max_new_tokens": 8 + i}) for i, r in enumerate(requests)]
    in_step, ahead = (
        create_engine(max_batch_size=4, max_steps_ahead=depth).generate(requests, progress=False) for depth in (0, 1)
    )
    for expected, result in zip(in_step, ahead, strict=True):
        assert (result.token_ids, result.finish_reason) == (expected.token_ids, expected.finish_reason)
        assert (result.stop_reason, result.num_prompt_tokens) == (expected.stop_reason, expected.num_prompt_tokens)
        for entry, expected_entry in zip(result.logprobs or (), expected.logprobs or (), strict=True):
            assert entry.logprob == pytest.approx(expected_entry.logprob, abs=1e-4)
            assert dict(entry.top) == pytest.approx(dict(expected_entry.top), abs=1e-4)


def test_outputs_come_a_call_later():
    """Ahead, the first call launches only; then each call returns the tokens of the step before."""
    engine = create_engine(max_steps_ahead=1)
    (request,) = create_requests(1, max_new_tokens=3)
    engine.add_request(request)
    assert [len(engine.step()) for _ in range(4)] == [0, 1, 1, 1]
    check_idle(engine)


@each_depth
@pytest.mark.parametrize("seed", range(4))
def test_aborts_at_random_times(seed, max_steps_ahead):
    """Whoever is not aborted gets all of its tokens, whoever is gets the first of them, and an id is free again."""
    rng = random.Random(seed)
    model = create_model()
    engine = create_engine(model, num_pages=34, max_seq_len=100, max_batch_size=3, max_steps_ahead=max_steps_ahead)
    requests = create_requests(6)
    for request in requests:
        engine.add_request(request)
    aborted = []

    def abort_one() -> None:
        request = rng.choice(requests)
        if rng.random() < 0.1 and engine.abort(request.request_id):
            aborted.append(request)

    outputs = run_steps(engine, after_step=abort_one)
    assert aborted
    for request in requests:
        expected = run_alone(request, model).token_ids
        tokens = tokens_of(outputs, request)
        assert tokens == (expected[: len(tokens)] if request in aborted else expected)
    for request in aborted:
        assert engine.add_request(request) == request.request_id
    again = run_steps(engine)
    assert all(tokens_of(again, request) == run_alone(request, model).token_ids for request in aborted)


def test_all_aborted_with_a_step_in_flight():
    """What the step computed is dropped when the next request comes, though that has the same id and row."""
    engine = create_engine(max_steps_ahead=1)
    first, second = create_requests(2, temperature=0.0)
    engine.add_request(first)
    engine.step()
    engine.abort(first.request_id)
    check_idle(engine)
    second = second.model_copy(update={"request_id": first.request_id})
    assert engine.generate([second], progress=False)[0].token_ids == run_alone(second).token_ids
    check_idle(engine)


class FaultyRunner:
    """Runs steps with another runner, but step number `bad_step` fails, at its launch or when it is waited for."""

    def __init__(self, runner: EagerRunner, bad_step: int, *, at_launch: bool) -> None:
        self._runner = runner
        self._num_steps_left = bad_step
        self._at_launch = at_launch
        self.attention_backend = runner.attention_backend
        self.max_steps_ahead = runner.max_steps_ahead

    def launch(self, plan: PackedPlan) -> LaunchedStep:
        self._num_steps_left -= 1
        step = self._runner.launch(plan)
        if self._num_steps_left != -1:
            return step
        if self._at_launch:
            raise RuntimeError("launch failed")
        return FailedStep()


class FailedStep:
    def draws(self):
        raise RuntimeError("step failed")


@each_depth
@pytest.mark.parametrize("at_launch", [True, False], ids=["launch", "draws"])
@pytest.mark.parametrize("bad_step", [0, 1, 4, 9])
def test_everyone_ends_once_when_a_step_fails(bad_step, at_launch, max_steps_ahead):
    """Those in the failed step end with an error, whatever else is in flight; all others get all of their tokens."""
    model = create_model()
    engine = create_engine(model, max_batch_size=3, max_steps_ahead=max_steps_ahead)
    engine.runner = FaultyRunner(engine.runner, bad_step, at_launch=at_launch)
    requests = create_requests(8, temperature=0.0)
    for request in requests:
        engine.add_request(request)
    outputs = run_steps(engine)
    ends = {output.request_id: output for output in outputs if output.finish_reason}
    assert len(ends) == len([output for output in outputs if output.finish_reason]) == len(requests)
    failed = [request for request in requests if ends[request.request_id].finish_reason is FinishReason.ERROR]
    assert 1 <= len(failed) <= 3
    for request in requests:
        expected = run_alone(request, model).token_ids
        tokens = tokens_of(outputs, request)
        assert tokens == (expected[: len(tokens)] if request in failed else expected)
    again = engine.generate(failed, progress=False)
    assert [result.token_ids for result in again] == [run_alone(request, model).token_ids for request in failed]
