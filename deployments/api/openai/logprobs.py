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
    entries: Sequence[TokenLogprobs], tokenizer: Tokenizer, offset: int
) -> tuple[dict[str, Any], int]:
    """`logprobs` of a completion choice.

    Args:
        offset: characters before the first entry.

    Returns:
        The object, and the number of characters before the next entry.
    """
    tokens, offsets = [], []
    for entry in entries:
        text = tokenizer.token_text(entry.token_id)
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
    logprobs = {
        "tokens": tokens,
        "token_logprobs": [_finite(entry.logprob) for entry in entries],
        "top_logprobs": [
            {tokenizer.token_text(token_id): _finite(logprob) for token_id, logprob in entry.top} for entry in entries
        ],
        "text_offset": offsets,
    }
    return logprobs, offset


def _chat_entry(token_id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    token_bytes = list(tokenizer.token_bytes(token_id))
    return {"token": tokenizer.token_text(token_id), "logprob": _finite(logprob), "bytes": token_bytes}


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST_LOGPROB)
