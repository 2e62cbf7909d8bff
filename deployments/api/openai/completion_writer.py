"""Answers of OpenAI's chat and plain completions, whole or streamed."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from deployments.api.openai.chat_message import Message, delta_of
from deployments.api.openai.chunks import ChunkWriter
from deployments.api.openai.logprobs import TextOffsets, chat_logprobs, completion_logprobs, joined, prompt_logprobs
from deployments.api.sse import DONE, error_events, event
from deployments.chat.choices import Choice, Update
from deployments.chat.errors import APIError
from deployments.chat.output import TextDelta
from deployments.chat.turn import Turn
from llm.config import MAX_TOP_LOGPROBS
from llm.serving.schemas import TokenLogprobs
from llm.tokenization.tokenizer import Tokenizer


@dataclass(slots=True)
class _Answer:
    """What has been written or gathered of a choice so far."""

    chunks: ChunkWriter
    offsets: TextOffsets
    """Offsets of the tokens that were generated."""
    is_open: bool = False
    message: Message = field(default_factory=Message)
    logprobs: list[TokenLogprobs] = field(default_factory=list)


class CompletionWriter:
    """Writes one turn; see `AnswerWriter`.

    Args:
        turn: a turn that has begun or is about to.
        tokenizer: gives the texts of tokens that go with their log probabilities.
        model: model name to give in the answer.
        is_chat: whether this is a chat rather than a plain completion.
        wants_logprobs: whether log probabilities were asked for.
        include_usage: end a stream with a chunk of token counts.
        echoes: whether log probabilities of the prompt come before those of the answer.
        wants_prompt: whether log probabilities of the prompt were asked for separately.
        num_kept: number of best answers to give for each prompt; None for all. Streams give all.
    """

    def __init__(
        self,
        turn: Turn,
        tokenizer: Tokenizer,
        *,
        model: str,
        is_chat: bool,
        wants_logprobs: bool = False,
        echoes: bool = False,
        wants_prompt: bool = False,
        include_usage: bool = False,
        num_kept: int | None = None,
    ) -> None:
        self._turn = turn
        self._tokenizer = tokenizer
        self._is_chat = is_chat
        self._wants_logprobs = wants_logprobs
        self._echoes = echoes
        self._wants_prompt = wants_prompt
        self._include_usage = include_usage
        self._num_kept = num_kept
        self._head = {
            "id": ("chatcmpl-" if is_chat else "cmpl-") + turn.generation_id,
            "object": "chat.completion.chunk" if is_chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._answers = [
            _Answer(
                ChunkWriter(self._head, choice.index, is_chat=is_chat, with_usage=include_usage),
                TextOffsets(tokenizer, choice.num_echoed_chars),
            )
            for choice in turn.choices
        ]

    def begin(self) -> bytes:
        """Nothing, since each choice is opened by its first chunk."""
        return b""

    def write(self, updates: Sequence[Update]) -> bytes:
        """Chunks for what is new."""
        events: list[bytes] = []
        for update in updates:
            choice, news = update.choice, update.events
            answer = self._answers[choice.index]
            chunks = answer.chunks
            if not answer.is_open:
                answer.is_open = True
                if self._is_chat:
                    events.append(chunks.role())
            written = None
            if self._wants_logprobs and update.logprobs:
                written = self._logprobs(answer, update.logprobs)
                news = news or [TextDelta("")]
            for new in news:
                if type(new) is TextDelta:
                    events.append(chunks.text(new.text, written))
                else:
                    events.append(chunks.delta(delta_of(new), written))
                written = None
            if choice.finish_reason is not None:
                events.append(chunks.finish(_finish_reason(choice)))
        return b"".join(events)

    async def settle(self) -> None:
        """Do nothing: nothing is stored."""

    def end(self) -> bytes:
        """Token counts, if they were asked for, and the end."""
        usage = event({**self._head, "choices": [], "usage": self._usage()}) if self._include_usage else b""
        return usage + DONE

    def failure(self, error: APIError) -> bytes:
        """The error, and the end."""
        return error_events(error)

    def add(self, updates: Sequence[Update]) -> None:
        """Take in what is new."""
        for update in updates:
            answer = self._answers[update.choice.index]
            answer.message.add(update.events)
            answer.logprobs.extend(update.logprobs)

    def whole(self) -> dict[str, Any]:
        """The response object."""
        choices = [self._choice_object(choice, index) for index, choice in enumerate(self._kept())]
        kind = "chat.completion" if self._is_chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": self._usage()}

    @property
    def num_values(self) -> int:
        """One piece of text per token, and its log probabilities."""
        num_each = 1 + sum(2 + len(entry.top) for answer in self._answers for entry in answer.logprobs[:1])
        num_tokens = self._turn.num_output_tokens
        if self._wants_prompt or (self._echoes and self._wants_logprobs):
            num_tokens += sum(choice.num_prompt_tokens for choice in self._turn.choices)
            num_each += 2 * MAX_TOP_LOGPROBS
        return num_tokens * num_each

    def _kept(self) -> list[Choice]:
        """The answers to give: for each prompt the best ones, best first, or all."""
        choices, num_each = self._turn.choices, self._turn.answers_a_prompt
        if self._num_kept is None or self._num_kept == num_each:
            return choices
        kept = []
        for start in range(0, len(choices), num_each):
            answers = sorted(choices[start : start + num_each], key=lambda choice: choice.mean_logprob, reverse=True)
            kept += answers[: self._num_kept]
        return kept

    def _choice_object(self, choice: Choice, index: int) -> dict[str, Any]:
        answer = self._answers[choice.index]
        of_prompt = choice.prompt_logprobs() if self._wants_prompt or self._echoes else []
        logprobs = None
        if self._wants_logprobs:
            logprobs = self._logprobs(answer, answer.logprobs)
            if self._echoes:
                offsets = TextOffsets(self._tokenizer, end=choice.num_echoed_chars)
                echoed = completion_logprobs(of_prompt, self._tokenizer, offsets, choice.prompt_ids[:1])
                logprobs = joined(echoed, logprobs)
        content: dict[str, Any] = (
            {"message": answer.message.as_dict()} if self._is_chat else {"text": answer.message.content}
        )
        written = {"index": index, **content, "logprobs": logprobs, "finish_reason": _finish_reason(choice)}
        if self._wants_prompt:
            written["prompt_logprobs"] = prompt_logprobs(of_prompt, self._tokenizer)
        return written

    def _logprobs(self, answer: _Answer, entries: list[TokenLogprobs]) -> dict[str, Any]:
        if self._is_chat:
            return chat_logprobs(entries, self._tokenizer)
        return completion_logprobs(entries, self._tokenizer, answer.offsets)

    def _usage(self) -> dict[str, Any]:
        turn = self._turn
        return {
            "prompt_tokens": turn.num_prompt_tokens,
            "completion_tokens": turn.num_output_tokens,
            "total_tokens": turn.num_prompt_tokens + turn.num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": turn.num_cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": turn.num_reasoning_tokens},
        }


def _finish_reason(choice: Choice) -> str:
    reason = choice.finish_reason
    assert reason is not None, "asked at the end"
    return "tool_calls" if reason == "stop" and choice.has_calls else reason
