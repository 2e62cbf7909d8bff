"""Which tokens of which sequences run in the next step, and on which pages."""

from collections import deque
from collections.abc import Iterable, Sequence as SequenceOf
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import NamedTuple

from llm.core.slot_pool import SlotPool
from llm.serving.schemas import FinishReason
from llm.serving.sequence import Sequence, SequenceStatus

_CROWD = 4
"""Newcomers are few while there is less than one for so many sequences that decode."""
_TOKEN_MULTIPLE = 128
"""Tokens of a step with prefills are a multiple of this where there is a choice."""


class ScheduledSequence(NamedTuple):
    """A sequence's part in a step: tokens `start` to `start + num_tokens - 1` run through the model.

    A part with `start >= len(sequence.tokens)` when it is launched runs the one token that was drawn last at its row
    and that the host has not seen. (Not a dataclass: a step makes hundreds, and a frozen one takes thrice as long.)
    """

    sequence: Sequence
    start: int
    num_tokens: int
    draws: bool
    """Whether the step reaches the sequence's last token, and so draws the next."""
    row: int
    """Of the sequence while it runs: below the batch size, and nobody else's."""
    num_preemptions: int
    """Of the sequence when this was planned."""

    @property
    def end(self) -> int:
        """Tokens in the sequence's context once the step has run; the position of the token it draws."""
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step of the model. Parts with a single token come first."""

    scheduled: tuple[ScheduledSequence, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that run through the model."""
        return sum(part.num_tokens for part in self.scheduled)


class TokenEvent(NamedTuple):
    """A token that a step drew for a sequence that still wanted it, and whether it ended the sequence."""

    sequence: Sequence
    token_id: int
    finish_reason: FinishReason | None
    draw_index: int
    """Which of the step's draws it was."""


