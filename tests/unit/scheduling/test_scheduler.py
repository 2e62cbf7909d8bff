"""The scheduler alone: budgets, order, preemption, prefix sharing, planning ahead. No model runs here."""

import pytest
from hypothesis import event, given, settings, strategies as st
from scheduler_pipeline import PAGE_SIZE, Pipeline, create_scheduler, create_sequence, expected_output, run_random_load

from llm.scheduling.prefix_cache import PageHashes
from llm.scheduling.scheduler import Scheduler
from llm.scheduling.sequence import Sequence, StepPlan
from llm.scheduling.slot_pool import GROUP_BITS
from llm.serving.schemas import FinishReason


def run_step(scheduler: Scheduler, token_id: int = 7) -> list[tuple[Sequence, int, int]]:
    """One step in which the model always says `token_id`; returns (sequence, start, num_tokens) of its parts."""
    plan = scheduler.schedule()
    parts = [(part.sequence, part.start, part.num_tokens) for part in plan.parts]
    assert plan.num_tokens <= scheduler.max_tokens_per_step
    for part in plan.parts:
        held = [page for pages in part.sequence.pages for page in pages if page != scheduler.pool.scratch_page]
        assert len(set(held)) == len(held)
        assert all(len(pages) * PAGE_SIZE >= part.end for pages in part.sequence.pages)
    scheduler.apply(plan, draws_of(plan, token_id))
    scheduler.check()
    return parts


def draws_of(plan: StepPlan, token_id: int = 7) -> list[int]:
    return [token_id] * sum(part.num_draws for part in plan.parts)


def run_to_end(scheduler: Scheduler, limit: int = 2000) -> int:
    for step in range(limit):
        if not scheduler.has_pending_work:
            return step
        assert run_step(scheduler), "pending work, but nothing was scheduled"
    raise AssertionError("did not finish")


def most_pages_of_90_tokens(scheduler: Scheduler) -> int:
    """Most pages in use while a sequence runs that ends with so many tokens."""
    sequence = create_sequence(70, max_new_tokens=20)
    scheduler.add(sequence)
    most_used = 0
    while scheduler.has_pending_work:
        run_step(scheduler)
        most_used = max(most_used, scheduler.pool.num_used)
    assert sequence.num_output_tokens == 20
    return most_used


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


def tokens_of_a_step(num_decodes: int, num_newcomers: int, max_batch_size: int) -> int:
    """Tokens of the step in which prompts of 1,000 tokens come beside decodes; a share is 192, the budget 4,096."""
    scheduler = create_scheduler(
        num_pages=20_000, max_batch_size=max_batch_size, max_tokens_per_step=4096, max_seq_len=8192,
        max_prefill_beside_decodes=192,
    )  # fmt: skip
    for _ in range(num_decodes):
        scheduler.add(create_sequence(1, max_new_tokens=100))
    run_step(scheduler)
    for _ in range(num_newcomers):
        scheduler.add(create_sequence(1000))
    return sum(num for _, _, num in run_step(scheduler))


@pytest.mark.parametrize(
    ("num_newcomers", "num_tokens"), [(1, 256), (3, 640), (10, 2048), (127, 2048), (128, 4096)],
    ids=["one", "three", "as many as fit", "more than fit", "a crowd"],
)  # fmt: skip
def test_newcomers_are_let_in_gently(num_newcomers, num_tokens):
    """Beside 64 decodes each newcomer gets 192 tokens of a step, up to 2,048 in all; a crowd gets all of it."""
    assert tokens_of_a_step(64, num_newcomers, max_batch_size=256) == num_tokens


def test_those_who_find_no_row_are_no_crowd():
    """A long queue behind 64 decodes and two free rows: two shares."""
    assert tokens_of_a_step(64, 200, max_batch_size=66) == 512


def test_a_newcomer_gets_its_share_beside_any_number_of_decodes():
    """More of them than a step with shares may have tokens: 192 still come on top."""
    assert tokens_of_a_step(2100, 1, max_batch_size=2200) == 2304


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
        events += scheduler.apply(plan, draws_of(plan, token_id))
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
    assert first.pages[0][:2] == second.pages[0][:2]


