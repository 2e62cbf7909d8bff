"""`Speculation`: which decodes run guesses of their next tokens, and what becomes of the guesses."""

from collections import deque
from collections.abc import Collection, Sequence as SequenceOf

from llm.scheduling.page_manager import PageManager
from llm.scheduling.prompt_lookup import PromptLookup
from llm.scheduling.sequence import Sequence, SequenceStatus, StepPart, TokenEvent

_MAX_RUNNING_PER_GUESSER = 8
"""Running sequences for each that can guess its next tokens, up to which its guesses are worth a slower step to all."""
_INDEXED_PER_STEP = 1024
"""Prompt tokens that one step indexes at most: well under a millisecond's work."""


class Speculation:
    """Lets decodes check guesses by `PromptLookup`, as in Leviathan et al. 2022 (arXiv:2211.17192), but by equality.

    A draw is a function of logits, seed and position, so a guess is right if it is what is drawn, and the output is
    that of plain decoding, greedy or sampled, up to the rounding of the kernels. Guesses get what budget and pages are
    left, and preempt nobody. They make a step dearer, and the last token must be known, so they run only where enough
    sequences can guess.

    Part of the scheduler, which calls it: it writes the fields of sequences that concern guesses, and their tokens.

    Args:
        pages: of the scheduler.
        num_tokens: most guesses a sequence and step; 0 for none.
        max_tokens_per_step: token budget of a step.
        max_draws_per_step: number of draws that the runner has room for.

    Attributes:
        num_proposed_tokens: guesses that ran.
        num_accepted_tokens: guesses that were right.
    """

    def __init__(
        self, pages: PageManager, *, num_tokens: int, max_tokens_per_step: int, max_draws_per_step: int
    ) -> None:
        self.num_proposed_tokens = self.num_accepted_tokens = 0
        self._pages = pages
        self._num_tokens = num_tokens
        self._max_tokens_per_step = max_tokens_per_step
        self._max_draws_per_step = max_draws_per_step
        self._unindexed: deque[Sequence] = deque()
        """Sequences with long prompts that are still to be indexed; some may have ended."""

    def admit(self, sequence: Sequence) -> None:
        """Prepare for the guesses of a sequence that begins to run."""
        if self._num_tokens and sequence.may_guess:
            if sequence.lookup is None:
                sequence.lookup = PromptLookup(sequence.tokens, self._num_tokens)
            if not sequence.is_indexed:
                self._unindexed.append(sequence)

    def is_worthwhile(self, running: Collection[Sequence]) -> bool:
        """Whether enough running sequences know what may come next, or guesses are being checked already."""
        if not self._num_tokens:
            return False
        self._index_prompts()
        if any(sequence.is_speculating for sequence in running):
            return True
        num_able = sum(bool(sequence.guesses()) for sequence in running)
        return 0 < len(running) <= num_able * _MAX_RUNNING_PER_GUESSER

    def add_guesses(
        self, decodes: list[StepPart], chunks: SequenceOf[StepPart], num_running: int
    ) -> tuple[list[StepPart], list[StepPart]]:
        """Let decodes run guesses too, as far as there is room beside `chunks`; returns those without and those with.

        A page is left to each of the `num_running` sequences, for tokens that are more certain.
        """
        without, guessing = [], []
        num_tokens = self._max_tokens_per_step - sum(part.num_tokens for part in chunks)
        num_left = min(num_tokens, self._max_draws_per_step - sum(part.draws for part in chunks)) - len(decodes)
        for part in decodes:
            sequence = part.sequence
            proposed = sequence.guesses()[:num_left]
            proposed = proposed[: self._room_for_guesses(sequence, len(proposed), num_running)]
            if proposed:
                guessing.append(part.with_guesses(proposed))
                sequence.num_in_flight += len(proposed)
                sequence.is_speculating = True
                num_left -= len(proposed)
            else:
                without.append(part)
        self.num_proposed_tokens += sum(len(part.proposed) for part in guessing)
        return without, guessing

    def accept(self, part: StepPart, token_ids: SequenceOf[int], first: int) -> list[TokenEvent]:
        """Give a sequence the tokens that its part with guesses drew: right guesses, and the draw behind the last.

        Args:
            part: with guesses, of a sequence that has not ended.
            token_ids: draws of the step.
            first: which of these is the part's first.

        Returns:
            At least one event; the last says whether the sequence ends, which may be before all right guesses are in.
        """
        sequence = part.sequence
        sequence.is_speculating = False
        sequence.num_in_flight -= part.num_draws
        events = []
        for index, guess in enumerate((*part.proposed, None), first):
            token_id = token_ids[index]
            sequence.tokens.append(token_id)
            reason = sequence.finish_reason()
            events.append(TokenEvent(sequence, token_id, reason, index))
            if token_id != guess or reason is not None:
                break
        # Keys and values of wrong guesses are written over before anything attends to them.
        sequence.num_computed = len(sequence.tokens) - 1
        self.num_accepted_tokens += len(events) - 1
        return events

    def _index_prompts(self) -> None:
        """Index a part of the prompts that are long, in turns, so that a short one does not wait for a long one."""
        num_left = _INDEXED_PER_STEP
        for _ in range(len(self._unindexed)):
            sequence = self._unindexed.popleft()
            if sequence.status is SequenceStatus.FINISHED or sequence.lookup is None:
                continue
            num_left -= sequence.lookup.index(num_left)
            if not sequence.is_indexed:
                self._unindexed.append(sequence)
            if not num_left:
                break

    def _room_for_guesses(self, sequence: Sequence, num_guesses: int, num_running: int) -> int:
        """How many guesses of a decode can run; takes pages for them where the pool can spare some."""
        num_guesses = min(num_guesses, sequence.max_tokens - len(sequence.tokens) - 1)
        self._pages.extend(sequence, 1 + num_guesses, num_spared=num_running)
        return min(num_guesses, self._pages.room(sequence) - 1)
