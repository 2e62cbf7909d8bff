"""`Sequence`: one request as the engine runs it, with its parts in steps and their results."""

import time
from dataclasses import dataclass
from enum import Enum, auto
from itertools import count

import msgspec

from llm.sampling.constraint import Constraint
from llm.scheduling.prefix_cache import PageHashes
from llm.scheduling.prompt_lookup import PromptLookup
from llm.schemas import FinishReason, GenerationRequest, Pooling

_arrivals = count()
_MAX_UNINDEXED = 128
"""Most tokens that a prompt lookup indexes at once; a longer prompt is indexed in portions before it guesses."""


class SequenceStatus(Enum):
    """The state of a sequence. Preemption leads from RUNNING back to WAITING."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Sequence:
    """Tokens of one request and the pages that hold their keys and values.

    Neither prefill nor decode is a state: a sequence always has `num_uncomputed` tokens to run through the model, one
    while it decodes, many while its prompt (or, after preemption, all of it) is computed. The step that computes the
    last of them draws a token; or, if the request wants a vector, that step completes it and the sequence ends.

    A step is scheduled before the tokens of the steps ahead of it are known, so a sequence may be longer than the host
    can tell: the tokens in flight come after `tokens`.

    The scheduler and its parts are the only writers (`PageManager`, `Speculation`); others read.

    Attributes:
        arrival: grows with every sequence; the earliest goes first and is preempted last.
        tokens: prompt and output so far, as far as the host has seen them.
        max_tokens: tokens at which the sequence ends, prompt and output together.
        num_in_flight: scheduled draws whose token the host has not seen; 1 while a step completes its vector.
        num_computed: leading tokens whose keys and values are in `pages`, or will be by a step already scheduled.
        num_scored: leading prompt tokens, except the last, whose next token has been given its log probability, or will
            be by a step already scheduled; used if the request wants those.
        num_preemptions: times it lost its pages; a step planned before the last one says nothing about `pages`.
        row: its place among the running sequences, None while it does not run.
        pages: for each group of layers its page ids in order of position, equally many in each group; a page that fell
            out of the group's window is replaced by the scratch page. Empty while it does not run.
        num_dropped_pages: for each group the number of leading pages that fell out of its window.
        num_registered_pages: for each group the number of leading pages whose content is registered in the pool.
        num_shared_pages: leading pages that the prefix cache had at the last lookup, whether or not there was a
            snapshot of the states after them; used if a model's layers have states.
        snapshot_ends: numbers of computed tokens after which a snapshot of its states is to be taken, in order.
        snapshots_in_flight: for each one that a step in flight takes, the number of tokens before it and its place.
        last_snapshot: number of tokens after which the last snapshot was taken or found.
        restored_snapshot: place of the snapshot from which its next part begins, None for none.
        keep_at: number of stored tokens from which `PageManager.keep` has something to do.
        lookup: guesses its next tokens; None if there are no guesses.
        is_speculating: whether a step in flight runs such guesses; until its draws are known, how many of the tokens
            counted in `num_in_flight` and `num_computed` are really the sequence's own is unknown.
        constraint: what its output must look like; None for anything.
        adapter_slot: place of its adapter on the device, written by the engine before the sequence is queued; None for
            the model itself.
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
        """Which hidden states make its vector; None if it generates tokens."""
        # A vector takes the place of one token, the last; so does the token drawn when none was requested.
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
        self.adapter_slot: int | None = None
        self.num_cached_tokens: int | None = None
        self.queue_s = 0.0
        self._created_at = time.monotonic()
        self.hashes = PageHashes(page_size, request.page_salt)
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
        """Number of tokens in prompt and output so far, including those in flight."""
        return len(self.tokens) + self.num_in_flight

    @property
    def num_pages(self) -> int:
        """Number of pages in each group."""
        return len(self.pages[0]) if self.pages else 0

    @property
    def num_uncomputed(self) -> int:
        """Tokens still to be scheduled before the next one can be drawn."""
        return len(self.tokens) + self.num_in_flight - self.num_computed

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far as the host has seen them, including those of an earlier engine."""
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """Token ids of the prompt."""
        return tuple(self.tokens[: self.num_prompt_tokens])

    @property
    def output_ids(self) -> list[int]:
        """Token ids generated so far."""
        return self.tokens[self.num_prompt_tokens :]

    def record_admission(self, num_cached_tokens: int) -> None:
        """Record, when it first gets a row, how long it has waited and how many tokens the prefix cache had for it."""
        if self.num_cached_tokens is None:
            self.num_cached_tokens = num_cached_tokens
            self.queue_s = time.monotonic() - self._created_at

    @property
    def needs_whole_prompt(self) -> bool:
        """Whether every token of the prompt must run, regardless of what the prefix cache holds."""
        return self.pooling is Pooling.MEAN or self.request.prompt_logprobs is not None

    @property
    def may_guess(self) -> bool:
        """Whether a token may be drawn before those before it are certain."""
        return not self.uses_penalties and self.constraint is None and self.pooling is None

    @property
    def is_indexed(self) -> bool:
        """Whether its lookup, which must exist, has indexed enough tokens to take in the rest at once."""
        return self.lookup is not None and self.lookup.num_unindexed <= _MAX_UNINDEXED

    def guesses(self) -> tuple[int, ...]:
        """Guess its next tokens. None before it decodes, and none for its first token here, which comes alone."""
        has_begun = self.num_output_tokens > len(self.request.output_token_ids)
        if self.lookup is None or not has_begun or self.num_uncomputed > 1 or not self.is_indexed:
            return ()
        return self.lookup.propose()

    def may_end_at(self, position: int) -> bool:
        """Whether a stop id at `position`, counted from the prompt's first token, may end the sequence."""
        return position - self.num_prompt_tokens >= self.request.min_new_tokens

    def finish_reason(self) -> FinishReason | None:
        """Whether the last token of `tokens` ends the sequence, and why."""
        num_tokens = len(self.tokens)
        if self.tokens[-1] in self.end_ids and self.may_end_at(num_tokens - 1):
            return FinishReason.STOP
        return FinishReason.LENGTH if num_tokens >= self.max_tokens else None


