"""`Sequence`: one request as the engine runs it; its parts in steps, and what came of them."""

import time
from dataclasses import dataclass
from enum import Enum, auto
from itertools import count

import msgspec

from llm.sampling.constraint import Constraint
from llm.scheduling.prefix_cache import PageHashes
from llm.scheduling.prompt_lookup import PromptLookup
from llm.serving.schemas import FinishReason, GenerationRequest, Pooling

_arrivals = count()
_MAX_UNINDEXED = 128
"""Tokens that a prompt lookup takes in at once; before it guesses, a longer prompt is indexed bit by bit."""


class SequenceStatus(Enum):
    """Where a sequence stands. Preemption leads from RUNNING back to WAITING."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Sequence:
    """Tokens of one request and the pages that hold their keys and values.

    Neither prefill nor decode is a state: a sequence always has `num_uncomputed` tokens to run through the model, one
    while it decodes, many while its prompt (or, after preemption, all of it) is computed. A token is drawn in the step
    that computes the last of them; or, if the request wants a vector, that step completes it and the sequence ends.

    A step is scheduled before the tokens of the steps ahead of it are known, so a sequence may be longer than the host
    can tell: the tokens in flight stand behind `tokens`.

    The scheduler and its parts are the only writers (`PageManager`, `Speculation`); others read.

    Attributes:
        arrival: grows with every sequence; who came first goes first, and is preempted last.
        tokens: prompt and output so far, as far as the host has seen them.
        max_tokens: tokens at which the sequence ends, prompt and output together.
        num_in_flight: draws scheduled whose token the host has not seen; 1 while a step completes its vector.
        num_computed: leading tokens whose keys and values are in `pages`, or will be by a step already scheduled.
        num_scored: leading prompt tokens, the last one excepted, behind which what comes next has been given its log
            probability, or will be by a step already scheduled; where the request wants those.
        num_preemptions: times it lost its pages; a step planned before the last one says nothing about `pages`.
        row: its place among the sequences that run, None while it does not.
        pages: for each group of layers its page ids in order of position, as many as the others'; one that fell behind
            the group's window is replaced by the scratch page. Empty while it does not run.
        num_dropped_pages: for each group the leading pages that fell behind its window.
        num_registered_pages: leading pages whose content is registered in the pool, of each group.
        num_shared_pages: leading pages that the prefix cache had when it was asked last, whether or not there was a
            snapshot of the states behind them; where a model's layers have states.
        snapshot_ends: computed tokens behind which a snapshot of its states is to be taken, in order.
        snapshots_in_flight: of each that a step in flight takes, the tokens before it and its place.
        last_snapshot: tokens behind which the last one was taken or found.
        restored_snapshot: place of the one that its next part begins from, None for none.
        keep_at: stored tokens with which there is something to do for `PageManager.keep`.
        lookup: guesses its next tokens, None where nobody does.
        is_speculating: whether a step in flight runs such guesses; until its draws are known nobody knows how many of
            the tokens that `num_in_flight` and `num_computed` count in are the sequence's own.
        constraint: what its output must look like; None for anything.
        num_cached_tokens: prompt tokens found in the prefix cache when the sequence was first admitted, None before.
        queue_s: seconds that it waited until then.
    """

    def __init__(
        self, request: GenerationRequest, prompt_ids: tuple[int, ...], eos_ids: frozenset[int], page_size: int
    ) -> None:
        self.arrival = next(_arrivals)
        self.request = request
        self.num_prompt_tokens = len(prompt_ids)
        self.tokens = [*prompt_ids, *request.output_token_ids]
        self.pooling = request.pooling
        """Which hidden states make its vector; None where it generates tokens."""
        # A vector takes the place of one token, after which nothing comes; so does the token that nobody asked for.
        self.max_tokens = len(prompt_ids) + (max(request.max_new_tokens, 1) if request.pooling is None else 1)
        self.status = SequenceStatus.WAITING
        self.num_in_flight = 0
        self.num_computed = 0
        self.num_scored = 0
        self.num_preemptions = 0
        self.row: int | None = None
        self.pages: list[list[int]] = []
        self.num_dropped_pages: list[int] = []
        self.num_registered_pages = 0
        self.num_shared_pages = 0
        self.snapshot_ends: tuple[int, ...] = ()
        self.snapshots_in_flight: list[tuple[int, int]] = []
        self.last_snapshot = 0
        self.restored_snapshot: int | None = None
        self.keep_at = 0
        self.lookup: PromptLookup | None = None
        self.is_speculating = False
        self.constraint: Constraint | None = None
        self.num_cached_tokens: int | None = None
        self.queue_s = 0.0
        self._created_at = time.monotonic()
        self.hashes = PageHashes(page_size, request.cache_salt.encode())
        self.end_ids = frozenset(request.stop_token_ids) | (frozenset() if request.ignore_eos else eos_ids)
        """Ids that end this sequence."""
        self.uses_penalties = request.uses_penalties
        """Whether its draws depend on which tokens came before."""
        self.draws_plainly = request.draws_plainly
        """Whether none of its draws needs more than temperature, cuts and noise."""

    @property
    def request_id(self) -> str:
        """Id of the request."""
        return self.request.request_id

    @property
    def num_tokens(self) -> int:
        """Prompt and output so far, tokens in flight included."""
        return len(self.tokens) + self.num_in_flight

    @property
    def num_pages(self) -> int:
        """Pages of each group."""
        return len(self.pages[0]) if self.pages else 0

    @property
    def num_uncomputed(self) -> int:
        """Tokens still to be scheduled before the next one can be drawn."""
        return len(self.tokens) + self.num_in_flight - self.num_computed

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far as the host has seen them, those of an earlier engine included."""
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """Token ids of the prompt."""
        return tuple(self.tokens[: self.num_prompt_tokens])

    @property
    def output_ids(self) -> list[int]:
        """Token ids generated so far."""
        return self.tokens[self.num_prompt_tokens :]

    def note_admission(self, num_cached_tokens: int) -> None:
        """It has a row; the first time, what the prefix cache had for it counts."""
        if self.num_cached_tokens is None:
            self.num_cached_tokens = num_cached_tokens
            self.queue_s = time.monotonic() - self._created_at

    @property
    def needs_whole_prompt(self) -> bool:
        """Whether every token of the prompt must run, whatever the prefix cache holds."""
        return self.pooling is Pooling.MEAN or self.request.prompt_logprobs is not None

    @property
    def may_guess(self) -> bool:
        """Whether a token may be drawn before those before it are certain."""
        return not self.uses_penalties and self.constraint is None and self.pooling is None

    @property
    def is_indexed(self) -> bool:
        """Whether its lookup, which it has, knows enough of its tokens to take in the rest at once."""
        return self.lookup is not None and self.lookup.num_unindexed <= _MAX_UNINDEXED

    def guesses(self) -> tuple[int, ...]:
        """What its next tokens may be. Nothing before it decodes, nor for its first token here, which comes alone."""
        has_begun = self.num_output_tokens > len(self.request.output_token_ids)
        if self.lookup is None or not has_begun or self.num_uncomputed > 1 or not self.is_indexed:
            return ()
        return self.lookup.propose()

    def may_end_at(self, position: int) -> bool:
        """Whether the token at `position`, counted from the prompt's first, may end the sequence by a stop id."""
        return position - self.num_prompt_tokens >= self.request.min_new_tokens

    def finish_reason(self) -> FinishReason | None:
        """Whether the last token of `tokens` ends the sequence, and why."""
        num_tokens = len(self.tokens)
        if self.tokens[-1] in self.end_ids and self.may_end_at(num_tokens - 1):
            return FinishReason.STOP
        return FinishReason.LENGTH if num_tokens >= self.max_tokens else None


