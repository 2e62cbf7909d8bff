"""`WaitingQueue`: sequences that wait for a row and pages, and which may pass one that finds no room."""

from bisect import insort
from collections import deque
from collections.abc import Iterator
from operator import attrgetter

from llm.scheduling.sequence import Sequence, SequenceStatus

_PASSING_SHARE = 1.0
"""Tokens that may pass a sequence, for each token of its own."""
_MAX_INSPECTED = 1024
"""Most sequences that a step inspects while the first of the queue finds no room."""
_MAX_OFFERED = 32
"""Most sequences after the first that a step offers; each costs a lookup in the prefix cache."""


class WaitingQueue:
    """Holds waiting sequences in order of arrival, including preempted ones.

    Normally the first goes first. While it finds no room, smaller sequences after it may pass it, in order of arrival,
    as long as those that have passed it hold, or held when they ended, no more tokens in total than it has itself.
    After that no sequence is admitted before it, so the pages that running sequences give back accumulate until it
    fits. Its wait is bounded: by the end of what was running, and of others with about as many tokens as its own. An
    account is kept for each sequence that has been passed, and it counts while that sequence is the first of the queue.

    The scheduler is the only writer.
    """

    def __init__(self) -> None:
        self._sequences: deque[Sequence] = deque()
        self._passed_by: dict[Sequence, _Passers] = {}
        """Accounts of the sequences that others have passed."""

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence in its place by arrival."""
        if not self._sequences or self._sequences[-1].arrival < sequence.arrival:
            self._sequences.append(sequence)
        else:
            insort(self._sequences, sequence, key=attrgetter("arrival"))

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence that has been aborted."""
        self._sequences.remove(sequence)
        self._passed_by.pop(sequence, None)

    def offers(self) -> Iterator[tuple[int, Sequence]]:
        """Sequences that may be admitted in this step, each with its place in the queue, in order of arrival.

        Before it asks for the next one, the caller passes the place to `admit` if there is room for the sequence.
        """
        index = num_offered = 0
        num_tokens_left: float | None = None
        while index < min(len(self._sequences), _MAX_INSPECTED) and num_offered < _MAX_OFFERED:
            sequence = self._sequences[index]
            if index:
                if num_tokens_left is None:
                    num_tokens_left = self._num_tokens_that_may_pass()
                if num_tokens_left <= 0:
                    return
                if sequence.num_tokens > num_tokens_left:
                    index += 1
                    continue
                num_offered += 1
            yield index, sequence
            if index < len(self._sequences) and self._sequences[index] is sequence:
                index += 1
            elif num_tokens_left is not None:
                num_tokens_left -= sequence.num_tokens

    def admit(self, index: int) -> None:
        """Remove the sequence at this place, for which there is room."""
        sequence = self._sequences[index]
        del self._sequences[index]
        self._passed_by.pop(sequence, None)
        if index:
            self._passed_by.setdefault(self._sequences[0], _Passers()).add(sequence)

    def _num_tokens_that_may_pass(self) -> float:
        """Number of tokens that sequences passing the first may still have."""
        first = self._sequences[0]
        # A sequence that was preempted a moment ago may have room as soon as all its tokens are known.
        if first.num_in_flight:
            return 0
        passers = self._passed_by.get(first)
        return _PASSING_SHARE * first.num_tokens - (passers.count_tokens() if passers is not None else 0)


class _Passers:
    """The sequences that have passed one that waits."""

    def __init__(self) -> None:
        self._active: list[Sequence] = []
        self._num_tokens_of_ended = 0

    def add(self, sequence: Sequence) -> None:
        """Count a sequence, again if it has been preempted since it passed."""
        self._active.append(sequence)

    def count_tokens(self) -> int:
        """Number of tokens that they hold now, or held when they ended."""
        ended = [sequence for sequence in self._active if sequence.status is SequenceStatus.FINISHED]
        if ended:
            self._num_tokens_of_ended += sum(len(sequence.tokens) for sequence in ended)
            self._active = [sequence for sequence in self._active if sequence.status is not SequenceStatus.FINISHED]
        return self._num_tokens_of_ended + sum(len(sequence.tokens) for sequence in self._active)
