"""`Speculation`: decides which decodes run guesses of their next tokens, and processes the results."""

from collections import deque
from collections.abc import Collection, Sequence as SequenceOf

from llm.scheduling.page_manager import PageManager
from llm.scheduling.prompt_lookup import PromptLookup
from llm.scheduling.sequence import Sequence, SequenceStatus, StepPart, TokenEvent

_MAX_RUNNING_PER_GUESSER = 8
"""Most running sequences per sequence that can guess, for its guesses to be worth a slower step for all."""
_INDEXED_PER_STEP = 1024
"""Most prompt tokens that one step indexes: well under a millisecond's work."""


class Speculation:
    """Lets decodes check guesses by `PromptLookup`, as in Leviathan et al. 2022 (arXiv:2211.17192), but by equality.

    A draw is a function of logits, seed and position, so a guess is right if it equals the token drawn, and the output
    is that of plain decoding, greedy or sampled, up to the rounding of the kernels. Guesses get the budget and pages
    that are left, and preempt no sequence. They make a step more expensive, and the last token must be known, so they
    run only when enough sequences can guess.

    It is part of the scheduler, which calls it. It writes sequences' tokens and the fields that concern guesses.

    Args:
        pages: the scheduler's page manager.
        num_tokens: most guesses per sequence and step; 0 for none.
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
        """Sequences whose long prompts are still to be indexed; some may have ended."""

    def admit(self, sequence: Sequence) -> None:
        """Prepare the guesses of a sequence that begins to run."""
        if self._num_tokens and sequence.may_guess:
            if sequence.lookup is None:
                sequence.lookup = PromptLookup(sequence.tokens, self._num_tokens)
            if not sequence.is_indexed:
                self._unindexed.append(sequence)

    def is_worthwhile(self, running: Collection[Sequence]) -> bool:
        """Whether enough running sequences can guess, or guesses are already being checked."""
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
        """Add guesses to decodes if there is room beside `chunks`; returns the parts without guesses and those with.

        One page is left for each of the `num_running` sequences, for tokens that are more certain.
        """
        without, guessing = [], []
        num_tokens = self._max_tokens_per_step - sum(part.num_tokens for part in chunks)
        num_left = min(num_tokens, self._max_draws_per_step - sum(part.num_draws for part in chunks)) - len(decodes)
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
        """Give a sequence the tokens drawn by its part with guesses: right guesses, and the draw after the last one.

        Args:
            part: has guesses; its sequence has not ended.
            token_ids: draws of the step.
            first: index of the part's first draw in `token_ids`.

        Returns:
            At least one event; the last says whether the sequence ends, possibly before all right guesses are taken.
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
        # Keys and values of wrong guesses are overwritten before any token attends to them.
        sequence.num_computed = len(sequence.tokens) - 1
        self.num_accepted_tokens += len(events) - 1
        return events

    def _index_prompts(self) -> None:
        """Index long prompts in portions, taking turns, so that a short one does not wait for a long one."""
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
        """How many guesses of a decode can run; takes pages for them if the pool can spare some."""
        num_guesses = min(num_guesses, sequence.max_tokens - len(sequence.tokens) - 1)
        self._pages.extend(sequence, 1 + num_guesses, num_spared=num_running)
        return min(num_guesses, self._pages.room(sequence) - 1)