class StepPart(msgspec.Struct, frozen=True, gc=False):
    """A sequence's part in a step: tokens `start` to `start + num_tokens - 1` run through the model.

    A part with `start >= len(sequence.tokens)` when it is launched runs the one token that was drawn last at its row
    and that the host has not seen.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    draws: bool
    """Whether the step reaches the sequence's last token, and so draws the next. Never where it is pooled."""
    row: int
    """Of the sequence while it runs: below the batch size, and nobody else's."""
    num_preemptions: int
    """Of the sequence when this was planned."""
    proposed: tuple[int, ...] = ()
    """Guesses, the last of the tokens that run. With any, the part draws, behind the one token before them and behind
    each of them; no other step with the sequence is in flight."""
    first_scored: int = 0
    num_scored: int = 0
    """How many of the prompt tokens that run, from `first_scored` on, say how likely the prompt's next token was."""
    num_pooled: int = 0
    """How many of the last tokens that run have hidden states that belong to the sequence's vector."""
    completes_vector: bool = False
    """Whether the step reaches the last token of a sequence that is pooled."""
    restored: int | None = None
    """Place of the snapshot that the row's states are to be copied from before the tokens run."""
    saved: int | None = None
    """Place of the snapshot that the row's states are to be copied to once they have."""

    @property
    def end(self) -> int:
        """Tokens in the sequence's context once the step has run; the position of the (last) token it draws."""
        return self.start + self.num_tokens

    @property
    def num_draws(self) -> int:
        """Tokens that are drawn, one behind each of the last so many that run."""
        return 1 + len(self.proposed) if self.draws else 0

    @property
    def begins_vector(self) -> bool:
        """Whether its pooled tokens are the first of the vector; a recomputed sequence's vector begins anew."""
        return self.start == 0 or self.sequence.pooling is Pooling.LAST

    @property
    def token_ids(self) -> list[int]:
        """What runs, as far as the host knows it."""
        return [*self.sequence.tokens[self.start : self.end], *self.proposed]

    @property
    def scored_ids(self) -> list[int]:
        """The tokens behind those that are scored."""
        return self.sequence.tokens[self.first_scored + 1 : self.first_scored + 1 + self.num_scored]

    def with_guesses(self, proposed: tuple[int, ...]) -> "StepPart":
        """This part, of one token, with guesses behind it."""
        return msgspec.structs.replace(self, num_tokens=1 + len(proposed), proposed=proposed)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step of the model. Parts with a single token come first."""

    parts: tuple[StepPart, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that run through the model."""
        return sum(part.num_tokens for part in self.parts)


