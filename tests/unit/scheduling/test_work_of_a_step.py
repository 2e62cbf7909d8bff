"""How much work one call to the scheduler is, in operations counted: no call grows with what it need not look at."""

import gc
import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from llm.scheduling import prefix_cache
from llm.scheduling.scheduler import Scheduler
from llm.scheduling.sequence import Sequence
from llm.scheduling.slot_pool import SlotPool
from llm.serving.schemas import GenerationRequest

PAGE_SIZE = 16
LONG = 131_072


def create_scheduler(num_rows: int, **options) -> Scheduler:
    defaults = {"max_batch_size": num_rows, "max_tokens_per_step": 8192, "max_seq_len": 2 * LONG}
    return Scheduler(SlotPool(40_000, PAGE_SIZE), **{**defaults, **options})


def create_sequence(num_tokens: int, seed: int = 0, max_new_tokens: int = 1000) -> Sequence:
    """A prompt that repeats nothing, and begins unlike that of any other seed."""
    prompt = tuple(range(seed * 1_000_000 + 1, seed * 1_000_000 + 1 + num_tokens))
    request = GenerationRequest(prompt_token_ids=prompt, max_new_tokens=max_new_tokens, ignore_eos=True)
    return Sequence(request, prompt, frozenset(), PAGE_SIZE)


def step(scheduler: Scheduler) -> None:
    plan = scheduler.schedule()
    scheduler.apply(plan, [7] * sum(part.num_draws for part in plan.parts))


def count_calls(call: Callable[[], object]) -> int:
    """Functions, of Python and of C, that are called while `call` runs; each round of a generator counts as one."""
    num_calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal num_calls
        num_calls += event in ("call", "c_call")

    gc.disable()  # a collection calls whoever has asked to be told of it, at a time that has nothing to do with this
    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
        gc.enable()
    return num_calls


