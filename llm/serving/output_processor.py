"""`OutputProcessor`: turns what a step computed into the outputs of its requests."""

from collections.abc import Iterable, Mapping, Sequence as SequenceOf

import numpy as np

from llm.sampling.draw import NOTHING, Draw
from llm.scheduling.sequence import Sequence, TokenEvent, VectorEvent
from llm.schemas import (
    AdapterFailure,
    FinishReason,
    GenerationRequest,
    StepFailure,
    StepOutput,
    TokenLogprobs,
)
from llm.tokenization.text_stream import TextStream
from llm.tokenization.tokenizer import Tokenizer


class OutputProcessor:
    """Adds text, log probabilities and the reason of their end to the tokens of requests, and counts them.

    It ends no sequence: a request whose output has a `finish_reason` is the engine's to end.

    Args:
        tokenizer: None for outputs without text.

    Attributes:
        num_generated_tokens: tokens in all outputs so far.
        num_prompt_tokens: tokens of all prompts that have been computed.
        num_cached_prompt_tokens: of those, how many came from the prefix cache.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.num_generated_tokens = 0
        self.num_prompt_tokens = 0
        self.num_cached_prompt_tokens = 0
        self._tokenizer = tokenizer
        self._text_streams: dict[str, TextStream] = {}
        self._prompt_logprobs: dict[str, list[TokenLogprobs]] = {}
        """Those of requests that want them and have had no output yet."""

    def begin(self, request: GenerationRequest) -> None:
        """Expect the tokens of a request, which come after its `output_token_ids`."""
        if self._tokenizer is not None and not request.gives_vector:
            stream = TextStream(self._tokenizer, request.stop, request.min_new_tokens)
            stream.push(request.output_token_ids)
            self._text_streams[request.request_id] = stream
        if request.prompt_logprobs is not None:
            self._prompt_logprobs[request.request_id] = []

    def discard(self, request_id: str) -> None:
        """Forget a request that has ended."""
        self._text_streams.pop(request_id, None)
        self._prompt_logprobs.pop(request_id, None)

    def add_prompt_logprobs(self, scores: Iterable[tuple[Sequence, list[TokenLogprobs]]]) -> None:
        """Take what a step says of prompts, before its tokens; what belongs to no request any more is dropped."""
        for sequence, entries in scores:
            gathered = self._prompt_logprobs.get(sequence.request_id)
            if gathered is not None:
                gathered += entries

    def process(
        self, events: SequenceOf[TokenEvent | VectorEvent], draws: SequenceOf[Draw], vectors: Mapping[int, bytes]
    ) -> list[StepOutput]:
        """Turn a step's results into outputs, one for each request, in the order of the events.

        Args:
            events: what the scheduler made of the draws.
            draws: all draws of the step.
            vectors: the vectors that the step completed, by row.
        """
        outputs: list[StepOutput] = []
        last = None
        for event in events:
            if isinstance(event, VectorEvent):
                outputs.append(self._pooled(event.sequence, vectors[event.row]))
            elif event.sequence is not last:
                last = event.sequence
                outputs.append(self._drawn(event, draws[event.draw_index]))
            elif outputs[-1].finish_reason is None:  # a stop string may have ended it before all guesses counted
                outputs[-1] = outputs[-1].joined(self._drawn(event, draws[event.draw_index]))
        self.num_generated_tokens += sum(len(output.token_ids) for output in outputs)
        return outputs

    def _drawn(self, event: TokenEvent, draw: Draw) -> StepOutput:
        """The output for one draw: a token, what was asked for instead of one, or why there is none."""
        sequence = event.sequence
        request = sequence.request
        if event.token_id == NOTHING:
            return failed(sequence, "nothing could be drawn: the logits hold NaN or +inf, or all are forbidden")
        if sequence.constraint is not None and sequence.constraint.failure is not None:
            return failed(sequence, f"grammar: {sequence.constraint.failure}")
        prompt_logprobs = None
        if sequence.num_output_tokens == len(request.output_token_ids) + 1:
            self._count_prompt(sequence)
            if request.prompt_logprobs is not None:
                prompt_logprobs = tuple(self._prompt_logprobs.pop(request.request_id, ()))
        if request.scores_allowed:
            return _vector(sequence, draw.scores(request.allowed_token_ids or ()))
        if request.max_new_tokens == 0:  # only the prompt was wanted: the token drawn after it is dropped
            return _without_token(sequence, FinishReason.LENGTH, prompt_logprobs=prompt_logprobs)
        text, reason, stop_reason = "", event.finish_reason, None
        stream = self._text_streams.get(request.request_id)
        if stream is not None or reason is not None:
            text, reason, stop_reason = _text_and_end(event, stream)
        logprobs = None
        if request.logprobs is not None:
            assert draw.logprob is not None, "the sampler gives log probabilities where they are asked for"
            logprobs = (TokenLogprobs(draw.token_id, draw.logprob, draw.top),)
        return StepOutput(
            request_id=request.request_id,
            token_ids=(event.token_id,),
            text=text,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            finish_reason=reason,
            stop_reason=stop_reason,
            num_prompt_tokens=sequence.num_prompt_tokens,
            num_cached_tokens=sequence.num_cached_tokens or 0,
            queue_s=sequence.queue_s,
        )

    def _pooled(self, sequence: Sequence, vector: bytes) -> StepOutput:
        """The output of a request that wants a vector of hidden states."""
        output = _vector(sequence, vector)
        if output.error is None:
            self._count_prompt(sequence)
        return output

    def _count_prompt(self, sequence: Sequence) -> None:
        """Count a prompt that has been computed."""
        self.num_prompt_tokens += sequence.num_prompt_tokens
        self.num_cached_prompt_tokens += sequence.num_cached_tokens or 0


def failed(
    sequence: Sequence,
    message: str,
    step_failure: StepFailure | None = None,
    adapter_failure: AdapterFailure | None = None,
) -> StepOutput:
    """The last output of a request that failed, either by itself or with its whole step."""
    return StepOutput(
        sequence.request_id, (), finish_reason=FinishReason.ERROR, error=message, step_failure=step_failure,
        adapter_failure=adapter_failure,
    )  # fmt: skip


def _text_and_end(event: TokenEvent, stream: TextStream | None) -> tuple[str, FinishReason | None, int | str | None]:
    """The text that a token makes safe to show, why it ends its request, and the stop id or string, if any."""
    reason, stop_reason = event.finish_reason, None
    if reason is FinishReason.STOP and event.token_id in event.sequence.request.stop_token_ids:
        stop_reason = event.token_id
    if stream is None:
        return "", reason, stop_reason
    # The token that ends a sequence is not part of its text.
    text = stream.push((event.token_id,)) if reason is not FinishReason.STOP else ""
    if stream.stop_reason is not None:
        return text, FinishReason.STOP, stream.stop_reason
    if reason is not None:
        text += stream.finish()
    return text, reason, stop_reason


def _vector(sequence: Sequence, vector: bytes) -> StepOutput:
    """The only output of a request that wants a vector."""
    if not np.isfinite(np.frombuffer(vector, np.float32)).all():
        return failed(sequence, "the model's hidden states or logits are not finite")
    return _without_token(sequence, FinishReason.STOP, vector=vector)


def _without_token(
    sequence: Sequence,
    reason: FinishReason,
    *,
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None,
    vector: bytes | None = None,
) -> StepOutput:
    """The only output of a request that generates nothing."""
    return StepOutput(
        sequence.request_id, (), prompt_logprobs=prompt_logprobs, finish_reason=reason,
        num_prompt_tokens=sequence.num_prompt_tokens, num_cached_tokens=sequence.num_cached_tokens or 0,
        queue_s=sequence.queue_s, vector=vector,
    )  # fmt: skip
