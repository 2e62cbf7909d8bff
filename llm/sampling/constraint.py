"""Which tokens a grammar allows next, one bit per token.

The end of an answer is allowed if its grammar is complete, and is the only token allowed if nothing more can follow.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher

Int32Array = npt.NDArray[np.int32]


def words_of(token_ids: Sequence[int], vocab_size: int) -> Int32Array:
    """Token ids as bits: (vocab_size / 32,), starting with the lowest bit of the first word."""
    bits = np.zeros(-(-vocab_size // 32) * 32, dtype=np.uint8)
    bits[list(token_ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


class Constraint:
    """A sequence's grammar at the point that its output has reached.

    Args:
        matcher: at the grammar's beginning, used by nothing else.

    Attributes:
        matcher: computes masks.
        num_taken: number of output tokens that it has consumed.
        failure: why the grammar cannot continue, None while it can. After a failure nothing is forbidden any more.
    """

    __slots__ = ("failure", "matcher", "num_taken")

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher
        self.num_taken = 0
        self.failure: str | None = None

    def advance(self, tokens: Sequence[int], num_prompt_tokens: int) -> None:
        """Consume those of a sequence's output tokens that are new."""
        for token_id in tokens[num_prompt_tokens + self.num_taken :]:
            self.take(token_id)

    def take(self, token_id: int) -> None:
        """Consume the output's next token."""
        self.num_taken += 1
        # After its end a grammar has no effect: the sequence may also end in other ways.
        if self.failure is None and not self.matcher.is_stopped() and not self.matcher.consume_token(token_id):
            self.note_failure("a token does not fit the grammar")

    def note_failure(self, message: str = "") -> None:
        """Keep the matcher's error message, if it has one."""
        if self.failure is None and self.matcher.is_error():
            self.failure = self.matcher.get_error() or message


class TokenMasks:
    """Computes what constraints allow, many at once, in threads.

    Args:
        vocab_size: columns of the logits.

    Attributes:
        num_words: number of 32-bit words, one bit per token.
    """

    def __init__(self, vocab_size: int) -> None:
        self.num_words = -(-vocab_size // 32)
        self._executor: LLExecutor | None = None

    def write(self, constraints: Mapping[int, Constraint], masks: Int32Array) -> None:
        """Set the bits of the tokens that are allowed, starting with the lowest bit of the first word.

        If a constraint has failed, every bit is set.

        Args:
            constraints: constraints by their rows in `masks`.
            masks: (rows, vocab_size / 32), contiguous; rows without a constraint are left unchanged.
        """
        if self._executor is None:
            self._executor = LLExecutor()
        masks[list(constraints)] = -1
        rows = [(constraint.matcher, i) for i, constraint in constraints.items() if constraint.failure is None]
        if rows:
            self._executor.unsafe_compute_mask_ptr(rows, masks.ctypes.data, masks.strides[0], len(masks))
        for i, constraint in constraints.items():
            constraint.note_failure()
            if constraint.failure is not None:
                masks[i] = -1
