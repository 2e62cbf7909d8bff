"""The scheduler alone: budgets, order, preemption, prefix sharing. No model runs here."""

from itertools import count

import pytest
from hypothesis import given, settings, strategies as st

from llm.core.slot_pool import SlotPool
from llm.serving.scheduler import Scheduler
from llm.serving.schemas import FinishReason, GenerationRequest
from llm.serving.sequence import Sequence

PAGE_SIZE = 4
_ids = count()


def create_scheduler(num_pages: int = 64, **options) -> Scheduler:
    defaults = {"max_batch_size": 8, "max_tokens_per_step": 16, "max_seq_len": 100}
    return Scheduler(SlotPool(num_pages, PAGE_SIZE), **{**defaults, **options})


def create_sequence(
    num_prompt: int = 5, max_new_tokens: int = 3, tokens: list[int] | None = None, **params
) -> Sequence:
    """A sequence whose prompt is its own, unless `tokens` says otherwise."""
    prompt = tuple(tokens) if tokens else tuple(1000 * next(_ids) + 1 + i for i in range(num_prompt))
    request = GenerationRequest(prompt_token_ids=prompt, max_new_tokens=max_new_tokens, **params)
    return Sequence(request, prompt, frozenset({0}), PAGE_SIZE)


def run_step(scheduler: Scheduler, token_id: int = 7) -> list[tuple[Sequence, int, int]]:
    """One step in which the model always says `token_id`; returns (sequence, start, num_tokens) of its parts."""
    plan = scheduler.schedule()
    parts = [(part.sequence, part.start, part.num_tokens) for part in plan.scheduled]
    assert plan.num_tokens <= scheduler.max_tokens_per_step
    for part in plan.scheduled:
        held = [page for page in part.sequence.pages if page != scheduler.pool.scratch_page]
        assert len(set(held)) == len(held)
        assert len(part.sequence.pages) * PAGE_SIZE >= part.end
    scheduler.apply(plan, [token_id] * sum(part.draws for part in plan.scheduled))
    scheduler.pool.check()
    return parts


def run_to_end(scheduler: Scheduler, limit: int = 2000) -> int:
    for step in range(limit):
        if not scheduler.has_pending_work:
            return step
        assert run_step(scheduler), "pending work, but nothing was scheduled"
    raise AssertionError("did not finish")


def test_prefill_is_cut_to_the_budget_and_decodes_ride_along():
    """A long prompt takes several steps, in which a running sequence still gets its token."""
    scheduler = create_scheduler(max_tokens_per_step=8)
    short, long = create_sequence(4, max_new_tokens=10), create_sequence(20)
    scheduler.add(short)
    scheduler.add(long)
    assert run_step(scheduler) == [(short, 0, 4), (long, 0, 4)]
    assert run_step(scheduler) == [(short, 4, 1), (long, 4, 7)]
    assert run_step(scheduler) == [(short, 5, 1), (long, 11, 7)]
    assert run_step(scheduler) == [(short, 6, 1), (long, 18, 2)]
    assert run_step(scheduler) == [(short, 7, 1), (long, 20, 1)]


def test_rows_are_limited():
    scheduler = create_scheduler(max_batch_size=2)
    for _ in range(3):
        scheduler.add(create_sequence(2))
    run_step(scheduler)
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.num_waiting_tokens) == (2, 1, 2)


@pytest.mark.parametrize(
    ("params", "token_id", "num_tokens", "reason"),
    [
        ({"max_new_tokens": 3}, 7, 3, FinishReason.LENGTH),
        ({"max_new_tokens": 9}, 0, 1, FinishReason.STOP),
        ({"max_new_tokens": 9, "stop_token_ids": (7,)}, 7, 1, FinishReason.STOP),
        ({"max_new_tokens": 9, "min_new_tokens": 2}, 0, 3, FinishReason.STOP),
        ({"max_new_tokens": 4, "ignore_eos": True}, 0, 4, FinishReason.LENGTH),
        ({"max_new_tokens": 500}, 7, 95, FinishReason.LENGTH),
    ],
    ids=["max_new_tokens", "eos", "stop id", "min_new_tokens", "ignore_eos", "context"],
)
def test_every_end_has_its_reason(params, token_id, num_tokens, reason):
    """Each way to end is reached at the right token, and gives the pages back."""
    scheduler = create_scheduler()
    sequence = create_sequence(**params)
    scheduler.add(sequence)
    events = []
    while scheduler.has_pending_work:
        plan = scheduler.schedule()
        events += scheduler.apply(plan, [token_id] * sum(part.draws for part in plan.scheduled))
    assert [event.finish_reason for event in events] == [None] * (num_tokens - 1) + [reason]
    assert scheduler.pool.num_used == 0


