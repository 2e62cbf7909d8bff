"""Request bodies with prompts of a given length, made of random tokens.

A prompt is either a list of token ids (`/v1/completions` of Rayline, vLLM and SGLang takes these), so that no tokenizer
is needed and lengths are exact, or text of words that are one token each to the tokenizer given.
"""

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from deployments.bench.workload import BLOCK_TOKENS, PlannedRequest

_NUM_PROBES = 20_000
_NUM_WORDS = 2_000
_MIN_WORDS = 16
_CHECKED_WORDS = 400


@dataclass(frozen=True, slots=True)
class TokenSource:
    """Pieces of which prompts are made, one token each.

    Attributes:
        pieces: token ids in decimal, or words.
        separator: text between two pieces.
        is_text: whether the pieces are words.
    """

    pieces: tuple[str, ...]
    separator: str
    is_text: bool

    @classmethod
    def ids(cls, low: int, high: int) -> "TokenSource":
        """Token ids from `low` to `high`, both included."""
        return cls(tuple(str(token_id) for token_id in range(low, high + 1)), ",", is_text=False)

    @classmethod
    def words(cls, directory: Path) -> "TokenSource":
        """Words of a tokenizer (`tokenizer.json` in `directory`), each of which is one token in whatever company.

        Where the vocabulary has too few words with a space in front, as one of single bytes, letters without spaces
        are used.

        Raises:
            ValueError: there is no such file, or the tokenizer has no such words.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"--tokenizer {directory}: there is no tokenizer.json in it")
        tokenizer = Tokenizer.from_file(str(path))
        # Sorted first: the vocabulary's order differs from process to process.
        candidates = sorted({word.lstrip("Ġ▁") for word in tokenizer.get_vocab()})
        random.Random(0).shuffle(candidates)
        plain = [word for word in candidates if word.isascii() and word.isalpha() and word.islower()]
        for separator in (" ", ""):
            lengthy = [word for word in plain if (len(word) > 1) == bool(separator)][:_NUM_PROBES]
            found = tuple(word for word in lengthy if _is_one_token(tokenizer, word, separator))[:_NUM_WORDS]
            if len(found) >= _MIN_WORDS and _adds_up(tokenizer, found, separator):
                return cls(found, separator, is_text=True)
        raise ValueError(
            f"--tokenizer {directory}: it has no words of one token each; leave it out to send token ids, "
            "which needs --endpoint completions"
        )

    def draw(self, num_tokens: int, rng: np.random.Generator) -> str:
        """`num_tokens` random pieces, joined."""
        pieces = self.pieces
        return self.separator.join([pieces[i] for i in rng.integers(0, len(pieces), size=num_tokens).tolist()])


def _num_tokens(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False).ids)


def _is_one_token(tokenizer: Tokenizer, word: str, separator: str) -> bool:
    lengths = [_num_tokens(tokenizer, separator.join([word] * times)) for times in (1, 2, 3)]
    return lengths[1] - lengths[0] == lengths[2] - lengths[1] == 1


def _adds_up(tokenizer: Tokenizer, words: tuple[str, ...], separator: str) -> bool:
    """Whether words, mixed, have as many tokens as there are; 1 % is left to a first one without its space."""
    mixed = random.Random(1).choices(words, k=_CHECKED_WORDS)
    return abs(_num_tokens(tokenizer, separator.join(mixed)) - _CHECKED_WORDS) <= _CHECKED_WORDS // 100


class BodyBuilder:
    """Makes the JSON of requests. The same arguments give the same bodies in every process.

    Args:
        source: what prompts are made of.
        is_chat: whether requests are for `/chat/completions`, with the prompt as one message of the user.
        model: name of the served model.
        seed: seed of the prompts; another seed shares nothing with what a server's prefix cache has seen.
        options: further fields of the body, such as `temperature`.
    """

    def __init__(self, source: TokenSource, *, is_chat: bool, model: str, seed: int, options: dict[str, Any]) -> None:
        self._source = source
        self._is_chat = is_chat
        self._seed = seed
        fields = {"model": model, "stream": True, "stream_options": {"include_usage": True}, **options}
        self._head = json.dumps(fields)[:-1]
        self._block = lru_cache(maxsize=4096)(self._make_block)

    def body(self, request: PlannedRequest) -> bytes:
        """The request as JSON. About 6 bytes for each token of the prompt."""
        prompt = self._source.separator.join(self._parts(request))
        content = json.dumps(prompt) if self._source.is_text else f"[{prompt}]"
        if self._is_chat:
            inner = f'"messages": [{{"role": "user", "content": {content}}}], "max_completion_tokens"'
        else:
            inner = f'"prompt": {content}, "max_tokens"'
        return f"{self._head}, {inner}: {request.num_output_tokens}}}".encode()

    def _parts(self, request: PlannedRequest) -> Iterable[str]:
        """The prompt in pieces: equal blocks of a trace are equal text."""
        if not request.block_ids:
            yield self._source.draw(request.num_input_tokens, np.random.default_rng([self._seed, 2, request.index]))
            return
        num_full, num_rest = divmod(request.num_input_tokens, BLOCK_TOKENS)
        for block_id in request.block_ids[:num_full]:
            yield self._source.separator.join(self._block(block_id))
        if num_rest:
            yield self._source.separator.join(self._block(request.block_ids[num_full])[:num_rest])

    def _make_block(self, block_id: int) -> list[str]:
        rng = np.random.default_rng([self._seed, 3, block_id])
        pieces = self._source.pieces
        return [pieces[i] for i in rng.integers(0, len(pieces), size=BLOCK_TOKENS).tolist()]