def test_layers_with_a_window_keep_no_more_than_it_beside_those_without():
    """90 tokens: all pages for the layers that see everything, 7 at most for each group with a window of 8."""
    scheduler = create_scheduler(num_pages=40, windows=[None, 8, 8])
    assert most_pages_of_90_tokens(scheduler) <= scheduler.pages_needed(90) == 23 + 2 * 7


def test_a_cached_prompt_needs_all_pages_of_some_layers_and_the_last_window_of_others():
    """The pages that the window has passed are given up first, and the prompt is found all the same."""
    scheduler = create_scheduler(num_pages=24, windows=[None, 8])
    tokens = list(range(1, 41))
    assert num_cached(scheduler, tokens) == 0
    assert num_cached(scheduler, tokens) == 40 - PAGE_SIZE
    first = PageHashes(PAGE_SIZE).extend(tokens, PAGE_SIZE)[0]
    assert num_cached(scheduler, list(range(500, 516))) == 0
    assert scheduler.pool.find(first | 1 << GROUP_BITS) is None, "the windowed layers' first page is gone"
    assert num_cached(scheduler, tokens) == 40 - PAGE_SIZE
    changes = scheduler.pool.take_changes()
    assert not any(content >> GROUP_BITS for content in changes.added), "others are told of the first group alone"
    num_cached(scheduler, list(range(700, 748)))
    assert num_cached(scheduler, tokens) == 0


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
    scheduler = create_scheduler(num_pages=12, windows=[8])
    assert most_pages_of_90_tokens(scheduler) <= scheduler.pages_needed(90) == 7


def test_cached_pages_behind_the_window_are_not_taken():
    """A prefix longer than the pool could hold beside the next chunk is used all the same: only its window is held."""
    scheduler = create_scheduler(num_pages=12, windows=[8])
    tokens = list(range(1, 41))
    scheduler.add(create_sequence(tokens=tokens))
    run_to_end(scheduler)
    longer = create_sequence(tokens=[*tokens, *range(100, 130)])
    scheduler.add(longer)
    assert run_step(scheduler) == [(longer, 40, 16)]
    run_to_end(scheduler)


def test_a_cached_prompt_needs_its_last_window_only():
    """Its first pages are the first to be given up, and no layer looks at them any more."""
    scheduler = create_scheduler(num_pages=12, windows=[8])
    tokens = list(range(1, 41))
    assert num_cached(scheduler, tokens) == 0
    num_cached(scheduler, list(range(500, 512)))
    assert scheduler.pool.find_prefix(PageHashes(PAGE_SIZE).extend(tokens, PAGE_SIZE)) == [], "the first page is gone"
    assert num_cached(scheduler, tokens) == 40 - PAGE_SIZE
    assert num_cached(scheduler, [*tokens[:36], 7, 7, 7]) == 36
    num_cached(scheduler, list(range(700, 748)))
    assert num_cached(scheduler, tokens) == 0


def num_cached(scheduler: Scheduler, tokens: list[int]) -> int | None:
    """Run a prompt to its end alone; tokens of it that were in the prefix cache."""
    sequence = create_sequence(tokens=tokens)
    scheduler.add(sequence)
    run_to_end(scheduler)
    return sequence.num_cached_tokens


def test_abort_at_any_time_frees_everything():
    scheduler = create_scheduler(max_tokens_per_step=8)
    waiting, prefilling, decoding = create_sequence(30), create_sequence(30), create_sequence(2, max_new_tokens=50)
    scheduler.add(decoding)
    scheduler.add(prefilling)
    run_step(scheduler)
    scheduler.add(waiting)
    for sequence in (waiting, prefilling, decoding, decoding):
        scheduler.finish(sequence)
    scheduler.check()
    assert not scheduler.has_pending_work
    assert scheduler.pool.num_used == 0


