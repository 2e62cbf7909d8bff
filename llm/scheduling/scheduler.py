"""Which tokens of which sequences run in the next step, and on which pages."""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence as SequenceOf
from heapq import heappop, heappush
from operator import attrgetter

from llm.errors import CapacityError
from llm.scheduling.page_manager import PageManager
from llm.scheduling.sequence import (
    Sequence,
    SequenceStatus,
    StepPart,
    StepPlan,
    TokenEvent,
    VectorEvent,
    next_part,
)
from llm.scheduling.slot_pool import SlotPool
from llm.scheduling.speculation import Speculation
from llm.scheduling.state_snapshots import StateSnapshots
from llm.scheduling.waiting_queue import WaitingQueue

_CROWD = 2
"""This many newcomers for each decoding sequence are a crowd."""
_MOST_TOKENS_BESIDE_DECODES = 2048
"""Most tokens of a step in which newcomers that are no crowd get their shares beside decodes."""
_TOKEN_MULTIPLE = 128
"""A step with prefills has a multiple of this many tokens, if there is a choice."""
_arrival = attrgetter("arrival")


class Scheduler:
    """Fills each step with decodes first, then prefill chunks, under one token budget.

    Sequences are served in order of arrival, whether they run, wait or return after preemption; `WaitingQueue` decides
    which ones may pass a sequence that finds no room. When pages run out, the running sequence that arrived last is
    preempted: its pages go back, and it waits in its place to be recomputed. So the oldest sequence always progresses,
    none waits forever, and none loses pages to one that arrived later.

    A plan counts as run once it is made, so the next can be made before its tokens are known: plans may be in flight,
    and `apply` processes their tokens, plan by plan in the order they were made. The device must run the steps in that
    order too. A page may then go to another sequence while steps in flight still write to it or read it: whatever the
    new owner writes comes later. Only its name in the prefix cache must wait for `apply`, when the content is there. A
    plan that fails is not applied: the caller that ran it finishes its sequences instead.

    While guesses are checked (see `Speculation`), no plan is made before those in flight are applied. Otherwise all
    sequences run ahead, one token per step.

    The work of a step grows with the sequences that run and those that are admitted. Work that grows with the length of
    a prompt, such as hashing and indexing, is spread over steps.

    Writes sequences and the queues, and through its `PageManager` the slot pool; nothing else does.

    Args:
        pool: pages to hand out.
        max_batch_size: most sequences that run at once; rows are 0 to `max_batch_size - 1`.
        max_tokens_per_step: token budget of a step.
        max_prefill_beside_decodes: prefill tokens for each newcomer beside decodes, unless it is a crowd; None for all.
        max_seq_len: tokens at which a sequence ends.
        windows: attention windows of the groups of layers, see `PageManager`.
        enable_prefix_caching: share full pages between sequences that begin with the same tokens.
        num_speculative_tokens: most guesses per sequence and step; 0 for no speculation.
        max_draws_per_step: draws that the runner has room for, at least `max_batch_size`; None for any number.
        num_state_snapshots: snapshots kept for layers with states, see `StateSnapshots`; 0 for a model without such
            layers. With states but no snapshots the prefix cache has to be off.
    """

    def __init__(
        self,
        pool: SlotPool,
        *,
        max_batch_size: int,
        max_tokens_per_step: int,
        max_seq_len: int,
        max_prefill_beside_decodes: int | None = None,
        windows: SequenceOf[int | None] = (None,),
        enable_prefix_caching: bool = True,
        num_speculative_tokens: int = 0,
        max_draws_per_step: int | None = None,
        num_state_snapshots: int = 0,
    ) -> None:
        self.pool = pool
        self.max_batch_size = max_batch_size
        self.max_tokens_per_step = max_tokens_per_step
        self.max_prefill_beside_decodes = max_prefill_beside_decodes or max_tokens_per_step
        self.max_seq_len = max_seq_len
        self.windows = tuple(windows)
        self.num_preemptions = 0
        self.num_state_snapshots = num_state_snapshots
        self._snapshots = StateSnapshots(num_state_snapshots, pool) if num_state_snapshots else None
        self._pages = PageManager(
            pool, windows=windows, max_tokens_per_step=max_tokens_per_step,
            enable_prefix_caching=enable_prefix_caching, snapshots=self._snapshots,
        )  # fmt: skip
        self._speculation = Speculation(
            self._pages, num_tokens=num_speculative_tokens, max_tokens_per_step=max_tokens_per_step,
            max_draws_per_step=max_draws_per_step or max_tokens_per_step,
        )  # fmt: skip
        self._waiting = WaitingQueue()
        self.preparing: set[Sequence] = set()
        """New sequences whose grammar is being compiled or whose adapter is being loaded; `add` or `finish` them."""
        self._running: list[Sequence] = []
        """In order of arrival."""
        self._free_rows = list(range(max_batch_size))
        """A heap: the lowest goes first, so that rows in use lie close together."""

    @property
    def has_pending_work(self) -> bool:
        """Whether any sequence is running or waiting."""
        return bool(self._running or self._waiting or self.preparing)

    @property
    def num_running(self) -> int:
        """Sequences that hold a row."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a row, including preempted ones."""
        return len(self._waiting) + len(self.preparing)

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens still to prefill, of waiting and running sequences."""
        prefilling = (sequence.num_uncomputed for sequence in self._running if sequence.num_uncomputed > 1)
        return sum(prefilling) + sum(sequence.num_uncomputed for sequence in self._waiting)

    @property
    def num_proposed_tokens(self) -> int:
        """Guesses that ran."""
        return self._speculation.num_proposed_tokens

    @property
    def num_accepted_tokens(self) -> int:
        """Guesses that were right."""
        return self._speculation.num_accepted_tokens

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence, which must leave room for a token. It ends no later than when it fills the pool.

        Raises:
            CapacityError: the pool could not hold its tokens and one more even if it ran alone. Nothing is queued.
        """
        max_tokens = self.most_tokens(min(sequence.max_tokens, self.max_seq_len))
        if self.pages_needed(len(sequence.tokens) + 1) > self.pool.num_pages:
            raise CapacityError(
                f"the sequence has {len(sequence.tokens)} tokens; the pool holds {max_tokens}, and one is generated"
            )
        assert len(sequence.tokens) < max_tokens, "a sequence that cannot grow would never end"
        self.preparing.discard(sequence)
        sequence.max_tokens = max_tokens
        self._waiting.add(sequence)

    def schedule(self) -> StepPlan:
        """Choose the next step and take the pages that it writes to.

        The plan is empty only if nothing is pending, or every pending sequence either waits for a plan in flight or has
        a long prompt that is still being looked up in the prefix cache; the next call continues that lookup.
        """
        may_guess = self._speculation.is_worthwhile(self._running)
        if may_guess and any(sequence.num_in_flight for sequence in self._running):
            return StepPlan(())
        num_preemptions = self.num_preemptions
        parts, prefilling = self._decodes()
        budget = self._prefill_budget(len(parts), len(prefilling))
        chunks = []
        for sequence in prefilling:
            num_tokens = self._chunk_len(sequence, budget)
            if num_tokens and sequence.status is SequenceStatus.RUNNING and self._reserve(sequence, num_tokens):
                chunks.append(self._chunk(sequence, num_tokens))
                budget -= num_tokens
        if self.num_preemptions == num_preemptions:
            chunks += self._admissions(budget, prefilling)
            if may_guess:
                parts, guessing = self._speculation.add_guesses(parts, chunks, len(self._running))
                chunks += guessing
        else:
            # An old sequence may have preempted a younger one that was to run. No sequence is admitted to the pages
            # that this freed: the running ones need them next.
            parts = [part for part in parts if part.sequence.status is SequenceStatus.RUNNING]
        parts += sorted(chunks, key=lambda part: part.num_tokens > 1)
        for part in parts:
            sequence = part.sequence
            sequence.num_computed += part.num_tokens
            if part.draws_token or part.completes_vector:
                sequence.num_in_flight += 1
            if part.num_scored:
                sequence.num_scored = part.first_scored + part.num_scored
        return StepPlan(tuple(parts))

    def apply(self, plan: StepPlan, token_ids: SequenceOf[int]) -> list[TokenEvent | VectorEvent]:
        """Process what a step computed. Called once for each plan that ran, in the order they were made.

        Results for a sequence that ended while the step ran are dropped: that is the price of planning ahead.

        Args:
            token_ids: the tokens that the parts of the plan drew, in order; negative if nothing could be drawn.
        """
        draw_index = -1
        events: list[TokenEvent | VectorEvent] = []
        finished = SequenceStatus.FINISHED
        for part in plan.parts:
            sequence = part.sequence
            if part.proposed:
                events += self._apply_guesses(part, token_ids, draw_index + 1)
                draw_index += part.num_draws
                continue
            if part.draws_token:
                draw_index += 1
            if sequence.status is finished:
                continue
            num_stored = part.start + part.num_tokens
            if num_stored >= sequence.keep_at and part.num_preemptions == sequence.num_preemptions:
                self._pages.keep(sequence, num_stored)
            if part.draws_token:
                token_id = token_ids[draw_index]
                sequence.num_in_flight -= 1
                tokens = sequence.tokens
                tokens.append(token_id)
                if token_id < 0:  # nothing could be drawn: the keys and values may be spoiled
                    self._pages.forget(sequence)
                reason = None
                if token_id in sequence.end_ids or len(tokens) >= sequence.max_tokens:
                    reason = sequence.finish_reason()
                events.append(TokenEvent(sequence, token_id, reason, draw_index))
                if reason is not None:
                    self.finish(sequence)
            elif part.completes_vector:
                events.append(VectorEvent(sequence, part.row))
                self.finish(sequence)
        return events

    def finish(self, sequence: Sequence) -> None:
        """End a sequence and give its pages back. Does nothing if it has already ended."""
        if sequence.status is SequenceStatus.FINISHED:
            return
        if sequence.status is SequenceStatus.RUNNING:
            self._release(sequence)
        else:
            (self.preparing if sequence in self.preparing else self._waiting).remove(sequence)
        sequence.status = SequenceStatus.FINISHED

    def pages_needed(self, num_tokens: int) -> int:
        """Most pages that a sequence of `num_tokens` must hold, see `PageManager.num_needed`."""
        return self._pages.num_needed(num_tokens)

    def most_tokens(self, max_tokens: int) -> int:
        """Length of the longest sequence that the pool holds, see `PageManager.most_tokens`."""
        return self._pages.most_tokens(max_tokens)

    def check(self) -> None:
        """Assert the invariants of the pool, the rows and the queues."""
        self.pool.check()
        if self._snapshots is not None:
            in_flight = sum(len(sequence.snapshots_in_flight) for sequence in self._running)
            self._snapshots.places.check()
            assert self._snapshots.places.num_used == in_flight, "a snapshot's place has leaked"
        rows = [sequence.row for sequence in self._running] + self._free_rows
        assert sorted(row for row in rows if row is not None) == list(range(self.max_batch_size)), "a row has leaked"
        is_empty = (sequence.row is None and not sequence.pages for sequence in self._waiting)
        assert all(is_empty), "a waiting sequence holds a row or pages"
        for queue in (self._running, list(self._waiting)):
            assert queue == sorted(queue, key=_arrival), "a sequence is out of its place"

    def _decodes(self) -> tuple[list[StepPart], list[Sequence]]:
        """Parts of the running sequences with one token to run, and the sequences with more. The hottest loop."""
        decodes: list[StepPart] = []
        prefilling = []
        page_size, running = self.pool.page_size, SequenceStatus.RUNNING
        for sequence in self._running.copy():
            start = sequence.num_computed
            num_in_flight = sequence.num_in_flight
            num_tokens = len(sequence.tokens) + num_in_flight
            if num_tokens - start > 1:
                prefilling.append(sequence)
                continue
            if num_in_flight and num_tokens >= sequence.max_tokens:  # the tokens in flight are its last
                continue
            if sequence.status is not running or (
                start >= len(sequence.pages[0]) * page_size and not self._reserve(sequence, 1)
            ):
                continue
            row = sequence.row
            if row is not None and sequence.pooling is None:  # `next_part` without the call
                decodes.append(StepPart(sequence, start, 1, True, row, sequence.num_preemptions))
            else:
                decodes.append(next_part(sequence, 1))
        return decodes, prefilling

    def _prefill_budget(self, num_decodes: int, num_prefilling: int) -> int:
        """Most tokens that the prefill chunks of a step may have in total.

        Newcomers are admitted gently, at the pace that each would have alone, so that running sequences hardly notice.
        A crowd, which few would notice, is admitted at once. The step is filled up to the size its products are padded
        to.
        """
        budget = self.max_tokens_per_step - num_decodes
        num_newcomers = num_prefilling + min(len(self._waiting), len(self._free_rows))
        if num_newcomers >= _CROWD * num_decodes:
            return budget
        share = self.max_prefill_beside_decodes
        num_tokens = max(min(num_decodes + num_newcomers * share, _MOST_TOKENS_BESIDE_DECODES), num_decodes + share)
        return min(budget, -(-num_tokens // _TOKEN_MULTIPLE) * _TOKEN_MULTIPLE - num_decodes)

    def _apply_guesses(self, part: StepPart, token_ids: SequenceOf[int], first: int) -> list[TokenEvent]:
        """`apply` for a part with guesses, whose draws begin at `first`."""
        sequence = part.sequence
        if sequence.status is SequenceStatus.FINISHED:
            return []
        events = self._speculation.accept(part, token_ids, first)
        self._pages.keep(sequence, len(sequence.tokens) - 1)
        if events[-1].finish_reason is not None:
            self.finish(sequence)
        return events

    def _admissions(self, budget: int, prefilling: SequenceOf[Sequence]) -> Iterator[StepPart]:
        """Parts of waiting sequences for which there is room, in the order in which the queue offers them.

        Args:
            budget: tokens left in the step.
            prefilling: running sequences that have not yet taken pages for all of their tokens.
        """
        if not (budget and self._free_rows and self._waiting):
            return
        self._pages.begin_step()
        # One page per running sequence is left for what it generates, or admission would lead to preemption at once.
        num_available = self.pool.num_available - len(self._running)
        num_available -= sum(self._pages.num_owed(sequence) for sequence in prefilling)
        for index, sequence in self._waiting.offers():
            # A preempted sequence is not recomputed before all of its tokens are known.
            num_pages = None if sequence.num_in_flight else self._admit(sequence, num_available)
            if num_pages is None:
                continue
            self._waiting.admit(index)
            num_available -= num_pages + 1
            num_tokens = self._chunk_len(sequence, budget)
            reserved = self._reserve(sequence, num_tokens)
            assert reserved, "an admitted sequence has its pages"
            yield self._chunk(sequence, num_tokens)
            budget -= num_tokens
            if not (budget and self._free_rows):
                return

    def _chunk_len(self, sequence: Sequence, budget: int) -> int:
        """Number of a running sequence's tokens that go into a step with room for `budget`."""
        num_tokens = min(sequence.num_uncomputed, budget)
        return num_tokens if self._snapshots is None else self._snapshots.cut(sequence, num_tokens)

    def _chunk(self, sequence: Sequence, num_tokens: int) -> StepPart:
        """The part that runs the sequence's next `num_tokens` tokens."""
        part = next_part(sequence, num_tokens)
        return part if self._snapshots is None else self._snapshots.attach(part)

    def _admit(self, sequence: Sequence, num_available: int) -> int | None:
        """Give a waiting sequence a row and its cached prefix; returns the pages it counts on, None if too few."""
        prefix = self._pages.find_prefix(sequence)
        num_pages = None if prefix is None else self._pages.admit(sequence, prefix, num_available)
        if prefix is None or num_pages is None:
            return None
        sequence.num_computed = sequence.num_pages * self.pool.page_size
        sequence.record_admission(min(sequence.num_computed, sequence.num_prompt_tokens))
        sequence.status = SequenceStatus.RUNNING
        sequence.row = heappop(self._free_rows)
        insort(self._running, sequence, key=_arrival)
        self._speculation.admit(sequence)
        return num_pages

    def _reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Take pages for the next tokens, preempting younger sequences; False if this step has none for it."""
        while not self._pages.extend(sequence, num_tokens):
            if self._pages.will_drop(sequence):
                # Preempting now, perhaps itself, would lead here again once it is recomputed, and so on forever.
                return False
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Return a running sequence to its place in the queue, to be recomputed."""
        self._release(sequence)
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        sequence.status = SequenceStatus.WAITING
        self._waiting.add(sequence)
        self.num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        """Give back a running sequence's row and pages."""
        assert sequence.row is not None, "a running sequence has a row"
        del self._running[bisect_left(self._running, sequence.arrival, key=_arrival)]
        heappush(self._free_rows, sequence.row)
        sequence.row = None
        self._pages.release(sequence)
