"""Answers in OpenAI's form, whole or streamed, from a group of generations."""

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from deployments.api.errors import error_body
from deployments.api.sse import DONE, ChunkWriter, event
from deployments.chat.choices import Choice, chat_logprobs, completion_logprobs
from deployments.chat.message import Message, delta_of
from deployments.chat.output import OutputEvent, OutputParser, TextDelta, ToolCallStart
from deployments.chat.parsers import PlainParser
from deployments.router.group import GenerationGroup
from llm.serving.schemas import TokenLogprobs
from llm.tokenization.tokenizer import Tokenizer


@dataclass(slots=True)
class _ChoiceState:
    """A choice with what is needed to write it."""

    choice: Choice
    parser: OutputParser
    writer: ChunkWriter | None = None
    is_open: bool = False
    echo: str = ""
    """What the text begins with; empty once it is told."""
    num_chars: int = 0
    """Characters of tokens with log probabilities so far, for completions' `text_offset`."""
    has_calls: bool = False
    message: Message = field(default_factory=Message)
    logprobs: list[TokenLogprobs] = field(default_factory=list)


class Answer:
    """One API request's answer.

    Args:
        group: its generations, started. Ended with the answer, in whatever way that ends.
        tokenizer: turns tokens into text.
        stop: stop strings.
        model: name to give.
        is_chat: chat or plain completion.
        wants_logprobs: whether log probabilities were asked for.
        parser: makes a parser for each choice's text.
        echoes: for each prompt what its answers begin with, or nothing at all.
        num_prompts: prompts in the request; their tokens count once, however many answers each has.
        num_kept: answers to give of each prompt, the best ones; None for all. Streams give all.
    """

    def __init__(
        self,
        group: GenerationGroup,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        *,
        model: str,
        is_chat: bool,
        wants_logprobs: bool,
        parser: Callable[[], OutputParser] = PlainParser,
        echoes: Sequence[str] = (),
        num_prompts: int = 1,
        num_kept: int | None = None,
    ) -> None:
        self._group = group
        self._tokenizer = tokenizer
        self._states = [_ChoiceState(Choice(generation, tokenizer, stop), parser()) for generation in group.generations]
        self._model = model
        self._is_chat = is_chat
        self._wants_logprobs = wants_logprobs
        self._answers_a_prompt = max(1, len(self._states) // num_prompts)
        self._num_kept = num_kept
        for i, state in enumerate(self._states if echoes else ()):
            state.echo = echoes[i // self._answers_a_prompt]
        # The first generation's, so that the answer can be found in the log.
        self._id = ("chatcmpl-" if is_chat else "cmpl-") + group.generations[0].request.request_id
        self._created = int(time.time())

    def phases_ms(self) -> dict[str, float]:
        """Where the time went so far, of the first choice."""
        return self._group.generations[0].timeline.phases_ms()

    def cancel(self) -> None:
        """Give up what still runs."""
        self._group.cancel()

    async def whole(self) -> dict[str, Any]:
        """Wait for everything and return the response object.

        Raises:
            APIError: one of the choices failed.
        """
        try:
            num_left = len(self._states)
            while num_left:
                for state in await self._news():
                    news, logprobs = self._news_of(state)
                    state.message.add(news)
                    state.logprobs.extend(logprobs)
                    if state.choice.error is not None:
                        raise state.choice.error
                    num_left -= state.choice.is_complete
        finally:
            self._group.cancel()
        choices = [self._choice_object(state, index) for index, state in enumerate(self._kept())]
        return {**self._head("chat.completion" if self._is_chat else "text_completion"),
                "choices": choices, "usage": self._usage()}  # fmt: skip

    def _kept(self) -> "list[_ChoiceState]":
        """The answers to give: of each prompt the best, the best one first, or all."""
        if self._num_kept is None or self._num_kept == self._answers_a_prompt:
            return self._states
        kept = []
        for start in range(0, len(self._states), self._answers_a_prompt):
            answers = self._states[start : start + self._answers_a_prompt]
            kept += sorted(answers, key=lambda state: state.choice.mean_logprob, reverse=True)[: self._num_kept]
        return kept

    async def first_news(self) -> "list[_ChoiceState]":
        """Wait until a stream has something to say; errors up to here can still be HTTP errors.

        Raises:
            APIError: the first thing that came is a failure.
        """
        try:
            news = await self._news()
            for state in news:
                error = state.choice.failure()
                if error is not None:
                    raise error
        except BaseException:
            self._group.cancel()
            raise
        return news

    async def chunks(self, news: "list[_ChoiceState]", *, include_usage: bool) -> AsyncGenerator[bytes, None]:
        """Events of a streamed answer, the ones that are ready together in one piece.

        Args:
            news: what `first_news` returned.
            include_usage: end with a chunk of token counts.
        """
        head = self._head("chat.completion.chunk" if self._is_chat else "text_completion")
        for state in self._states:
            state.writer = ChunkWriter(head, state.choice.index, is_chat=self._is_chat, with_usage=include_usage)
        num_left = len(self._states)
        try:
            while True:
                events: list[bytes] = []
                for state in news:
                    was_complete = state.choice.is_complete
                    self._advance(state, events)
                    if state.choice.error is not None:
                        yield b"".join(events) + b"data: " + error_body(state.choice.error) + b"\n\n" + DONE
                        return
                    num_left -= state.choice.is_complete and not was_complete
                if not num_left:
                    break
                if events:
                    yield b"".join(events)
                news = await self._news()
            if include_usage:
                events.append(event({**head, "choices": [], "usage": self._usage()}))
            events.append(DONE)
            yield b"".join(events)
        finally:
            self._group.cancel()

    async def _news(self) -> list[_ChoiceState]:
        """States of the choices that have got on."""
        states = self._states
        return [states[generation.index] for generation in await self._group.news()]

    def _advance(self, state: _ChoiceState, events: list[bytes]) -> None:
        """Write what is new in a choice."""
        choice, writer = state.choice, state.writer
        assert writer is not None, "made before the first chunk"
        if choice.is_complete:
            return
        news, logprobs = self._news_of(state)
        if choice.error is not None:
            return
        if not state.is_open:
            state.is_open = True
            if self._is_chat:
                events.append(writer.role())
        written = self._logprobs(state, logprobs) if self._wants_logprobs and logprobs else None
        if written is not None and not news:
            news = [TextDelta("")]
        for new in news:
            if isinstance(new, TextDelta):
                events.append(writer.text(new.text, written))
            else:
                events.append(writer.delta(delta_of(new), written))
            written = None
        if choice.finish_reason is not None:
            events.append(writer.finish(self._finish_reason(state)))

    def _news_of(self, state: _ChoiceState) -> tuple[list[OutputEvent], list[TokenLogprobs]]:
        """What has come of a choice since the last time."""
        text, logprobs = state.choice.advance()
        news: list[OutputEvent] = [TextDelta(state.echo)] if state.echo else []
        state.echo = ""
        news += state.parser.push(text)
        if state.choice.is_complete:
            news += state.parser.finish()
        state.has_calls = state.has_calls or any(isinstance(new, ToolCallStart) for new in news)
        return news, logprobs

    def _finish_reason(self, state: _ChoiceState) -> str:
        reason = state.choice.finish_reason
        assert reason is not None, "asked at the end"
        return "tool_calls" if reason == "stop" and state.has_calls else reason

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _choice_object(self, state: _ChoiceState, index: int) -> dict[str, Any]:
        logprobs = self._logprobs(state, state.logprobs) if self._wants_logprobs else None
        content: dict[str, Any] = (
            {"message": state.message.as_dict()} if self._is_chat else {"text": state.message.content}
        )
        return {"index": index, **content, "logprobs": logprobs,
                "finish_reason": self._finish_reason(state)}  # fmt: skip

    def _logprobs(self, state: _ChoiceState, entries: list[TokenLogprobs]) -> dict[str, Any]:
        if self._is_chat:
            return chat_logprobs(entries, self._tokenizer)
        logprobs, state.num_chars = completion_logprobs(entries, self._tokenizer, state.num_chars)
        return logprobs

    def _usage(self) -> dict[str, Any]:
        """Token counts; a prompt counts once, whatever its number of answers."""
        firsts = [state.choice for state in self._states[:: self._answers_a_prompt]]
        num_prompt = sum(choice.num_prompt_tokens for choice in firsts)
        num_output = sum(state.choice.num_tokens for state in self._states)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": {"cached_tokens": sum(choice.num_cached_tokens for choice in firsts)},
        }