def test_youngest_is_preempted_and_finishes_later():
    """Two sequences that outgrow the pool: the older goes on, the younger waits, both finish in full."""
    scheduler = create_scheduler(num_pages=8, enable_prefix_caching=False)
    old, young = create_sequence(8, max_new_tokens=16), create_sequence(8, max_new_tokens=16)
    scheduler.add(old)
    scheduler.add(young)
    run_to_end(scheduler)
    assert scheduler.num_preemptions > 0
    assert old.num_output_tokens == young.num_output_tokens == 16
    assert scheduler.pool.num_free == 8


def test_shared_prefix_is_not_computed_again():
    """A second prompt that begins alike starts behind the shared full pages, and says how many tokens it saved."""
    scheduler = create_scheduler()
    tokens = list(range(1, 14))
    first, second = create_sequence(tokens=tokens), create_sequence(tokens=[*tokens[:10], 99, 98, 97])
    scheduler.add(first)
    run_step(scheduler)
    scheduler.add(second)
    assert (second, 8, 5) in run_step(scheduler)
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 8)
    assert first.pages[:2] == second.pages[:2]


def test_fully_cached_prompt_still_runs_its_last_token():
    """The last token must run for the next to be drawn, even where every page is cached."""
    scheduler = create_scheduler()
    tokens = list(range(1, 9))
    scheduler.add(create_sequence(tokens=tokens))
    run_to_end(scheduler)
    again = create_sequence(tokens=tokens)
    scheduler.add(again)
    assert run_step(scheduler) == [(again, 4, 4)]


def test_pages_behind_the_window_go_back_while_it_runs():
    """A sequence of 90 tokens with a window of 8 holds the window, one step and a page at most."""
    scheduler = create_scheduler(num_pages=12, window_size=8)
    sequence = create_sequence(70, max_new_tokens=20)
    scheduler.add(sequence)
    most_used = 0
    while scheduler.has_pending_work:
        run_step(scheduler)
        most_used = max(most_used, scheduler.pool.num_used)
    assert sequence.num_output_tokens == 20
    assert most_used <= scheduler.pages_needed(90) == 7


def test_cached_pages_behind_the_window_are_not_taken():
    """A prefix longer than the pool could hold beside the next chunk is used all the same: only its window is held."""
    scheduler = create_scheduler(num_pages=12, window_size=8)
    tokens = list(range(1, 41))
    scheduler.add(create_sequence(tokens=tokens))
    run_to_end(scheduler)
    longer = create_sequence(tokens=[*tokens, *range(100, 130)])
    scheduler.add(longer)
    assert run_step(scheduler) == [(longer, 40, 16)]
    run_to_end(scheduler)


def test_abort_at_any_time_frees_everything():
    scheduler = create_scheduler(max_tokens_per_step=8)
    waiting, prefilling, decoding = create_sequence(30), create_sequence(30), create_sequence(2, max_new_tokens=50)
    scheduler.add(decoding)
    scheduler.add(prefilling)
    run_step(scheduler)
    scheduler.add(waiting)
    for sequence in (waiting, prefilling, decoding, decoding):
        scheduler.finish(sequence)
    scheduler.pool.check()
    assert not scheduler.has_pending_work
    assert scheduler.pool.num_used == 0


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_load_finishes_in_full(data):
    """Random prompts, lengths, budgets, windows and pool sizes: everybody gets every token, and no page leaks."""
    window = data.draw(st.sampled_from([None, 3, 8]))
    options = {
        "max_batch_size": data.draw(st.integers(1, 6)),
        "max_tokens_per_step": data.draw(st.integers(6, 20)),
        "enable_prefix_caching": data.draw(st.booleans()),
        "window_size": window,
    }
    scheduler = create_scheduler(num_pages=data.draw(st.integers(12, 40)), **options)
    scheduler.max_seq_len = min(scheduler.max_seq_len, scheduler.pool.num_pages * PAGE_SIZE)
    sequences = []
    for _ in range(data.draw(st.integers(1, 8))):
        num_prompt = data.draw(st.integers(1, 30))
        tokens = list(range(1, 1 + num_prompt)) if data.draw(st.booleans()) else None
        sequences.append(create_sequence(num_prompt, data.draw(st.integers(1, 40)), tokens))
    for sequence in sequences:
        scheduler.add(sequence)
        if data.draw(st.booleans()):
            run_step(scheduler)
    run_to_end(scheduler)
    for sequence in sequences:
        room = scheduler.max_seq_len - sequence.num_prompt_tokens
        assert sequence.num_output_tokens == min(sequence.request.max_new_tokens, room)
    assert scheduler.pool.num_used == 0