class VectorEvent(msgspec.Struct, frozen=True, gc=False):
    """A step has completed the vector of a sequence that still wanted it."""

    sequence: Sequence
    row: int
    """At which the step ran it."""


class TokenEvent(msgspec.Struct, frozen=True, gc=False):
    """A token that a step drew for a sequence that still wanted it, and whether it ended the sequence."""

    sequence: Sequence
    token_id: int
    finish_reason: FinishReason | None
    draw_index: int
    """Which of the step's draws it was."""


def next_part(sequence: Sequence, num_tokens: int) -> StepPart:
    """A running sequence's next tokens as a part of a step."""
    assert sequence.row is not None, "a running sequence has a row"
    start = sequence.num_computed
    is_last = start + num_tokens == len(sequence.tokens) + sequence.num_in_flight
    if sequence.request.prompt_logprobs is not None:
        first = max(start, sequence.num_scored)
        num_scored = max(min(start + num_tokens, sequence.num_prompt_tokens - 1) - first, 0)
        return StepPart(
            sequence, start, num_tokens, is_last, sequence.row, sequence.num_preemptions, (), first, num_scored
        )
    if sequence.pooling is None:
        return StepPart(sequence, start, num_tokens, is_last, sequence.row, sequence.num_preemptions)
    return StepPart(
        sequence, start, num_tokens, False, sequence.row, sequence.num_preemptions,
        num_pooled=num_tokens if sequence.pooling is Pooling.MEAN else int(is_last), completes_vector=is_last,
    )  # fmt: skip