def test_next_step_is_planned_before_the_token_is_known():
    """A sequence goes on behind the token in flight; the host learns the tokens in order, a plan later."""
    scheduler = create_scheduler()
    sequence = create_sequence(5)
    scheduler.add(sequence)
    first, second = scheduler.schedule(), scheduler.schedule()
    (prefill,), (decode,) = first.parts, second.parts
    assert [(part.start, part.end, part.draws_token) for part in (prefill, decode)] == [(0, 5, True), (5, 6, True)]
    assert decode.start == len(sequence.tokens) == sequence.num_tokens - 2
    for plan, token_id in ((first, 21), (second, 22)):
        (event,) = scheduler.apply(plan, [token_id])
        assert (event.token_id, sequence.output_ids[-1]) == (token_id, token_id)
    assert sequence.num_in_flight == 0


@pytest.mark.parametrize("max_seq_len", [8, 100], ids=["context", "max_new_tokens"])
def test_end_by_length_wastes_no_step(max_seq_len):
    """Three tokens take three steps: nothing is planned behind the last, though it has not been seen."""
    scheduler = create_scheduler(max_seq_len=max_seq_len)
    scheduler.add(create_sequence(5, max_new_tokens=3 if max_seq_len == 100 else 50))
    plans = [scheduler.schedule() for _ in range(5)]
    assert [len(plan.parts) for plan in plans] == [1, 1, 1, 0, 0]
    reasons = [event.finish_reason for plan in plans for event in scheduler.apply(plan, draws_of(plan))]
    assert reasons == [None, None, FinishReason.LENGTH]
    assert not scheduler.has_pending_work
    scheduler.check()


def test_draws_behind_the_end_are_dropped():
    """A stop id in one step makes the next step's draw for it void; the other draws keep their places."""
    scheduler = create_scheduler()
    stops, goes_on = create_sequence(max_new_tokens=9), create_sequence(max_new_tokens=9)
    scheduler.add(stops)
    scheduler.add(goes_on)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert [event.finish_reason for event in scheduler.apply(first, [0, 7])] == [FinishReason.STOP, None]
    (event,) = scheduler.apply(second, [8, 9])
    assert (event.sequence, event.token_id, event.draw_index) == (goes_on, 9, 1)
    assert stops.output_ids == [0]


def test_penalties_wait_for_nobody():
    """What was drawn is counted where the next draw is made, so the host need not know it."""
    scheduler = create_scheduler()
    scheduler.add(create_sequence(frequency_penalty=0.5))
    scheduler.schedule()
    assert scheduler.schedule().parts


def test_preempted_with_a_draw_in_flight():
    """Its token counts, its old pages do not: it waits for the token, and is then computed anew from the first."""
    scheduler = create_scheduler(num_pages=8, max_tokens_per_step=32)
    old, young = create_sequence(16, max_new_tokens=16), create_sequence(11, max_new_tokens=16)
    scheduler.add(old)
    scheduler.add(young)
    run_step(scheduler)
    plans = [scheduler.schedule(), scheduler.schedule()]
    assert [len(plan.parts) for plan in plans] == [2, 1]
    assert (young.num_preemptions, young.num_in_flight, young.row) == (1, 1, None)
    scheduler.finish(old)
    assert not scheduler.schedule().parts, "there is room, but not all of its tokens are known"
    num_registered = scheduler.pool.num_cached
    scheduler.apply(plans[0], [7, 8])
    assert (young.output_ids, young.num_in_flight) == ([7, 8], 0)
    assert scheduler.pool.num_cached == num_registered
    assert run_step(scheduler)[0][0] is young
    scheduler.apply(plans[1], [7])
    run_to_end(scheduler)
    assert young.num_output_tokens == 16


