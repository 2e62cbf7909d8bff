"""Which tokens of which sequences run in the next step, and on which pages."""

from collections import deque
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from llm.core.slot_pool import SlotPool
from llm.serving.schemas import FinishReason
from llm.serving.sequence import Sequence, SequenceStatus


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """A sequence's part in a step: tokens `start` to `start + num_tokens - 1` run through the model."""

    sequence: Sequence
    start: int
    num_tokens: int

    @property
    def end(self) -> int:
        """Tokens in the sequence's context once the step has run."""
        return self.start + self.num_tokens

    @property
    def draws(self) -> bool:
        """Whether the step reaches the sequence's last token, and so draws the next."""
        return self.end == len(self.sequence.tokens)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step of the model. Parts with a single token come first."""

    scheduled: tuple[ScheduledSequence, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that run through the model."""
        return sum(part.num_tokens for part in self.scheduled)


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """A token that a step drew, and whether it ended its sequence."""

    sequence: Sequence
    token_id: int
    finish_reason: FinishReason | None


class Scheduler:
    """Fills each step with decodes first, then prefill chunks, under one token budget.

    Running sequences are served oldest first; when pages run out the youngest is preempted: its pages go back and it
    waits, first in line, to be recomputed. So the oldest always gets on, and no sequence waits for ever.

    Writes sequences, the queues and the slot pool; nobody else does.

    Args:
        pool: pages to hand out.
        max_batch_size: most sequences that run at once.
        max_tokens_per_step: token budget of a step.
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
        window_size: int | None = None,
        enable_prefix_caching: bool = True,
    ) -> None:
        self.pool = pool
        self.max_batch_size = max_batch_size
        self.max_tokens_per_step = max_tokens_per_step
        self.max_seq_len = max_seq_len
        self.window_size = window_size
        self.enable_prefix_caching = enable_prefix_caching
        self.num_preemptions = 0
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

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
        """Queue a new sequence."""
        self._waiting.append(sequence)

    def schedule(self) -> StepPlan:
        """Choose the next step and take the pages it writes to. Empty only where nothing is pending."""
        budget = self.max_tokens_per_step
        decodes, prefills = [], []
        for sequence in [s for s in self._running if s.num_uncomputed == 1]:
            if sequence.status is SequenceStatus.RUNNING and self._reserve(sequence, 1):
                decodes.append(ScheduledSequence(sequence, sequence.num_computed, 1))
        budget -= len(decodes)
        for sequence in [s for s in self._running if s.num_uncomputed > 1]:
            num_tokens = min(sequence.num_uncomputed, budget)
            if num_tokens and sequence.status is SequenceStatus.RUNNING and self._reserve(sequence, num_tokens):
                prefills.append(ScheduledSequence(sequence, sequence.num_computed, num_tokens))
                budget -= num_tokens
        # An old sequence that still prefills may have preempted a younger one that was to decode.
        decodes = [part for part in decodes if part.sequence.status is SequenceStatus.RUNNING]
        while budget and self._waiting and len(self._running) < self.max_batch_size and self._admit(self._waiting[0]):
            sequence = self._waiting.popleft()
            num_tokens = min(sequence.num_uncomputed, budget)
            reserved = self._reserve(sequence, num_tokens)
            assert reserved, "an admitted sequence has its pages"
            prefills.append(ScheduledSequence(sequence, sequence.num_computed, num_tokens))
            budget -= num_tokens
        return StepPlan(tuple(sorted(decodes + prefills, key=lambda part: part.num_tokens > 1)))

    def apply(self, plan: StepPlan, token_ids: SequenceOf[int]) -> list[TokenEvent]:
        """Take in what a step computed.

        Args:
            token_ids: the token drawn by each part of the plan that `draws`, in order.
        """
        drawn = iter(token_ids)
        events = []
        for part in plan.scheduled:
            draws = part.draws
            sequence = part.sequence
            sequence.num_computed = part.end
            self._register_full_pages(sequence)
            self._drop_pages_behind_window(sequence)
            if draws:
                sequence.tokens.append(next(drawn))
                reason = sequence.finish_reason(self.max_seq_len)
                events.append(TokenEvent(sequence, sequence.tokens[-1], reason))
                if reason is not None:
                    self.finish(sequence)
        return events

    def finish(self, sequence: Sequence) -> None:
        """End a sequence and give its pages back. Does nothing to one that has ended."""
        if sequence.status is SequenceStatus.FINISHED:
            return
        if sequence.status is SequenceStatus.RUNNING:
            self._running.remove(sequence)
            self._release_pages(sequence)
        else:
            self._waiting.remove(sequence)
        sequence.status = SequenceStatus.FINISHED

    def pages_needed(self, num_tokens: int) -> int:
        """Most pages a sequence of `num_tokens` holds at once: with a window, the window and one step's tokens."""
        if self.window_size is not None:
            num_tokens = min(num_tokens, self.window_size + self.max_tokens_per_step + self.pool.page_size)
        return self.pool.pages_for(num_tokens)

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence a row and its cached prefix if the pool can hold all of its tokens."""
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
        self._running.append(sequence)
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
        return max(self.pages_needed(len(sequence.tokens)) - num_held, 0)

    def _reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Take pages for the next tokens, preempting younger sequences; False if it had to preempt itself."""
        num_pages = self.pool.pages_for(sequence.num_computed + num_tokens) - len(sequence.pages)
        while num_pages > self.pool.num_available:
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        if num_pages > 0:
            sequence.pages += self.pool.allocate(num_pages)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to the head of the queue, to be recomputed."""
        self._running.remove(sequence)
        self._release_pages(sequence)
        sequence.num_computed = 0
        sequence.status = SequenceStatus.WAITING
        self._waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _release_pages(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages[sequence.num_dropped_pages :])
        sequence.pages = []
        sequence.num_dropped_pages = 0
        sequence.num_registered_pages = 0

    def _register_full_pages(self, sequence: Sequence) -> None:
        """Make pages that the step filled findable by content."""
        if not self.enable_prefix_caching:
            return
        num_full = sequence.num_computed // self.pool.page_size
        if num_full > sequence.num_registered_pages:
            hashes = sequence.hashes.extend(sequence.tokens, sequence.num_computed)
            for index in range(sequence.num_registered_pages, num_full):
                self.pool.register(sequence.pages[index], hashes[index])
            sequence.num_registered_pages = num_full

    def _drop_pages_behind_window(self, sequence: Sequence) -> None:
        """Give back pages that no later token attends to."""
        num_behind = self._num_pages_behind_window(sequence.num_computed)
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
