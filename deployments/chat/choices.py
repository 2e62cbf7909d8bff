"""One choice of an answer: its generation's tokens, turned into text that may be shown, with their probabilities."""

from collections.abc import Sequence
from typing import Any

from deployments.chat.errors import SERVER_ERROR, APIError, of_engine
from deployments.router.generation import Generation
from llm.serving.schemas import FinishReason, TokenLogprobs
from llm.tokenization.text_stream import TextStream
from llm.tokenization.tokenizer import Tokenizer

_LOWEST_LOGPROB = -9999.0


class Choice:
    """Follows a generation. Call `advance` when it has got on.

    Attributes:
        finish_reason: "stop" or "length" once the choice is complete.
        num_tokens: output tokens that count, including the one that ended it.
        error: what to tell the client instead of a finish.
    """

    def __init__(self, generation: Generation, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        request = generation.request
        self.index = generation.index
        self.finish_reason: str | None = None
        self.error: APIError | None = None
        self.num_prompt_tokens = len(request.prompt_token_ids or ())
        self._generation = generation
        self._stream = TextStream(tokenizer, stop, request.min_new_tokens)
        self._num_taken = 0

    @property
    def is_complete(self) -> bool:
        """Whether it has finished or failed."""
        return self.finish_reason is not None or self.error is not None

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended it."""
        return self._stream.stop_reason

    @property
    def num_tokens(self) -> int:
        """Output tokens so far."""
        return self._num_taken

    @property
    def mean_logprob(self) -> float:
        """Mean log probability of its tokens, for which the request must ask."""
        logprobs = [entry.logprob for entry in self._generation.logprobs[: self._num_taken]]
        return sum(logprobs) / max(len(logprobs), 1)

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that came from the prefix cache; 0 until the end."""
        end = self._generation.end
        return end.num_cached_tokens if end is not None else 0

    def failure(self) -> APIError | None:
        """What went wrong with the generation, looked up without taking its tokens."""
        error = self._generation.error
        return of_engine(error) if error is not None else None

    def advance(self) -> tuple[str, list[TokenLogprobs]]:
        """Take the tokens that have come since the last call; return their text and probabilities."""
        if self.is_complete:
            return "", []
        generation = self._generation
        start, total = self._num_taken, len(generation.token_ids)
        new_ids = generation.token_ids[start:] if start else generation.token_ids
        end = generation.end
        # The token with which the model ends its answer is no part of the text.
        num_shown = total - 1 if end is not None and end.reason is FinishReason.STOP else total
        text = self._stream.push(new_ids[: num_shown - start] if num_shown < total else new_ids)
        if self._stream.stop_reason is not None:
            self.finish_reason = "stop"
            self._num_taken = num_shown = self._stream.num_tokens
            generation.cancel()
        else:
            self._num_taken = total
            if generation.is_over:
                text += self._finish()
        logprobs = generation.logprobs[start:num_shown] if generation.request.logprobs is not None else []
        return text, logprobs

    def _finish(self) -> str:
        """Settle how it ended; return the text held back until now."""
        end, error = self._generation.end, self._generation.error
        if error is not None:
            self.error = of_engine(error)
        elif end is not None and end.reason in (FinishReason.STOP, FinishReason.LENGTH):
            self.finish_reason = str(end.reason)
        else:
            self.error = APIError(500, "The engine failed on this request", type=SERVER_ERROR, code="engine_error")
        return self._stream.finish()


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
