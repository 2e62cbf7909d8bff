"""`SimpleCharacterTokenizer`: one token a character, for examples and tests."""

from collections.abc import Sequence

from llm.errors import ConfigError

_REPLACEMENT = "\ufffd"


class SimpleCharacterTokenizer:
    """One id a character, in the order of `alphabet`, and one more, `unk_token_id`, for every other character.

    No text is refused and no token is lost: a character outside the alphabet becomes `unk_token_id`, and that id, as
    well as any id a model makes up that is past `vocab_size`, is shown as U+FFFD. There are no special tokens, so
    generation ends by length or by a stop string.

    Args:
        alphabet: distinct single characters.

    Raises:
        ConfigError: an entry is not one character, or comes twice.
    """

    def __init__(self, alphabet: Sequence[str]) -> None:
        for character in alphabet:
            if len(character) != 1:
                raise ConfigError(f"alphabet holds {character[:20]!r}; each entry must be a single character")
        if len(set(alphabet)) != len(alphabet):
            raise ConfigError("alphabet holds a character twice; list each once")
        self._characters = list(alphabet)
        self._ids = {character: index for index, character in enumerate(alphabet)}
        self.unk_token_id = len(alphabet)

    @property
    def vocab_size(self) -> int:
        """Number of ids: the alphabet and the unknown character."""
        return len(self._characters) + 1

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Always empty."""
        return frozenset()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:  # noqa: ARG002 - there are none
        """One id a character of `text`."""
        return [self._ids.get(character, self.unk_token_id) for character in text]

    def decode(self, token_ids: Sequence[int]) -> str:
        """One character an id."""
        return "".join(map(self.token_text, token_ids))

    def token_text(self, token_id: int) -> str:
        """The character of an id; U+FFFD for an id that has none."""
        return self._characters[token_id] if 0 <= token_id < len(self._characters) else _REPLACEMENT

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes of `token_text`."""
        return self.token_text(token_id).encode()

    def new_decoder(self, shown_ids: frozenset[int] = frozenset()) -> "SimpleDecoder":  # noqa: ARG002
        """A decoder for a fresh sequence. There are no special tokens to show."""
        return SimpleDecoder(self)


class SimpleDecoder:
    """Each token is a whole character, so nothing is ever held back."""

    def __init__(self, tokenizer: SimpleCharacterTokenizer) -> None:
        self.step = tokenizer.token_text
