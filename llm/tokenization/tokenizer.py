"""What the rest of the system needs of a tokenizer."""

from collections.abc import Sequence
from typing import Protocol


class TokenDecoder(Protocol):
    """Turns one sequence's tokens into text as they come, never showing part of a character."""

    def step(self, token_id: int) -> str:
        """Take the next token; return the text it completes, "" while a character is still incomplete."""
        ...


class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included; every id is below it."""
        ...

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Ids with which the model ends an answer; may be empty."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Text that looks like a control token stays text.

        Args:
            add_special_tokens: put those special tokens around the text that the checkpoint's tokenizer does: often the
                beginning-of-sequence token in front, sometimes the end-of-sequence token behind.
        """
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a whole sequence, special tokens left out."""
        ...

    def token_text(self, token_id: int) -> str:
        """Text of one token on its own, special tokens shown; for log probabilities."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes of one token on its own, which may be part of a character; a special token's name."""
        ...

    def new_decoder(self, shown_ids: frozenset[int] = frozenset()) -> TokenDecoder:
        """A decoder for a fresh sequence.

        Args:
            shown_ids: special tokens that are not left out.
        """
        ...
