"""A scheduler with a device that shows every mistake in its pages and rows, and no model."""

from collections import deque
from collections.abc import Callable
from itertools import count
from random import Random

from llm.scheduling.scheduler import Scheduler
from llm.scheduling.sequence import Sequence, StepPart, StepPlan
from llm.scheduling.slot_pool import SlotPool
from llm.serving.schemas import GenerationRequest

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


class Device:
    """Runs plans in order of launching. A slot holds (group of layers, position, token); a draw is a function of the
    tokens in sight.

    Pages that went to another too early, tokens of another row, cached pages that hold something else: all show in
    what is drawn. Where snapshots are kept, each row has a state, the tokens that it has run, which has to be what the
    pages say.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._windows = scheduler.windows
        self._slots: dict[int, tuple[int, int, int]] = {}
        self._last_token_ids: dict[int, int] = {}
        self._has_states = scheduler.num_state_snapshots > 0
        self._states: dict[int, tuple[int, ...]] = {}
        self._snapshots: dict[int, tuple[int, ...]] = {}

    def launch(self, plan: StepPlan) -> list[int]:
        for part in plan.parts:
            known_ids = part.sequence.tokens
            assert part.start < len(known_ids) or part.num_tokens == 1
            for i in range(part.start, part.end):
                token_id = known_ids[i] if i < len(known_ids) else self._last_token_ids[part.row]
                self.store(part, i, token_id)
        if self._has_states:
            for part in plan.parts:
                self._run_state(part)
        drawn = {part.row: self._draw(part) for part in plan.parts if part.draws_token}
        self._last_token_ids |= drawn
        return list(drawn.values())

    def _run_state(self, part: StepPart) -> None:
        """Begin, go on from where the row is or from a snapshot, and leave one behind."""
        state = self._states.get(part.row, ()) if part.start else ()
        if part.restored is not None:
            state = self._snapshots[part.restored]
        tokens = self.seen(part, part.end)
        assert state == tokens[: part.start]
        self._states[part.row] = tokens
        if part.saved is not None:
            self._snapshots[part.saved] = tokens

    def store(self, part: StepPart, position: int, token_id: int) -> None:
        """Write a token's keys and values, in each group of layers."""
        for group in range(len(self._windows)):
            self._slots[_slot(part, group, position)] = (group, position, token_id)

    def seen(self, part: StepPart, end: int) -> tuple[int, ...]:
        """What the groups of layers find for the token before `end`, one behind the other."""
        token_ids = []
        for group, window in enumerate(self._windows):
            for position in range(max(end - (window or end), 0), end):
                *place, token_id = self._slots[_slot(part, group, position)]
                assert place == [group, position]
                token_ids.append(token_id)
        return tuple(token_ids)

    def _draw(self, part: StepPart) -> int:
        return draw_after(self.seen(part, part.end))


def in_sight(tokens: list[int], scheduler: Scheduler) -> tuple[int, ...]:
    """What the groups of layers see of a sequence's tokens."""
    return tuple(token for window in scheduler.windows for token in tokens[-(window or len(tokens)) :])


def draw_after(token_ids: tuple[int, ...]) -> int:
    """The device's language model; 0, which ends a sequence, comes now and then."""
    return hash(token_ids) % 150


def expected_output(sequence: Sequence, scheduler: Scheduler) -> list[int]:
    """What the device says to a sequence that runs alone to its end."""
    request = sequence.request
    tokens = list(sequence.prompt_ids)
    while True:
        tokens.append(draw_after(in_sight(tokens, scheduler)))
        num_output = len(tokens) - len(sequence.prompt_ids)
        is_stop = tokens[-1] == 0 and num_output > request.min_new_tokens
        if is_stop or num_output == request.max_new_tokens or len(tokens) == scheduler.max_seq_len:
            return tokens[len(sequence.prompt_ids) :]


class Pipeline:
    """Scheduler and device as an engine runs them: a plan is applied when `max_steps_ahead` more are launched."""

    def __init__(self, scheduler: Scheduler, max_steps_ahead: int) -> None:
        self.scheduler = scheduler
        self._device = Device(scheduler)
        self._max_steps_ahead = max_steps_ahead
        self._in_flight: deque[tuple[StepPlan, list[int]]] = deque()

    def step(self) -> None:
        plan = self.scheduler.schedule()
        assert plan.num_tokens <= self.scheduler.max_tokens_per_step
        assert plan.parts or self._in_flight, "pending work, but nothing was scheduled"
        if plan.parts:
            self._in_flight.append((plan, self._device.launch(plan)))
        if not plan.parts or len(self._in_flight) > self._max_steps_ahead:
            self.scheduler.apply(*self._in_flight.popleft())
        self.scheduler.check()

    def run_to_end(self, limit: int = 2000) -> None:
        for _ in range(limit):
            if not self.scheduler.has_pending_work:
                return
            self.step()
        raise AssertionError("did not finish")


def run_random_load(
    pipeline: Pipeline, rng: Random, tokens_of: Callable[[int], list[int] | None]
) -> tuple[list[Sequence], list[Sequence]]:
    """Sequences that come while others run, some of which are aborted: all of them, and the aborted ones.

    Args:
        tokens_of: gives a prompt of so many tokens; None for one that nobody else has.
    """
    scheduler = pipeline.scheduler
    sequences: list[Sequence] = []
    aborted: list[Sequence] = []
    for _ in range(rng.randint(2, 12)):
        num_prompt = rng.choice([rng.randint(1, 8), rng.randint(1, 30)])
        tokens = tokens_of(num_prompt)
        params = rng.choice([{}, {"min_new_tokens": 20}, {"presence_penalty": 1.0}])
        sequences.append(create_sequence(num_prompt, rng.randint(1, 80), tokens, **params))
        scheduler.add(sequences[-1])
        for _ in range(rng.choice([0, 0, 1, 5])):
            if scheduler.has_pending_work:
                pipeline.step()
        if rng.random() < 0.1:
            aborted.append(rng.choice(sequences))
            scheduler.finish(aborted[-1])
            scheduler.check()
    pipeline.run_to_end()
    return sequences, aborted


def _slot(part: StepPart, group: int, position: int) -> int:
    return part.sequence.pages[group][position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE
