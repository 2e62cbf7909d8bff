"""Log probabilities as chats and as plain completions have them."""

from collections.abc import Sequence
from typing import Any

from llm.serving.schemas import TokenLogprobs
from llm.tokenization.tokenizer import Tokenizer

_LOWEST_LOGPROB = -9999.0


def chat_logprobs(entries: Sequence[TokenLogprobs], tokenizer: Tokenizer) -> dict[str, Any]:
    """`logprobs` of a chat choice."""
    content = []
    for entry in entries:
        top = [_chat_entry(token_id, logprob, tokenizer) for token_id, logprob in entry.top]
        content.append({**_chat_entry(entry.token_id, entry.logprob, tokenizer), "top_logprobs": top})
    return {"content": content, "refusal": None}


def completion_logprobs(
    entries: Sequence[TokenLogprobs], tokenizer: Tokenizer, offset: int, first_ids: Sequence[int] = ()
) -> tuple[dict[str, Any], int]:
    """`logprobs` of a completion choice.

    Args:
        first_ids: tokens before the entries that have no log probability: the first of a prompt.
        offset: characters before the first entry.

    Returns:
        The object, and the number of characters before the next entry.
    """
    tokens, offsets = [], []
    nothing = [None] * len(first_ids)
    for token_id in [*first_ids, *(entry.token_id for entry in entries)]:
        text = tokenizer.token_text(token_id)
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
    logprobs = {
        "tokens": tokens,
        "token_logprobs": [*nothing, *(_finite(entry.logprob) for entry in entries)],
        "top_logprobs": [
            *nothing,
            *(
                {tokenizer.token_text(token_id): _finite(logprob) for token_id, logprob in entry.top}
                for entry in entries
            ),
        ],
        "text_offset": offsets,
    }
    return logprobs, offset


def prompt_logprobs(entries: Sequence[TokenLogprobs], tokenizer: Tokenizer) -> list[dict[str, Any] | None]:
    """`prompt_logprobs` of a completion choice: for each token its own and the likeliest, by id; None for the first."""
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
