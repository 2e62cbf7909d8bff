"""Log probabilities in the forms of chats and of plain completions."""

from collections.abc import Sequence
from typing import Any

from llm.serving.schemas import TokenLogprobs
from llm.tokenization.tokenizer import Tokenizer

_LOWEST_LOGPROB = -9999.0
_ENDS_OF_MARKUP = frozenset(">]}\n ")
"""Characters that can end the markup that models put between thoughts, text and calls."""


def chat_logprobs(entries: Sequence[TokenLogprobs], tokenizer: Tokenizer) -> dict[str, Any]:
    """The `logprobs` of a chat choice."""
    content = []
    for entry in entries:
        top = [_chat_entry(token_id, logprob, tokenizer) for token_id, logprob in entry.top]
        content.append({**_chat_entry(entry.token_id, entry.logprob, tokenizer), "top_logprobs": top})
    return {"content": content, "refusal": None}


class TextOffsets:
    """Where the tokens of a text begin, in characters. A token that continues a character begins where the character
    does.

    Args:
        tokenizer: its decoder makes the text.
        start: number of characters before the first token.
        end: upper bound on where a token may begin; None for no bound.
    """

    def __init__(self, tokenizer: Tokenizer, start: int = 0, end: int | None = None) -> None:
        self._decoder = tokenizer.new_decoder()
        self._offset = start
        self._end = end

    def next(self, token_id: int) -> int:
        """Where this token begins, given that it follows all tokens asked for before."""
        offset = self._offset if self._end is None else min(self._offset, self._end)
        self._offset += len(self._decoder.step(token_id))
        return offset


def completion_logprobs(
    entries: Sequence[TokenLogprobs], tokenizer: Tokenizer, offsets: TextOffsets, first_ids: Sequence[int] = ()
) -> dict[str, Any]:
    """`logprobs` of a completion choice.

    Args:
        entries: log probabilities of consecutive tokens.
        tokenizer: gives their texts.
        offsets: offsets of the tokens, including `first_ids`.
        first_ids: tokens before the entries that have no log probability, such as the first of a prompt.
    """
    nothing = [None] * len(first_ids)
    token_ids = [*first_ids, *(entry.token_id for entry in entries)]
    return {
        "tokens": [tokenizer.token_text(token_id) for token_id in token_ids],
        "token_logprobs": [*nothing, *(_finite(entry.logprob) for entry in entries)],
        "top_logprobs": [
            *nothing,
            *(
                {tokenizer.token_text(token_id): _finite(logprob) for token_id, logprob in entry.top}
                for entry in entries
            ),
        ],
        "text_offset": [offsets.next(token_id) for token_id in token_ids],
    }


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """`logprobs` of a completion choice whose tokens come in two parts."""
    return {name: values + second[name] for name, values in first.items()}


class TextLogprobs:
    """Finds the tokens that make up a piece of a model's output. Pieces come in order, without the markup between them.

    Args:
        tokenizer: its decoder makes the output.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = tokenizer.new_decoder()
        self._text = ""
        self._tokens: list[tuple[int, TokenLogprobs]] = []

    def push(self, entries: Sequence[TokenLogprobs]) -> None:
        """Take in the next tokens."""
        for entry in entries:
            self._tokens.append((len(self._text), entry))
            self._text += self._decoder.step(entry.token_id)

    def pop(self, piece: str) -> list[dict[str, Any]]:
        """The tokens that begin in the next piece, in the form of a response's parts; tokens before it are dropped."""
        start = self._find(piece)
        end = start + len(piece)
        if start < 0 or not piece:
            return []
        found = [entry for place, entry in self._tokens if start <= place < end]
        self._tokens = [(place - end, entry) for place, entry in self._tokens if place >= end]
        self._text = self._text[end:]
        content: list[dict[str, Any]] = chat_logprobs(found, self._tokenizer)["content"]
        return content

    def _find(self, piece: str) -> int:
        """Where the piece begins: at once, or after markup, which may contain the same letters."""
        first = start = self._text.find(piece)
        while start > 0 and self._text[start - 1] not in _ENDS_OF_MARKUP:
            start = self._text.find(piece, start + 1)
        return start if start >= 0 else first


def prompt_logprobs(entries: Sequence[TokenLogprobs], tokenizer: Tokenizer) -> list[dict[str, Any] | None]:
    """The `prompt_logprobs` of a completion choice: each token's own and the likeliest ones, by id; None for the
    first."""
    written: list[dict[str, Any] | None] = [None]
    for entry in entries:
        ranks = {token_id: rank for rank, (token_id, _) in enumerate(entry.top, 1)}
        values = {entry.token_id: entry.logprob, **dict(entry.top)}
        written.append(
            {
                str(token_id): {
                    "logprob": _finite(logprob),
                    "rank": ranks.get(token_id),
                    "decoded_token": tokenizer.token_text(token_id),
                }
                for token_id, logprob in values.items()
            }
        )
    return written


def _chat_entry(token_id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    token_bytes = list(tokenizer.token_bytes(token_id))
    return {"token": tokenizer.token_text(token_id), "logprob": _finite(logprob), "bytes": token_bytes}


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST_LOGPROB)