def test_plans_from_before_a_preemption_name_no_pages():
    """Preempted while it prefills and admitted again at once: its pages are new, and hold nothing of the old plans."""
    scheduler = create_scheduler(num_pages=8, max_tokens_per_step=3, max_batch_size=2)
    old, young = create_sequence(4, max_new_tokens=40), create_sequence(20)
    scheduler.add(old)
    scheduler.add(young)
    plans = [scheduler.schedule() for _ in range(12)]
    assert (young.num_preemptions, young.num_in_flight) == (1, 0)
    scheduler.finish(old)
    last = scheduler.schedule()
    assert [(part.sequence, part.end) for part in last.parts] == [(young, 3)]
    for plan in (*plans, last):
        scheduler.apply(plan, draws_of(plan))
        assert young.num_registered_pages == 0
    run_to_end(scheduler)


def test_rows_stay_dense():
    """A row belongs to one running sequence; the lowest free one goes to the next that is admitted."""
    scheduler = create_scheduler(max_batch_size=3)
    sequences = [create_sequence(2, max_new_tokens=9) for _ in range(5)]
    for sequence in sequences:
        scheduler.add(sequence)
    run_step(scheduler)
    assert [sequence.row for sequence in sequences] == [0, 1, 2, None, None]
    scheduler.finish(sequences[2])
    scheduler.finish(sequences[0])
    run_step(scheduler)
    assert [sequence.row for sequence in sequences] == [None, 1, None, 0, 2]


def test_window_waits_for_its_own_pages():
    """With steps in flight the pool may lack pages that the sequence itself gives back: it waits, and is not preempted.

    Preempted it would come here again, and never end.
    """
    scheduler = create_scheduler(num_pages=7, windows=[8], enable_prefix_caching=False)
    assert scheduler.pages_needed(90) == 7
    sequence = create_sequence(70, max_new_tokens=20)
    scheduler.add(sequence)
    pipeline = Pipeline(scheduler, max_steps_ahead=1)
    pipeline.run_to_end()
    assert scheduler.num_preemptions == 0
    assert sequence.output_ids == expected_output(sequence, scheduler)


@pytest.mark.parametrize("max_steps_ahead", [0, 1, 2])
def test_what_was_generated_is_found_again(max_steps_ahead):
    """Pages filled with generated tokens are named as those of a prompt are, however far ahead they were planned."""
    scheduler = create_scheduler()
    sequence = create_sequence(6, max_new_tokens=30, ignore_eos=True)
    scheduler.add(sequence)
    Pipeline(scheduler, max_steps_ahead).run_to_end()
    again = create_sequence(tokens=sequence.tokens)
    scheduler.add(again)
    assert run_step(scheduler) == [(again, 32, 4)]


@given(data=st.data(), max_steps_ahead=st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_any_load_finishes_in_full(data, max_steps_ahead):
    """Random prompts, lengths, budgets, windows, pool sizes and aborts, with any number of steps in flight.

    Everybody gets the tokens that it would get alone, up to its abort, and no page and no row leaks.
    """
    windows = data.draw(st.sampled_from([[None], [3], [8], [None, 8], [None, 8, 8], [8, 3]]))
    options = {
        "max_batch_size": data.draw(st.integers(1, 6)),
        "max_tokens_per_step": data.draw(st.integers(6, 20)),
        "enable_prefix_caching": data.draw(st.booleans()),
        "windows": windows,
    }
    if windows == [None] and options["enable_prefix_caching"]:
        options["num_state_snapshots"] = data.draw(st.integers(0, 4))
    scheduler = create_scheduler(num_pages=data.draw(st.integers(8, 30)) * len(windows), **options)
    scheduler.max_seq_len = scheduler.most_tokens(scheduler.max_seq_len)
    pipeline = Pipeline(scheduler, max_steps_ahead)
    # One seed for the details: drawn one by one they come out small, and a small load never runs out of pages.
    rng = data.draw(st.randoms(use_true_random=True))
    sequences, aborted = run_random_load(pipeline, rng, lambda n: list(range(1, 1 + n)) if rng.random() < 0.3 else None)
    event(f"preemptions: {scheduler.num_preemptions > 0}")
    for sequence in sequences:
        expected = expected_output(sequence, scheduler)
        assert sequence.output_ids == (expected[: sequence.num_output_tokens] if sequence in aborted else expected)
    assert scheduler.pool.num_used == 0
