"""Who goes first: arrival decides, small ones may pass a large one that finds no room, and nobody waits for ever."""

import random
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import event, given, settings, strategies as st
from scheduler_pipeline import PAGE_SIZE, Pipeline, create_scheduler, create_sequence, expected_output

from llm.errors import CapacityError
from llm.scheduling.scheduler import Scheduler
from llm.scheduling.sequence import Sequence, SequenceStatus


def run_step(scheduler: Scheduler) -> list[Sequence]:
    """One step in which the model says token 7; returns who ran."""
    plan = scheduler.schedule()
    scheduler.apply(plan, [7] * sum(part.num_draws for part in plan.parts))
    scheduler.check()
    return [part.sequence for part in plan.parts]


def run_until(scheduler: Scheduler, is_over: Callable[[], bool], limit: int = 5000) -> int:
    for step in range(limit):
        if is_over():
            return step
        run_step(scheduler)
    raise AssertionError("it never came")


def admitted(*sequences: Sequence) -> list[bool]:
    return [sequence.num_cached_tokens is not None for sequence in sequences]


def create_full_scheduler(num_pages: int = 64, num_left: int = 20, **options) -> tuple[Scheduler, Sequence]:
    """A scheduler whose pool a long-running sequence fills up to `num_left` pages; and that sequence."""
    scheduler = create_scheduler(
        num_pages=num_pages, max_tokens_per_step=1000, max_seq_len=num_pages * PAGE_SIZE, **options
    )
    old = create_sequence((num_pages - num_left) * PAGE_SIZE - 1, max_new_tokens=40)
    scheduler.add(old)
    run_step(scheduler)
    return scheduler, old


def test_small_ones_pass_a_large_one_that_finds_no_room():
    """They run while it waits, in order of arrival; it begins when the sequence that holds its pages has ended."""
    scheduler, old = create_full_scheduler()
    large = create_sequence(100)
    small = [create_sequence(8) for _ in range(4)]
    for sequence in (large, *small):
        scheduler.add(sequence)
    assert run_step(scheduler) == [old, *small]
    assert admitted(large) == [False]
    run_until(scheduler, lambda: old.status is SequenceStatus.FINISHED)
    assert large in run_step(scheduler)


def test_one_too_large_to_pass_is_passed_too():
    """Two large ones at the head, a small one behind: the small one runs; the second large one passes nobody."""
    scheduler, _ = create_full_scheduler()
    first, second, small = create_sequence(100), create_sequence(100), create_sequence(8)
    for sequence in (first, second, small):
        scheduler.add(sequence)
    run_step(scheduler)
    assert admitted(first, second, small) == [False, False, True]


def test_those_that_pass_have_no_more_tokens_than_the_one_they_pass():
    """Six of 10 tokens and their answers are as many as 90 tokens; whoever comes later waits behind the large one."""
    scheduler, old = create_full_scheduler(max_batch_size=64)
    large = create_sequence(90)
    scheduler.add(large)
    passed = []
    while large.num_cached_tokens is None:
        scheduler.add(create_sequence(10, max_new_tokens=5, ignore_eos=True))
        small = list(scheduler._waiting)[1:]
        run_step(scheduler)
        passed += [sequence for sequence in small if admitted(sequence) == [True] and admitted(large) == [False]]
    assert 80 <= sum(len(sequence.tokens) for sequence in passed) <= 90 + 2 * 5
    assert old.status is SequenceStatus.FINISHED


def test_pages_gather_for_the_large_one():
    """Small ones come without end, faster than they leave. The large one begins all the same, and soon.

    What may pass has 200 tokens at most, and each sequence ends 30 steps after it began.
    """
    scheduler = create_scheduler(num_pages=64, max_batch_size=32, max_tokens_per_step=64, max_seq_len=256)
    large = create_sequence(200, max_new_tokens=5)
    for step in range(1000):
        if step == 50:
            scheduler.add(large)
        if large.num_cached_tokens is not None:
            break
        for _ in range(2):
            scheduler.add(create_sequence(10, max_new_tokens=30, ignore_eos=True))
        run_step(scheduler)
    assert 50 < step < 50 + 3 * 30


def test_nobody_passes_where_there_is_room():
    """Arrival decides among those that fit, whatever their size."""
    scheduler = create_scheduler(max_batch_size=2, max_tokens_per_step=8)
    sequences = [create_sequence(num) for num in (30, 4, 30, 4)]
    for sequence in sequences:
        scheduler.add(sequence)
    order = []
    while scheduler.has_pending_work:
        run_step(scheduler)
        order += [sequence for sequence in sequences if admitted(sequence) == [True] and sequence not in order]
    assert order == sequences


