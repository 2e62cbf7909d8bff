"""One answer to a request: its choices as events, from which each API writes its own format."""

import asyncio
from collections.abc import Callable, Sequence

from deployments.chat.choices import Choice, Update
from deployments.chat.errors import APIError
from deployments.chat.output import OutputParser
from deployments.chat.parsers import PlainParser
from deployments.router.generation import Generation
from deployments.router.group import GenerationGroup
from llm.tokenization.tokenizer import Tokenizer

_TOKENS_AT_ONCE = 512
"""Most accumulated tokens that a turn turns into text before it lets other work run on the event loop."""


class Turn:
    """The assistant's turn, as it is generated. Its reader must `cancel` it at the end, however it ends.

    Args:
        group: its generations, which have been started.
        tokenizer: turns tokens into text.
        stop: stop strings.
        parser: makes a parser for each choice's text.
        shown_ids: special tokens that the parsers must see as text.
        echoes: what each prompt's choices begin with; empty if they echo nothing.
        num_prompts: number of prompts in the request; each has the same number of choices.

    Attributes:
        choices: the choices of the first prompt, then of the second, and so on.
        answers_a_prompt: number of choices that each prompt has.
        generation_id: id of the first generation, so that the answer can be found in the log.
    """

    def __init__(
        self,
        group: GenerationGroup,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        parser: Callable[[], OutputParser] = PlainParser,
        *,
        shown_ids: frozenset[int] = frozenset(),
        echoes: Sequence[str] = (),
        num_prompts: int = 1,
    ) -> None:
        generations = group.generations
        self.answers_a_prompt = max(1, len(generations) // num_prompts)
        self.generation_id = generations[0].request.request_id
        self.choices = [
            Choice(
                generation, tokenizer, stop, parser(), echoes[i // self.answers_a_prompt] if echoes else "", shown_ids
            )
            for i, generation in enumerate(generations)
        ]
        self._group = group
        self._num_left = len(self.choices)
        self._news: list[Generation] = []
        self._is_behind = False
        self._tokens_at_once = _TOKENS_AT_ONCE // (1 + (generations[0].request.logprobs or 0))
        self._error: APIError | None = None

    @property
    def is_complete(self) -> bool:
        """Whether every choice has finished."""
        return not self._num_left

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompts; each prompt counts once, however many choices it has."""
        return sum(choice.num_prompt_tokens for choice in self.choices[:: self.answers_a_prompt])

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that came from the prefix cache."""
        return sum(choice.num_cached_tokens for choice in self.choices[:: self.answers_a_prompt])

    @property
    def num_output_tokens(self) -> int:
        """Tokens of all choices."""
        return sum(choice.num_tokens for choice in self.choices)

    @property
    def num_reasoning_tokens(self) -> int:
        """How many of these are tokens of thoughts; an estimate."""
        return sum(choice.num_reasoning_tokens for choice in self.choices)

    def phases_ms(self) -> dict[str, float]:
        """How long each phase of the first choice has taken so far, in milliseconds."""
        return self._group.generations[0].timeline.phases_ms()

    def cancel(self) -> None:
        """Give up the generations that still run. Safe to call at any time, more than once."""
        self._group.cancel()

    async def begin(self) -> None:
        """Wait for the first news, so that a request that fails at once can still be answered with a status.

        Raises:
            APIError: the first news is a failure.
        """
        self._news = await self._group.news()
        for generation in self._news:
            error = self.choices[generation.index].failure()
            if error is not None:
                raise error

    async def updates(self) -> list[Update]:
        """Wait for what is new in the choices. Do not call it once the turn is complete.

        Raises:
            APIError: a choice failed. Everything before that has been returned.
        """
        if self._error is not None:
            raise self._error
        if self._is_behind:
            self._is_behind = False
            await asyncio.sleep(0)
        news, self._news = self._news or await self._group.news(), []
        updates = []
        num_left = self._tokens_at_once
        for place, generation in enumerate(news):
            choice = self.choices[generation.index]
            if choice.is_complete:
                continue
            if num_left <= 0:
                self._news, self._is_behind = news[place:], True
                break
            num_before = choice.num_tokens
            update = choice.advance(num_left)
            num_left -= choice.num_tokens - num_before
            if choice.has_more:
                self._news, self._is_behind = news[place:], True
            if choice.error is not None:
                self._error = choice.error
                break
            updates.append(update)
            if choice.finish_reason is not None:
                self._num_left -= 1
                if not self._num_left:
                    self._group.settle(choice.finish_reason, "", self.num_output_tokens)
        if self._error is not None and not updates:
            raise self._error
        return updates
