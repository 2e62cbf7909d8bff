"""`PromptLookup`: guesses a sequence's next tokens from those it already holds."""

from itertools import cycle, islice

_MIN_MATCH, _MAX_MATCH = 4, 8
"""Tokens that must agree before what followed them is proposed: the fewest, and the most that is required.

With 2 or 3, chance matches failed so often in this repository's files and in the demo model's answers that real
repetition was found late; 5 found less of it."""
_MAX_CANDIDATES = 8
"""Most earlier places to compare, latest first."""
_FIRST_LIMIT = 4
"""Tokens of the first proposal."""
_MAX_FAILURES = 10
_PATIENCE = _MAX_MATCH - _MIN_MATCH
"""Failures in a row before pauses begin; the longest pause is `2 ** (_MAX_FAILURES - _PATIENCE)` tokens."""
_KEY_BITS = 32
"""Number of bits one token takes in a key; no token id needs more."""
_KEY_MASK = (1 << _KEY_BITS * _MIN_MATCH) - 1


class PromptLookup:
    """Prompt-lookup decoding (Saxena 2023): proposes what followed the last occurrence of the sequence's last tokens.

    Among the latest places where the last few tokens occurred before, it chooses the one preceded by the most matching
    tokens, and the later one if there is a tie. If a proposal reaches the sequence's end, it continues over its own
    tokens, as a copy does in LZ77 (Ziv and Lempel 1977), so a pattern continues whatever its period.

    Proposals are judged by the tokens that were drawn, whether or not the guesses ran. If all are right, the next may
    be twice as long, up to `max_tokens`. If all are wrong, it is half as long, and one more token must agree; once that
    reaches its limit, nothing is proposed for a while, which doubles each time. So text without repetition costs only
    an occasional attempt, and repetition is soon noticed.

    Args:
        tokens: the sequence's tokens; the list's owner appends to it and never changes it otherwise.
        max_tokens: most tokens of one proposal.
    """

    def __init__(self, tokens: list[int], max_tokens: int) -> None:
        self._tokens = tokens
        self._max_tokens = max_tokens
        self._limit = min(_FIRST_LIMIT, max_tokens)
        self._num_failures = 0
        self._resume_at = 0
        """Length of the sequence up to which nothing is proposed."""
        self._last_place: dict[int, int] = {}
        """Last position at which each run of `_MIN_MATCH` tokens ends."""
        self._earlier_places: list[int] = []
        """By position: the previous end of the run that ends there, 0 for none."""
        self._key = 0
        """Key of the last run that was indexed."""
        self._proposal: tuple[int, ...] = ()
        self._num_seen = 0
        """Length of the sequence when `_proposal` was made."""

    @property
    def num_unindexed(self) -> int:
        """Number of the sequence's tokens that the index does not hold yet."""
        return len(self._tokens) - len(self._earlier_places)

    def index(self, max_tokens: int) -> int:
        """Index up to `max_tokens` of the unindexed tokens, earliest first; return how many were indexed.

        `propose` indexes all that remain, so a caller that cannot wait for a long prompt indexes it in portions first.
        """
        tokens, earlier, last, key = self._tokens, self._earlier_places, self._last_place, self._key
        first, end = len(earlier), min(len(tokens), len(earlier) + max_tokens)
        for position in range(first, end):
            key = (key << _KEY_BITS | tokens[position]) & _KEY_MASK
            if position < _MIN_MATCH - 1:
                earlier.append(0)
            else:
                earlier.append(last.get(key, 0))
                last[key] = position
        self._key = key
        return end - first

    def propose(self) -> tuple[int, ...]:
        """Propose the tokens that probably come next; none if there is no match. The same until the list grows."""
        num_tokens = len(self._tokens)
        if num_tokens == self._num_seen:
            return self._proposal
        if self._proposal:
            self._mark(self._proposal, self._tokens[self._num_seen : num_tokens])
        self._num_seen = num_tokens
        self._proposal = ()
        if num_tokens >= max(self._resume_at, _MIN_MATCH):
            self.index(self.num_unindexed)
            place = self._best_place()
            if place:
                self._proposal = self._tokens_after(place)
        return self._proposal

    def _mark(self, proposal: tuple[int, ...], came: list[int]) -> None:
        """Learn from a proposal and the tokens that came instead."""
        num_right = 0
        for proposed, token_id in zip(proposal, came, strict=False):
            if proposed != token_id:
                break
            num_right += 1
        if num_right == min(len(proposal), len(came)):
            self._limit = min(self._limit * 2, self._max_tokens)
            self._num_failures = 0
        elif num_right:
            self._limit = min(num_right + 1, self._max_tokens)
        else:
            self._limit = max(self._limit // 2, 1)
            self._num_failures = min(self._num_failures + 1, _MAX_FAILURES)
            if self._num_failures > _PATIENCE:
                self._resume_at = len(self._tokens) + 2 ** (self._num_failures - _PATIENCE)

    def _best_place(self) -> int:
        """Find the earlier position whose last tokens best match the sequence's own; 0 if too few agree."""
        tokens, end = self._tokens, len(self._tokens) - 1
        best, best_len = 0, 0
        place = self._earlier_places[end]
        for _ in range(_MAX_CANDIDATES):
            if not place:
                break
            length = _MIN_MATCH
            while length < min(_MAX_MATCH, place + 1) and tokens[place - length] == tokens[end - length]:
                length += 1
            if length > best_len:
                best, best_len = place, length
            if length == _MAX_MATCH:
                break
            place = self._earlier_places[place]
        return best if best_len >= min(_MIN_MATCH + self._num_failures, _MAX_MATCH) else 0

    def _tokens_after(self, place: int) -> tuple[int, ...]:
        """The tokens that followed `place`, repeated if it is near the end."""
        return tuple(islice(cycle(self._tokens[place + 1 : place + 1 + self._limit]), self._limit))
