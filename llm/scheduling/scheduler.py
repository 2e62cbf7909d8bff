"""Which tokens of which sequences run in the next step, and on which pages."""

from collections import deque
from collections.abc import Iterable, Sequence as SequenceOf
from heapq import heappop, heappush

from llm.scheduling.prompt_lookup import PromptLookup
from llm.scheduling.sequence import (
    ScheduledSequence,
    Sequence,
    SequenceStatus,
    StepPlan,
    TokenEvent,
    VectorEvent,
    accept,
    are_worth_guessing,
    next_part,
)
from llm.scheduling.slot_pool import SlotPool
from llm.serving.schemas import Pooling

__all__ = ["ScheduledSequence", "Scheduler", "StepPlan", "TokenEvent"]
_CROWD = 2
"""So many newcomers for each sequence that decodes are a crowd."""
_MOST_TOKENS = 2048  # of a step in which fewer get their shares beside decodes
_TOKEN_MULTIPLE = 128
"""Tokens of a step with prefills are a multiple of this where there is a choice."""


class Scheduler:
    """Fills each step with decodes first, then prefill chunks, under one token budget.

    Running sequences are served oldest first; when pages run out the youngest is preempted: its pages go back and it
    waits, first in line, to be recomputed. So the oldest always gets on, and no sequence waits for ever.

    A plan counts as run once it is made, so the next can be made before its tokens are known: plans may be in flight,
    and `apply` takes in their tokens, plan by plan in the order they were made. The device must run the steps in that
    order too. Then a page may go to another sequence while steps in flight still write to it or read it: whatever the
    new owner writes comes later. Only its name in the prefix cache must wait for `apply`, when the content is there.
    A plan that fails is not applied: whoever ran it finishes its sequences instead.

    Guesses are checked in one step, as in Leviathan et al. 2022 (arXiv:2211.17192), but by equality: a draw is a
    function of logits, seed and position, so a guess is right if it is what is drawn, and the output is that of plain
    decoding, greedy or sampled, up to the rounding of the kernels. Guesses get what budget and pages are left, and
    preempt nobody. They make a step dearer, and the last token must be known; so only where enough sequences can guess
    do they, and no plan is made before those in flight are applied. Otherwise everybody runs ahead, a token a step.

    Writes sequences, the queues and the slot pool; nobody else does.

    Args:
        pool: pages to hand out.
        max_batch_size: most sequences that run at once; rows are 0 to `max_batch_size - 1`.
        max_tokens_per_step: token budget of a step.
        max_prefill_beside_decodes: prefill tokens for each newcomer beside decodes, unless it is a crowd; None for all.
        max_seq_len: tokens at which a sequence ends.
        window_size: tokens behind which no layer looks; pages wholly behind go back to the pool. None for no window.
        enable_prefix_caching: share full pages between sequences that begin alike.
        num_speculative_tokens: most guesses a sequence and step; 0 for no speculation.
        max_draws_per_step: draws that the runner has room for, at least `max_batch_size`; None for any number.
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
        num_speculative_tokens: int = 0,
        max_draws_per_step: int | None = None,
    ) -> None:
        self.pool = pool
        self.max_batch_size = max_batch_size
        self.max_tokens_per_step = max_tokens_per_step
        self.max_prefill_beside_decodes = max_prefill_beside_decodes or max_tokens_per_step
        self.max_seq_len = max_seq_len
        self.window_size = window_size
        self.enable_prefix_caching = enable_prefix_caching
        self.num_speculative_tokens = num_speculative_tokens
        self.max_draws_per_step = max_draws_per_step or max_tokens_per_step
        self.num_preemptions = 0
        self.num_proposed_tokens = self.num_accepted_tokens = 0
        self._waiting: deque[Sequence] = deque()
        self.held: set[Sequence] = set()
        """New sequences that cannot be run yet; `add` or `finish` them."""
        self._running: dict[Sequence, None] = {}
        """Oldest admission first; a dictionary, so that leaving takes no search."""
        self._free_rows = list(range(max_batch_size))
        """A heap: the lowest goes first, so that rows in use lie close together."""

    @property
    def has_pending_work(self) -> bool:
        """Whether any sequence is running or waiting."""
        return bool(self._running or self._waiting or self.held)

    @property
    def num_running(self) -> int:
        """Sequences that hold a row."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a row, preempted ones included."""
        return len(self._waiting) + len(self.held)

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens still to prefill, of waiting and running sequences."""
        prefilling = (sequence.num_uncomputed for sequence in self._running if sequence.num_uncomputed > 1)
        return sum(prefilling) + sum(sequence.num_uncomputed for sequence in self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence, which must leave room for a token."""
        self.held.discard(sequence)
        sequence.max_tokens = min(sequence.max_tokens, self.max_seq_len)
        assert len(sequence.tokens) < sequence.max_tokens, "a sequence that cannot grow would never end"
        if self.num_speculative_tokens and sequence.may_guess:
            sequence.lookup = PromptLookup(sequence.tokens, self.num_speculative_tokens)
        self._waiting.append(sequence)

    def schedule(self) -> StepPlan:
        """Choose the next step and take the pages it writes to.

        Empty only where nothing is pending, or everything that is waits for a plan in flight.
        """
        may_guess = self.num_speculative_tokens > 0 and are_worth_guessing(self._running)
        if may_guess and any(sequence.num_in_flight for sequence in self._running):
            return StepPlan(())
        num_preemptions = self.num_preemptions
        singles, prefilling = self._decodes()
        budget = self.max_tokens_per_step - len(singles)
        num_newcomers = len(prefilling) + min(len(self._waiting), len(self._free_rows))
        if num_newcomers < _CROWD * len(singles):
            # Newcomers are let in gently, so that those who run hardly notice, at the pace that each would have alone;
            # a crowd, which few would notice, at once. Filled up to what the step's products are padded to anyway.
            share = self.max_prefill_beside_decodes
            num_tokens = max(min(len(singles) + num_newcomers * share, _MOST_TOKENS), len(singles) + share)
            budget = min(budget, -(-num_tokens // _TOKEN_MULTIPLE) * _TOKEN_MULTIPLE - len(singles))
        chunks = []
        for sequence in prefilling:
            num_tokens = min(sequence.num_uncomputed, budget)
            if num_tokens and sequence.status is SequenceStatus.RUNNING and self._reserve(sequence, num_tokens):
                chunks.append(next_part(sequence, num_tokens))
                budget -= num_tokens
        if self.num_preemptions == num_preemptions:
            chunks += self._admissions(budget)
            if may_guess:
                singles, guessing = self._add_guesses(singles, chunks)
                chunks += guessing
        else:
            # An old sequence may have preempted a younger one that was to run. Nobody is admitted to the pages that
            # this made free: those who run already need them next.
            singles = [part for part in singles if part.sequence.status is SequenceStatus.RUNNING]
        singles += sorted(chunks, key=lambda part: part.num_tokens > 1)
        for part in singles:
            sequence = part.sequence
            sequence.num_computed += part.num_tokens
            sequence.num_in_flight += part.draws or part.completes_vector
        return StepPlan(tuple(singles))

    def apply(self, plan: StepPlan, token_ids: SequenceOf[int]) -> list[TokenEvent | VectorEvent]:
        """Take in what a step computed. Called once for each plan that ran, in the order they were made.

        What concerns a sequence that ended while the step ran is dropped: the price of planning ahead.

        Args:
            token_ids: the tokens drawn by the parts of the plan that draw, in order.
        """
        draw_index = -1
        events: list[TokenEvent | VectorEvent] = []
        for part in plan.scheduled:
            if part.proposed:
                events += self._apply_guesses(part, token_ids, draw_index + 1)
                draw_index += part.num_draws
                continue
            sequence = part.sequence
            draw_index += part.draws
            if sequence.status is SequenceStatus.FINISHED:
                continue
            if part.num_preemptions == sequence.num_preemptions:
                self._keep_pages(sequence, part.start + part.num_tokens)
            if part.draws:
                token_id = token_ids[draw_index]
                sequence.num_in_flight -= 1
                sequence.tokens.append(token_id)
                reason = sequence.finish_reason()
                events.append(TokenEvent(sequence, token_id, reason, draw_index))
                if reason is not None:
                    self.finish(sequence)
            elif part.completes_vector:
                events.append(VectorEvent(sequence, part.row))
                self.finish(sequence)
        return events

    def finish(self, sequence: Sequence) -> None:
        """End a sequence and give its pages back. Does nothing to one that has ended."""
        if sequence.status is SequenceStatus.FINISHED:
            return
        if sequence.status is SequenceStatus.RUNNING:
            self._release(sequence)
        else:
            (self.held if sequence in self.held else self._waiting).remove(sequence)
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
                decodes.append(next_part(sequence, 1))
        return decodes, prefilling

    def _add_guesses(
        self, decodes: list[ScheduledSequence], chunks: SequenceOf[ScheduledSequence]
    ) -> tuple[list[ScheduledSequence], list[ScheduledSequence]]:
        """Let decodes run guesses too, as far as there is room; returns those without and those with."""
        without, guessing = [], []
        num_tokens = self.max_tokens_per_step - sum(part.num_tokens for part in chunks)
        num_left = min(num_tokens, self.max_draws_per_step - sum(part.draws for part in chunks)) - len(decodes)
        for part in decodes:
            sequence = part.sequence
            proposed = sequence.guesses()[:num_left]
            proposed = proposed[: self._room_for_guesses(sequence, len(proposed))]
            if proposed:
                guessing.append(part.with_guesses(proposed))
                sequence.num_in_flight += len(proposed)
                sequence.is_speculating = True
                num_left -= len(proposed)
            else:
                without.append(part)
        self.num_proposed_tokens += sum(len(part.proposed) for part in guessing)
        return without, guessing

    def _room_for_guesses(self, sequence: Sequence, num_guesses: int) -> int:
        """How many guesses of a decode can run; takes pages for them where the pool can spare some."""
        num_guesses = min(num_guesses, sequence.max_tokens - len(sequence.tokens) - 1)
        num_pages = self.pool.pages_for(sequence.num_computed + 1 + num_guesses) - len(sequence.pages)
        # A page is left to each running sequence, for tokens that are more certain.
        if 0 < num_pages <= self.pool.num_available - len(self._running):
            sequence.pages += self.pool.allocate(num_pages)
        return min(num_guesses, len(sequence.pages) * self.pool.page_size - sequence.num_computed - 1)

    def _apply_guesses(self, part: ScheduledSequence, token_ids: SequenceOf[int], first: int) -> list[TokenEvent]:
        """`apply` for a part with guesses, whose draws begin at `first`."""
        sequence = part.sequence
        if sequence.status is SequenceStatus.FINISHED:
            return []
        events = accept(part, token_ids, first)
        self.num_accepted_tokens += len(events) - 1
        self._keep_pages(sequence, len(sequence.tokens) - 1)
        if events[-1].finish_reason is not None:
            self.finish(sequence)
        return events

    def _admissions(self, budget: int) -> Iterable[ScheduledSequence]:
        """Parts of waiting sequences for which there is room, first come first served."""
        while budget and self._waiting and self._admit(self._waiting[0]):
            sequence = self._waiting.popleft()
            num_tokens = min(sequence.num_uncomputed, budget)
            reserved = self._reserve(sequence, num_tokens)
            assert reserved, "an admitted sequence has its pages"
            yield next_part(sequence, num_tokens)
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
        sequence.note_admission(min(num_computed, sequence.num_prompt_tokens))
        sequence.status = SequenceStatus.RUNNING
        sequence.row = heappop(self._free_rows)
        self._running[sequence] = None
        return True

    def _cached_prefix(self, sequence: Sequence) -> list[int]:
        """Pages that hold the sequence's first tokens already; never its last token, which must be run to draw."""
        pages: list[int] = []
        if self.enable_prefix_caching and sequence.pooling is not Pooling.MEAN:  # which needs every hidden state
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
        sequence.num_dropped_pages = sequence.num_registered_pages = 0

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