def test_one_that_came_back_is_not_preempted_for_a_younger_one():
    """Preempted and recomputed, a sequence is as old as it ever was: the next time, one that arrived later must go."""
    scheduler = create_scheduler(num_pages=16, max_batch_size=4, enable_prefix_caching=False)
    sequences = [create_sequence(10, max_new_tokens=50, ignore_eos=True) for _ in range(3)]
    oldest, old, young = sequences
    scheduler.add(oldest)
    scheduler.add(old)
    run_until(scheduler, lambda: old.num_preemptions > 0)
    scheduler.finish(oldest)
    scheduler.add(young)
    run_until(scheduler, lambda: young.num_preemptions > 0)
    assert old.num_preemptions == 1


def test_one_that_passed_and_lost_its_pages_waits_behind_the_one_it_passed():
    """Preemption leads back to the place in the queue that arrival gives, not to its head."""
    scheduler, old = create_full_scheduler(num_left=12)
    large, small = create_sequence(60), create_sequence(30, max_new_tokens=20, ignore_eos=True)
    scheduler.add(large)
    scheduler.add(small)
    run_until(scheduler, lambda: small.num_preemptions > 0)
    assert list(scheduler._waiting) == [large, small]
    assert old.num_preemptions == 0


def test_one_that_waits_for_its_last_token_is_not_passed():
    """A sequence preempted with a token in flight has room as soon as the host knows the token."""
    scheduler = create_scheduler(num_pages=8, max_tokens_per_step=32)
    old, young = create_sequence(16, max_new_tokens=16), create_sequence(11, max_new_tokens=16)
    scheduler.add(old)
    scheduler.add(young)
    run_step(scheduler)
    plans = [scheduler.schedule(), scheduler.schedule()]
    assert (young.num_preemptions, young.num_in_flight) == (1, 1)
    scheduler.finish(old)
    small = create_sequence(2)
    scheduler.add(small)
    assert not scheduler.schedule().parts
    scheduler.apply(plans[0], [7, 8])
    assert run_step(scheduler) == [young, small]


def test_larger_than_the_pool_is_refused_at_once():
    """Whoever could not run alone is told so; one that could only not grow to its limit ends where the pool does."""
    scheduler = create_scheduler(num_pages=8)
    with pytest.raises(CapacityError, match="the sequence has 32 tokens; the pool holds 32"):
        scheduler.add(create_sequence(32))
    assert not scheduler.has_pending_work
    fits = create_sequence(20, max_new_tokens=80, ignore_eos=True)
    scheduler.add(fits)
    run_until(scheduler, lambda: not scheduler.has_pending_work)
    assert len(fits.tokens) == 32


@given(rng=st.randoms(use_true_random=True), max_steps_ahead=st.integers(0, 2), window_size=st.sampled_from([None, 8]))
@settings(max_examples=30, deadline=None)
def test_nobody_starves_beside_an_endless_load(rng: random.Random, max_steps_ahead: int, window_size: int | None):
    """Random requests come without end, a few of them large. Everybody begins soon, and says what it says alone.

    Soon means within three times the steps that the longest sequence takes alone, token by token. Observed are 1.6
    times; 1.3 where nobody passes anybody; and ever more, the longer the load lasts, where anybody may.
    """
    num_pages, most_new = rng.randint(12, 25), rng.choice([10, 40])
    scheduler = create_scheduler(
        num_pages=num_pages, max_batch_size=rng.randint(4, 8), max_tokens_per_step=rng.randint(12, 40),
        max_seq_len=num_pages * PAGE_SIZE, windows=[window_size],
    )  # fmt: skip
    pipeline = Pipeline(scheduler, max_steps_ahead)
    sequences: list[Sequence] = []
    steps_waited: Counter[Sequence] = Counter()
    passed = set()
    for _ in range(500):
        while scheduler.num_waiting < 5:
            num_prompt = scheduler.max_seq_len - rng.randint(2, 20) if rng.random() < 0.03 else rng.randint(1, 12)
            sequences.append(create_sequence(num_prompt, rng.randint(1, most_new)))
            scheduler.add(sequences[-1])
        pipeline.step()
        waiting = [sequence for sequence in sequences if sequence.num_cached_tokens is None]
        steps_waited.update(waiting)
        if waiting and any(admitted(*sequences[sequences.index(waiting[0]) :])):
            passed.add(waiting[0])
        assert max(steps_waited.values(), default=0) < 3 * (scheduler.max_seq_len + most_new)
    event(f"passed: {len(passed) > 0}")
    pipeline.run_to_end()
    for sequence in sequences:
        assert sequence.output_ids == expected_output(sequence, scheduler)
    assert scheduler.pool.num_used == 0