class StepPart(msgspec.Struct, frozen=True, gc=False):
    """A sequence's part in a step: tokens `start` to `start + num_tokens - 1` run through the model.

    A part that is launched with `start >= len(sequence.tokens)` runs one token: the one drawn last at its row, which
    the host has not seen.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    draws_token: bool
    """Whether the step reaches the sequence's last token and so draws the next. Never if it is pooled."""
    row: int
    """Row of the sequence while it runs: below the batch size, and no other sequence's."""
    num_preemptions: int
    """The sequence's `num_preemptions` when this was planned."""
    proposed: tuple[int, ...] = ()
    """Guesses, the last of the tokens that run. If there are any, the part draws after the one token before them and
    after each of them; no other step with the sequence is in flight."""
    first_scored: int = 0
    num_scored: int = 0
    """How many of the prompt tokens that run, starting at `first_scored`, score the prompt's next token."""
    num_pooled: int = 0
    """How many of the last tokens that run have hidden states that belong to the sequence's vector."""
    completes_vector: bool = False
    """Whether the step reaches the last token of a sequence that is pooled."""
    restored: int | None = None
    """Place of the snapshot to copy into the row's states before the tokens run."""
    saved: int | None = None
    """Place of the snapshot to which the row's states are copied after the tokens have run."""

    @property
    def end(self) -> int:
        """Tokens in the sequence's context once the step has run; the position of the (last) token it draws."""
        return self.start + self.num_tokens

    @property
    def num_draws(self) -> int:
        """Number of tokens drawn, one after each of the last tokens that run."""
        return 1 + len(self.proposed) if self.draws_token else 0

    @property
    def begins_vector(self) -> bool:
        """Whether its pooled tokens are the first of the vector, which begins again if the sequence is recomputed."""
        return self.start == 0 or self.sequence.pooling is not Pooling.MEAN

    @property
    def token_ids(self) -> list[int]:
        """The tokens that run, as far as the host knows them."""
        return [*self.sequence.tokens[self.start : self.end], *self.proposed]

    @property
    def scored_ids(self) -> list[int]:
        """The tokens after those that are scored."""
        return self.sequence.tokens[self.first_scored + 1 : self.first_scored + 1 + self.num_scored]

    def with_guesses(self, proposed: tuple[int, ...]) -> "StepPart":
        """This part, which has one token, with guesses after it."""
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
    """Row at which the step ran it."""


class TokenEvent(msgspec.Struct, frozen=True, gc=False):
    """A token that a step drew for a sequence that still wanted it, and whether it ended the sequence."""

    sequence: Sequence
    token_id: int
    finish_reason: FinishReason | None
    draw_index: int
    """Which of the step's draws it was."""


def next_part(sequence: Sequence, num_tokens: int) -> StepPart:
    """Make a running sequence's next tokens a part of a step."""
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
