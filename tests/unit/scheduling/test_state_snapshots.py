"""Snapshots of states: where they are taken, how far a prefix is found by them, and what becomes of their places."""

from random import Random

import pytest
from scheduler_pipeline import PAGE_SIZE, Pipeline, create_scheduler, create_sequence, expected_output, run_random_load

from llm.scheduling import state_snapshots
from llm.scheduling.scheduler import Scheduler
from llm.scheduling.sequence import Sequence, StepPart
from llm.scheduling.slot_pool import SlotPool

SHARED = list(range(1, 31))


def create(num_state_snapshots: int = 8, **options) -> Scheduler:
    return create_scheduler(**{"num_state_snapshots": num_state_snapshots, "max_tokens_per_step": 100, **options})


def places_of(scheduler: Scheduler) -> SlotPool:
    assert scheduler._snapshots is not None
    return scheduler._snapshots.places


def run(scheduler: Scheduler, sequence: Sequence) -> list[StepPart]:
    """Parts of a sequence that runs to its end."""
    scheduler.add(sequence)
    parts = []
    while scheduler.has_pending_work:
        plan = scheduler.schedule()
        parts += plan.parts
        scheduler.apply(plan, [7] * sum(part.num_draws for part in plan.parts))
        scheduler.check()
    assert places_of(scheduler).num_used == 0
    return parts


def prompt_parts(parts: list[StepPart], sequence: Sequence) -> list[tuple[int, int, bool, bool]]:
    """Start, end, and whether a snapshot is restored and saved."""
    return [
        (part.start, part.end, part.restored is not None, part.saved is not None)
        for part in parts
        if part.start < sequence.num_prompt_tokens
    ]


def test_a_prompt_leaves_one_behind_its_last_whole_page_and_the_same_prompt_begins_there():
    scheduler = create()
    first, second, longer = (create_sequence(tokens=tokens) for tokens in (SHARED, SHARED, [*SHARED, *range(50, 60)]))
    assert prompt_parts(run(scheduler, first), first) == [(0, 28, False, True), (28, 30, False, False)]
    assert prompt_parts(run(scheduler, second), second) == [(28, 30, True, False)]
    assert second.num_cached_tokens == 28
    assert prompt_parts(run(scheduler, longer), longer) == [(28, 36, True, True), (36, 40, False, False)]


def test_a_prompt_that_parts_from_another_leaves_one_where_it_does():
    scheduler = create()
    sequences = [create_sequence(tokens=[*SHARED, *range(start, start + 20)]) for start in (100, 200, 300)]
    parts = [prompt_parts(run(scheduler, sequence), sequence) for sequence in sequences]
    assert parts[0] == [(0, 48, False, True), (48, 50, False, False)]
    assert parts[1] == [(0, 28, False, True), (28, 48, False, True), (48, 50, False, False)]
    assert parts[2] == [(28, 48, True, True), (48, 50, False, False)]
    assert [sequence.num_cached_tokens for sequence in sequences] == [0, 0, 28]


def test_prompts_of_few_pages_leave_none():
    scheduler = create()
    sequence = create_sequence(4 * PAGE_SIZE)
    assert prompt_parts(run(scheduler, sequence), sequence) == [(0, 16, False, False)]


def test_chunks_of_long_prompts_end_at_pages_and_leave_some_on_the_way(monkeypatch):
    monkeypatch.setattr(state_snapshots, "_PAGES_APART", 5)
    scheduler = create(max_tokens_per_step=15)
    sequence = create_sequence(54)
    assert prompt_parts(run(scheduler, sequence), sequence) == [
        (0, 12, False, False), (12, 24, False, True), (24, 36, False, False), (36, 48, False, True),
        (48, 52, False, True), (52, 54, False, False),
    ]  # fmt: skip


def test_snapshots_go_with_the_pages_of_their_prefix():
    """A pool that one long sequence fills: what was cached before is given up, and so are its snapshots."""
    scheduler = create(num_pages=12)
    first = create_sequence(tokens=SHARED)
    run(scheduler, first)
    assert (places_of(scheduler).num_cached, places_of(scheduler).num_free) == (1, 7)
    run(scheduler, create_sequence(40, max_new_tokens=8))
    assert places_of(scheduler).find(first.hashes.known[6]) is None
    assert places_of(scheduler).num_free == 7


def test_the_least_recently_used_goes_first():
    scheduler = create(2)
    prompts = [[100 * i + j for j in range(30)] for i in range(1, 5)]
    for index in (0, 1, 0, 2):
        run(scheduler, create_sequence(tokens=prompts[index]))
    cached = [create_sequence(tokens=prompt) for prompt in (prompts[0], prompts[2], prompts[1])]
    for sequence in cached:
        run(scheduler, sequence)
    assert [sequence.num_cached_tokens for sequence in cached] == [28, 28, 0]


def test_one_that_ends_before_its_step_has_run_gives_its_place_back():
    scheduler = create()
    sequence = create_sequence(tokens=SHARED)
    scheduler.add(sequence)
    plan = scheduler.schedule()
    assert places_of(scheduler).num_used == 1
    scheduler.finish(sequence)
    assert places_of(scheduler).num_free == 8
    scheduler.apply(plan, [])
    assert places_of(scheduler).num_free == 8
    again = create_sequence(tokens=SHARED)
    run(scheduler, again)
    assert again.num_cached_tokens == 0


def test_where_all_places_are_in_flight_prompts_run_without():
    scheduler = create(1)
    for _ in range(3):
        scheduler.add(create_sequence(30))
    plan = scheduler.schedule()
    assert [part.saved for part in plan.parts] == [0, None, None]
    scheduler.apply(plan, [])
    scheduler.check()


def test_states_that_may_be_spoiled_are_found_by_nobody():
    """A token that could not be drawn: keys, values and states may hold NaN."""
    scheduler = create()
    sequence = create_sequence(tokens=SHARED)
    scheduler.add(sequence)
    scheduler.apply(scheduler.schedule(), [])
    assert places_of(scheduler).num_cached == 1
    scheduler.apply(scheduler.schedule(), [-1])
    assert places_of(scheduler).num_free == 8
    scheduler.finish(sequence)
    again = create_sequence(tokens=SHARED)
    run(scheduler, again)
    assert again.num_cached_tokens == 0


@pytest.mark.parametrize("seed", range(20))
def test_any_load_finishes_in_full(seed):
    """Prompts that share what they begin with, few places, few pages, steps in flight: nobody sees another's state."""
    rng = Random(seed)
    scheduler = create(rng.randint(1, 5), num_pages=rng.randint(12, 40), max_tokens_per_step=rng.randint(6, 40))
    scheduler.max_seq_len = scheduler.most_tokens(scheduler.max_seq_len)
    pipeline = Pipeline(scheduler, seed % 4)

    def tokens_of(num_tokens: int) -> list[int]:
        num_shared = rng.randint(0, num_tokens + 20)
        return [*range(1, 1 + num_shared), *(rng.randint(1000, 9999) for _ in range(num_tokens))][:40]

    sequences, aborted = run_random_load(pipeline, rng, tokens_of)
    for sequence in sequences:
        expected = expected_output(sequence, scheduler)
        assert sequence.output_ids == (expected[: sequence.num_output_tokens] if sequence in aborted else expected)
    assert places_of(scheduler).num_used == 0