class Scheduler:
    """Fills each step with decodes first, then prefill chunks, under one token budget.

    Running sequences are served oldest first; when pages run out the youngest is preempted: its pages go back and it
    waits, first in line, to be recomputed. So the oldest always gets on, and no sequence waits for ever.

    A plan counts as run once it is made, so the next can be made before its tokens are known: plans may be in flight,
    and `apply` takes in their tokens, plan by plan in the order they were made. The device must run the steps in that
    order too. Then a page may go to another sequence while steps in flight still write to it or read it: whatever the
    new owner writes comes later. Only its name in the prefix cache must wait for `apply`, when the content is there.
    A plan that fails is not applied: whoever ran it finishes its sequences instead.

    Writes sequences, the queues and the slot pool; nobody else does.

    Args:
        pool: pages to hand out.
        max_batch_size: most sequences that run at once; rows are 0 to `max_batch_size - 1`.
        max_tokens_per_step: token budget of a step.
        max_prefill_beside_decodes: about as many prefill tokens go beside decodes while newcomers are few; None for
            what the budget leaves.
        max_seq_len: tokens at which a sequence ends.
        window_size: tokens behind which no layer looks; pages wholly behind go back to the pool. None for no window.
        enable_prefix_caching: share full pages between sequences that begin alike.
    """

    def __init__(
        self,
        pool: SlotPool,
        *,
        max_batch_size: int,
        max_tokens_per_step: int,
        max_seq_len: int,
        max_prefill_beside_decodes: int | None = None,
        window_size: int | None = None,
        enable_prefix_caching: bool = True,
    ) -> None:
        self.pool = pool
        self.max_batch_size = max_batch_size
        self.max_tokens_per_step = max_tokens_per_step
        self.max_prefill_beside_decodes = max_prefill_beside_decodes or max_tokens_per_step
        self.max_seq_len = max_seq_len
        self.window_size = window_size
        self.enable_prefix_caching = enable_prefix_caching
        self.num_preemptions = 0
        self._waiting: deque[Sequence] = deque()
        self._running: dict[Sequence, None] = {}
        """Oldest admission first; a dictionary, so that leaving takes no search."""
        self._free_rows = list(range(max_batch_size))
        """A heap: the lowest goes first, so that rows in use lie close together."""

    @property
    def has_pending_work(self) -> bool:
        """Whether any sequence is running or waiting."""
        return bool(self._running or self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold a row."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a row, preempted ones included."""
        return len(self._waiting)

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens still to prefill, of waiting and running sequences."""
        prefilling = (sequence.num_uncomputed for sequence in self._running if sequence.num_uncomputed > 1)
        return sum(prefilling) + sum(sequence.num_uncomputed for sequence in self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence, which must leave room for a token."""
        sequence.max_tokens = min(sequence.max_tokens, self.max_seq_len)
        assert len(sequence.tokens) < sequence.max_tokens, "a sequence that cannot grow would never end"
        self._waiting.append(sequence)

    def schedule(self) -> StepPlan:
        """Choose the next step and take the pages it writes to.

        Empty only where nothing is pending, or everything that is waits for a plan in flight.
        """
        num_preemptions = self.num_preemptions
        singles, prefilling = self._decodes()
        budget = self.max_tokens_per_step - len(singles)
        num_newcomers = len(prefilling) + len(self._waiting)
        if num_newcomers * _CROWD < len(singles):
            # Few newcomers are let in gently, so that those who run hardly notice; a crowd is let in at once. Filled
            # up to what the step's products are padded to anyway.
            num_tokens = len(singles) + self.max_prefill_beside_decodes
            budget = min(budget, -(-num_tokens // _TOKEN_MULTIPLE) * _TOKEN_MULTIPLE - len(singles))
        chunks = []
        for sequence in prefilling:
            num_tokens = min(sequence.num_uncomputed, budget)
            if num_tokens and sequence.status is SequenceStatus.RUNNING and self._reserve(sequence, num_tokens):
                chunks.append(_part(sequence, num_tokens))
                budget -= num_tokens
        if self.num_preemptions == num_preemptions:
            chunks += self._admissions(budget)
        else:
            # An old sequence may have preempted a younger one that was to run. Nobody is admitted to the pages that
            # this made free: those who run already need them next.
            singles = [part for part in singles if part.sequence.status is SequenceStatus.RUNNING]
        if chunks:
            singles += [part for part in chunks if part.num_tokens == 1]
            singles += [part for part in chunks if part.num_tokens > 1]
        for part in singles:
            sequence = part.sequence
            sequence.num_computed += part.num_tokens
            if part.draws:
                sequence.num_in_flight += 1
        return StepPlan(tuple(singles))

    def apply(self, plan: StepPlan, token_ids: SequenceOf[int]) -> list[TokenEvent]:
        """Take in what a step computed. Called once for each plan that ran, in the order they were made.

        What concerns a sequence that ended while the step ran is dropped: the price of planning ahead.

        Args:
            token_ids: the token drawn by each part of the plan that `draws`, in order.
        """
        draw_index = -1
        events = []
        for part in plan.scheduled:
            sequence = part.sequence
            draws = part.draws
            draw_index += draws
            if sequence.status is SequenceStatus.FINISHED:
                continue
            if part.num_preemptions == sequence.num_preemptions:
                self._keep_pages(sequence, part.start + part.num_tokens)
            if draws:
                token_id = token_ids[draw_index]
                sequence.num_in_flight -= 1
                sequence.tokens.append(token_id)
                reason = sequence.finish_reason()
                events.append(TokenEvent(sequence, token_id, reason, draw_index))
                if reason is not None:
                    self.finish(sequence)
        return events

    def finish(self, sequence: Sequence) -> None:
        """End a sequence and give its pages back. Does nothing to one that has ended."""
        if sequence.status is SequenceStatus.FINISHED:
            return
        if sequence.status is SequenceStatus.RUNNING:
            self._release(sequence)
        else:
            self._waiting.remove(sequence)
        sequence.status = SequenceStatus.FINISHED

    def pages_needed(self, num_tokens: int) -> int:
        """Most pages a sequence of `num_tokens` must hold: with a window, the window and one step's tokens.

        With plans in flight it may hold the tokens of these too, where the pool has room.
        """
        if self.window_size is not None:
            num_tokens = min(num_tokens, self.window_size + self.max_tokens_per_step + self.pool.page_size)
        return self.pool.pages_for(num_tokens)

    def check(self) -> None:
        """Assert the invariants of the pool and the rows."""
        self.pool.check()
        rows = [sequence.row for sequence in self._running] + self._free_rows
        assert sorted(row for row in rows if row is not None) == list(range(self.max_batch_size)), "rows are torn"
        assert all(sequence.row is None and not sequence.pages for sequence in self._waiting), "a waiting one holds"

    def _decodes(self) -> tuple[list[ScheduledSequence], list[Sequence]]:
        """Parts of the running sequences that have one token to run, and those that have more. The hottest loop."""
        decodes, prefilling = [], []
        page_size = self.pool.page_size
        for sequence in list(self._running):
            start = sequence.num_computed
            num_in_flight = sequence.num_in_flight
            num_tokens = len(sequence.tokens) + num_in_flight
            if num_tokens - start > 1:
                prefilling.append(sequence)
                continue
            # With penalties the draw depends on the tokens before it, all of which the host must know. And a sequence
            # that the tokens in flight bring to its greatest length has nothing left to draw.
            if num_in_flight and (sequence.uses_penalties or num_tokens >= sequence.max_tokens):
                continue
            if start < len(sequence.pages) * page_size:
                is_running = sequence.status is SequenceStatus.RUNNING
            else:
                is_running = sequence.status is SequenceStatus.RUNNING and self._reserve(sequence, 1)
            if is_running:
                decodes.append(_part(sequence, 1))
        return decodes, prefilling

    def _admissions(self, budget: int) -> Iterable[ScheduledSequence]:
        """Parts of waiting sequences for which there is room, first come first served."""
        while budget and self._waiting and self._admit(self._waiting[0]):
            sequence = self._waiting.popleft()
            num_tokens = min(sequence.num_uncomputed, budget)
            reserved = self._reserve(sequence, num_tokens)
            assert reserved, "an admitted sequence has its pages"
            yield _part(sequence, num_tokens)
            budget -= num_tokens

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence a row and its cached prefix if the pool can hold all of its tokens."""
        if not self._free_rows or sequence.num_in_flight:  # a preempted one is not recomputed before it is all known
            return False
        cached = self._cached_prefix(sequence)
        num_computed = len(cached) * self.pool.page_size
        num_behind = self._num_pages_behind_window(num_computed)
        shared = cached[num_behind:]
        num_revived = sum(self.pool.is_cached(page) for page in shared)
        num_needed = max(self.pages_needed(len(sequence.tokens)) - len(shared), 0) + num_revived
        # One page a running sequence is left for what they generate, or admission would lead to preemption at once.
        num_spoken_for = sum(self._num_pages_owed(s) for s in self._running) + len(self._running)
        if num_needed + num_spoken_for > self.pool.num_available:
            return False
        for page in shared:
            self.pool.share(page)
        sequence.pages = [self.pool.scratch_page] * num_behind + shared
        sequence.num_dropped_pages = num_behind
        sequence.num_registered_pages = len(cached)
        sequence.num_computed = num_computed
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = min(sequence.num_computed, sequence.num_prompt_tokens)
        sequence.status = SequenceStatus.RUNNING
        sequence.row = heappop(self._free_rows)
        self._running[sequence] = None
        return True

    def _cached_prefix(self, sequence: Sequence) -> list[int]:
        """Pages that hold the sequence's first tokens already; never its last token, which must be run to draw."""
        pages: list[int] = []
        if self.enable_prefix_caching:
            for content in sequence.hashes.extend(sequence.tokens, len(sequence.tokens) - 1):
                page = self.pool.find(content)
                if page is None:
                    break
                pages.append(page)
        return pages

    def _num_pages_owed(self, sequence: Sequence) -> int:
        """Pages that a running sequence will take for tokens it has already."""
        num_held = len(sequence.pages) - sequence.num_dropped_pages
        return max(self.pages_needed(sequence.num_tokens) - num_held, 0)

    def _reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Take pages for the next tokens, preempting younger sequences; False if there are none for it in this step."""
        num_pages = self.pool.pages_for(sequence.num_computed + num_tokens) - len(sequence.pages)
        while num_pages > self.pool.num_available:
            if self._num_pages_behind_window(sequence.num_computed) > sequence.num_dropped_pages:
                # Plans in flight will give back pages of its own. To preempt now, itself perhaps, would bring it here
                # again once it is recomputed, and so on for ever.
                return False
            victim = next(reversed(self._running))
            self._preempt(victim)
            if victim is sequence:
                return False
        if num_pages > 0:
            sequence.pages += self.pool.allocate(num_pages)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to the head of the queue, to be recomputed."""
        self._release(sequence)
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        sequence.status = SequenceStatus.WAITING
        self._waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        """Give back a running sequence's row and pages."""
        assert sequence.row is not None, "a running sequence has a row"
        del self._running[sequence]
        heappush(self._free_rows, sequence.row)
        sequence.row = None
        self.pool.release(sequence.pages[sequence.num_dropped_pages :])
        sequence.pages = []
        sequence.num_dropped_pages = 0
        sequence.num_registered_pages = 0

    def _keep_pages(self, sequence: Sequence, num_tokens: int) -> None:
        """Now that the first `num_tokens` are stored: make full pages findable, and give back those behind the window.

        Later plans in flight attend from position `num_tokens` on, so they do not look at pages given back here.
        """
        num_full = num_tokens // self.pool.page_size
        if num_full > sequence.num_registered_pages and self.enable_prefix_caching:
            hashes = sequence.hashes.extend(sequence.tokens, num_tokens)
            for index in range(sequence.num_registered_pages, num_full):
                self.pool.register(sequence.pages[index], hashes[index])
            sequence.num_registered_pages = num_full
        if self.window_size is None:
            return
        num_behind = self._num_pages_behind_window(num_tokens)
        if num_behind > sequence.num_dropped_pages:
            behind = slice(sequence.num_dropped_pages, num_behind)
            self.pool.release(sequence.pages[behind])
            sequence.pages[behind] = [self.pool.scratch_page] * (num_behind - sequence.num_dropped_pages)
            sequence.num_dropped_pages = num_behind

    def _num_pages_behind_window(self, num_computed: int) -> int:
        """Leading pages that no token from position `num_computed` on attends to."""
        if self.window_size is None:
            return 0
        return max(num_computed - self.window_size + 1, 0) // self.pool.page_size


def _part(sequence: Sequence, num_tokens: int) -> ScheduledSequence:
    """A running sequence's next tokens as a part of a step."""
    assert sequence.row is not None, "a running sequence has a row"
    start = sequence.num_computed
    draws = start + num_tokens == len(sequence.tokens) + sequence.num_in_flight
    return ScheduledSequence(sequence, start, num_tokens, draws, sequence.row, sequence.num_preemptions)
