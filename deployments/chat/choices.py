"""One choice of an answer: its generation's tokens, turned into events that may be shown, with their probabilities."""

from collections.abc import Sequence

import msgspec

from deployments.channel.messages import unpack_logprobs
from deployments.chat.errors import SERVER_ERROR, APIError, of_engine
from deployments.chat.output import OutputEvent, OutputParser, ReasoningDelta, TextDelta, ToolCallStart
from deployments.router.generation import Generation
from llm.serving.schemas import FinishReason, TokenLogprobs
from llm.tokenization.text_stream import TextStream
from llm.tokenization.tokenizer import Tokenizer


class Choice:
    """Follows a generation. Call `advance` when it has news.

    Args:
        generation: a generation that has been started.
        tokenizer: turns tokens into text.
        stop: stop strings.
        parser: tells reasoning, text and calls apart.
        echo: what the text begins with.
        shown_ids: special tokens that the parser must see as text.

    Attributes:
        finish_reason: "stop" or "length" once the choice is complete.
        error: what to tell the client instead of a finish.
        has_calls: whether a tool call has begun.
        num_echoed_chars: length of `echo`.
    """

    def __init__(
        self,
        generation: Generation,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        parser: OutputParser,
        echo: str = "",
        shown_ids: frozenset[int] = frozenset(),
    ) -> None:
        request = generation.request
        self.index = generation.index
        self.finish_reason: str | None = None
        self.error: APIError | None = None
        self.has_calls = False
        self.num_prompt_tokens = len(request.prompt_token_ids or ())
        self._generation = generation
        self._stream = TextStream(tokenizer, stop, request.min_new_tokens, shown_ids)
        self._parser = parser
        self._echo = echo
        self.num_echoed_chars = len(echo)
        self._num_taken = 0
        self._num_chars = self._num_reasoning_chars = 0

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
        """Output tokens so far that count, including the one that ended it."""
        return self._num_taken

    @property
    def num_reasoning_tokens(self) -> int:
        """Output tokens of thoughts, estimated by their share of the text, because the parser sees only text."""
        return round(self._num_taken * self._num_reasoning_chars / max(self._num_chars, 1))

    @property
    def mean_logprob(self) -> float:
        """Mean log probability of its tokens; the request must have asked for log probabilities."""
        logprobs = [entry.logprob for entry in self._generation.logprobs[: self._num_taken]]
        return sum(logprobs) / max(len(logprobs), 1)

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that came from the prefix cache; 0 until the end."""
        end = self._generation.end
        return end.num_cached_tokens if end is not None else 0

    @property
    def prompt_ids(self) -> Sequence[int]:
        """Tokens of the prompt."""
        return self._generation.request.prompt_token_ids or ()

    def prompt_logprobs(self) -> list[TokenLogprobs]:
        """One entry for each prompt token except the first, once the choice is complete; the request must have asked
        for them."""
        packed = self._generation.prompt_logprobs
        return unpack_logprobs(packed) if packed is not None else []

    def failure(self) -> APIError | None:
        """What went wrong with the generation, without taking its tokens."""
        error = self._generation.error
        return of_engine(error) if error is not None else None

    @property
    def has_more(self) -> bool:
        """Whether there are tokens that `advance` has not taken."""
        return not self.is_complete and self._num_taken < len(self._generation.token_ids)

    def advance(self, max_tokens: int) -> "Update":
        """Take tokens that arrived since the last call. The choice must not be complete.

        Args:
            max_tokens: how many at most; `has_more` tells whether some are left.
        """
        text, logprobs = self._take_tokens(max_tokens)
        events = self._parser.push(text)
        if self._echo:
            events.insert(0, TextDelta(self._echo))
            self._echo = ""
        if self.finish_reason is not None:
            events += self._parser.finish()
        for event in events:
            if isinstance(event, ToolCallStart):
                self.has_calls = True
            else:
                self._num_chars += len(event.text)
                self._num_reasoning_chars += len(event.text) if isinstance(event, ReasoningDelta) else 0
        return Update(self, events, logprobs)

    def _take_tokens(self, max_tokens: int) -> tuple[str, list[TokenLogprobs]]:
        """Text that may be shown from now on, and the probabilities of the tokens taken."""
        generation = self._generation
        start, total = self._num_taken, len(generation.token_ids)
        is_all = total - start <= max_tokens
        if not is_all:
            total = start + max_tokens
        end = generation.end
        # The token with which the model ends its answer is not part of the text.
        num_shown = total - 1 if is_all and end is not None and end.reason is FinishReason.STOP else total
        text = self._stream.push(generation.token_ids[start:num_shown])
        if self._stream.stop_reason is not None:
            self.finish_reason = "stop"
            self._num_taken = num_shown = self._stream.num_tokens
            generation.cancel()
        else:
            self._num_taken = total
            if is_all and generation.is_over:
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


class Update(msgspec.Struct, frozen=True, gc=False):
    """What is new in a choice.

    Attributes:
        choice: the choice, which may be complete by now.
        events: in order.
        logprobs: log probabilities of the tokens taken, if the request asked for them.
    """

    choice: Choice
    events: list[OutputEvent]
    logprobs: list[TokenLogprobs]
