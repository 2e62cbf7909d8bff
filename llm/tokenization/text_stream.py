"""`TextStream`: a sequence's tokens to text that is safe to show, ended by stop strings."""

from collections.abc import Iterable, Sequence

from llm.tokenization.tokenizer import Tokenizer


class TextStream:
    """Text of one sequence as its tokens come, without stop strings and without parts of characters.

    A stop string is matched in the text, wherever the borders of tokens fall. The first one to be completed ends the
    text, which then stops before it; of several completed by the same character, the longest counts. Text that may
    be the start of a stop string is held back until that is settled.

    Args:
        stop: stop strings, none of them empty.
        min_tokens: stop strings completed before this many tokens are ordinary text.
        shown_ids: special tokens that are not left out.

    Attributes:
        stop_reason: the stop string that ended the text, or None.
        num_tokens: tokens taken; after a stop, up to and including the one that completed the stop string.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        shown_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.stop_reason: str | None = None
        self.num_tokens = 0
        self._step = tokenizer.new_decoder(shown_ids).step
        # Longest first, so that it wins where several end on one character.
        self._matchers = [_Matcher(pattern) for pattern in sorted(set(stop), key=len, reverse=True)]
        self._min_tokens = min_tokens
        self._held = ""

    def push(self, token_ids: Iterable[int]) -> str:
        """Take the next tokens; return the text that they make safe to show.

        Tokens behind the one that completes a stop string are not taken, here or in later calls.
        """
        shown = []
        for token_id in token_ids:
            if self.stop_reason is not None:
                break
            self.num_tokens += 1
            text = self._step(token_id)
            if text:
                shown.append(self._release(text) if self._matchers else text)
        return "".join(shown)

    def finish(self) -> str:
        """End the text: return what was held back as the possible start of a stop string.

        Bytes of a character that never became complete are dropped.
        """
        held, self._held = self._held, ""
        return held

    def _release(self, text: str) -> str:
        """Add `text` to what is held and return what cannot be part of a stop string."""
        can_stop = self.num_tokens >= self._min_tokens
        num_before = len(self._held)
        held = self._held + text
        for end, character in enumerate(text, num_before + 1):
            for matcher in self._matchers:
                if matcher.completes(character) and can_stop:
                    self.stop_reason = matcher.pattern
                    self._held = ""
                    return held[: end - len(matcher.pattern)]
        num_held = max(matcher.num_matched for matcher in self._matchers)
        num_shown = len(held) - num_held
        self._held = held[num_shown:]
        return held[:num_shown]


class _Matcher:
    """Knuth-Morris-Pratt search for one pattern, a character at a time.

    Attributes:
        num_matched: characters of the longest start of the pattern, short of all of it, that the text ends with.
    """

    __slots__ = ("_borders", "num_matched", "pattern")

    def __init__(self, pattern: str) -> None:
        assert pattern, "an empty stop string matches everywhere"
        self.pattern = pattern
        self.num_matched = 0
        self._borders = _borders(pattern)

    def completes(self, character: str) -> bool:
        """Take the text's next character; whether the pattern ends with it."""
        matched = self.num_matched
        while matched and self.pattern[matched] != character:
            matched = self._borders[matched - 1]
        if self.pattern[matched] == character:
            matched += 1
        is_complete = matched == len(self.pattern)
        self.num_matched = self._borders[-1] if is_complete else matched
        return is_complete


def _borders(pattern: str) -> list[int]:
    """For each prefix of `pattern`, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(pattern)
    length = 0
    for index in range(1, len(pattern)):
        while length and pattern[index] != pattern[length]:
            length = borders[length - 1]
        if pattern[index] == pattern[length]:
            length += 1
        borders[index] = length
    return borders