@contextmanager
def counted_hashes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A list whose only entry is the number of pages hashed since it was last set to 0."""
    num_hashes = [0]

    class CountingHashlib:
        @staticmethod
        def blake2b(*args, **kwargs):
            num_hashes[0] += 1
            return hashlib.blake2b(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(prefix_cache, "hashlib", CountingHashlib)
        yield num_hashes


def calls_to_admit(num_sequences: int, num_running: int = 0) -> int:
    scheduler = create_scheduler(num_running + num_sequences)
    for i in range(num_running):
        scheduler.add(create_sequence(8, i))
    step(scheduler)
    for i in range(num_sequences):
        scheduler.add(create_sequence(8, num_running + i))
    num_calls = count_calls(scheduler.schedule)
    assert scheduler.num_running == num_running + num_sequences
    return num_calls


def test_admission_grows_with_those_admitted():
    """Four times as many take four times as many calls, a hundred each at most."""
    few, many = calls_to_admit(256), calls_to_admit(1024)
    assert many < 4.1 * few
    assert many < 1024 * 100


def test_admission_does_not_look_at_all_who_run_again_and_again():
    """What 64 newcomers add to a step hardly depends on whether 64 or 960 run already."""
    few, many = calls_to_admit(64, num_running=64), calls_to_admit(64, num_running=960)
    assert many - few < 10 * (960 - 64)


def test_a_decode_takes_few_calls():
    """A row that decodes costs `schedule` and `apply` a handful of calls each."""
    scheduler = create_scheduler(512)
    for i in range(512):
        scheduler.add(create_sequence(8, i))
    step(scheduler)
    assert count_calls(lambda: step(scheduler)) < 512 * 14


def test_a_queue_without_room_costs_no_more_than_its_head():
    """A thousand waiting prompts that find no pages make a step little longer, and so do five thousand."""
    calls = []
    for num_waiting in (1000, 5000):
        scheduler = create_scheduler(8)
        scheduler.pool.allocate(scheduler.pool.num_available - 20)
        scheduler.add(create_sequence(8))
        step(scheduler)
        for i in range(num_waiting):
            scheduler.add(create_sequence(400, i + 1))
        calls.append(count_calls(scheduler.schedule))
        assert scheduler.num_running == 1
    assert calls[1] <= calls[0] < 3000


@pytest.mark.parametrize("is_cached", [False, True])
def test_a_long_prompt_is_hashed_bit_by_bit(is_cached: bool, monkeypatch: pytest.MonkeyPatch):
    """No step hashes more than 768 pages for the lookup and 512 for the chunk that it ran, of 8,192 in all.

    Whoever decodes beside it gets a token in each step, and all of a cached prompt is found in the end.
    """
    scheduler = create_scheduler(4)
    if is_cached:
        scheduler.add(create_sequence(LONG, 1, max_new_tokens=1))
        while scheduler.has_pending_work:
            step(scheduler)
    beside, long = create_sequence(8, 2), create_sequence(LONG, 1)
    scheduler.add(beside)
    step(scheduler)
    scheduler.add(long)
    most_hashes = num_steps = 0
    with counted_hashes(monkeypatch) as num_hashes:
        while not long.num_output_tokens:
            num_hashes[0] = 0
            step(scheduler)
            num_steps += 1
            most_hashes = max(most_hashes, num_hashes[0])
    assert most_hashes <= 768 + 512
    assert beside.num_output_tokens == 1 + num_steps
    assert long.num_cached_tokens == (LONG - PAGE_SIZE if is_cached else 0)
    scheduler.check()


def test_long_prompts_that_are_hashed_already_are_looked_up_one_a_step():
    """Finding 8,192 pages in the prefix cache is a step's work; the next prompt waits for the next step."""
    scheduler = create_scheduler(4, max_seq_len=LONG + 2)
    sequences = [create_sequence(LONG, 1, max_new_tokens=1) for _ in range(4)]
    for sequence in sequences:
        sequence.hashes.extend(sequence.tokens, LONG)
    scheduler.add(sequences[0])
    while scheduler.has_pending_work:
        step(scheduler)
    for sequence in sequences[1:]:
        scheduler.add(sequence)
    for num_admitted in (1, 2, 3):
        scheduler.schedule()
        assert sum(sequence.num_cached_tokens is not None for sequence in sequences[1:]) == num_admitted


def test_a_long_prompt_is_indexed_bit_by_bit():
    """A step indexes 1,024 tokens at most, and 128 of each row; a short prompt does not wait for long ones."""
    scheduler = create_scheduler(8, num_speculative_tokens=4)
    long = [create_sequence(LONG, i) for i in range(2)]
    short = create_sequence(1000, 7)
    for sequence in (*long, short):
        scheduler.add(sequence)
    num_indexed, short_after = dict.fromkeys((*long, short), 0), None
    for num_steps in range(1, 400):
        step(scheduler)
        before = sum(num_indexed.values())
        for sequence in num_indexed:
            if sequence.lookup is not None:
                num_indexed[sequence] = len(sequence.tokens) - sequence.lookup.num_unindexed
        assert sum(num_indexed.values()) - before <= 1024 + 128 * 3
        if short_after is None and short.is_indexed:
            short_after = num_steps
        if all(sequence.is_indexed for sequence in num_indexed):
            break
    assert 2 * LONG / 1024 <= num_steps + 1 < 300
    assert short_after is not None
    assert short_after < 60


def test_nobody_guesses_before_its_prompt_is_indexed():
    """The tokens that guesses are made of come from the whole prompt, or not at all."""
    scheduler = create_scheduler(1, num_speculative_tokens=4)
    sequence = create_sequence(20_000, max_new_tokens=10_000)
    scheduler.add(sequence)
    while not sequence.is_indexed:
        assert sequence.guesses() == ()
        step(scheduler)
    for _ in range(20):
        step(scheduler)
    assert sequence.guesses() == (7, 7, 7, 7)
