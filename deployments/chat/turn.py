"""One answer as events, for APIs that give one answer to a request."""

from collections.abc import AsyncGenerator, Sequence

from deployments.chat.choices import Choice
from deployments.chat.output import OutputEvent, OutputParser
from deployments.router.group import GenerationGroup
from llm.tokenization.tokenizer import Tokenizer


class Turn:
    """The assistant's turn, as it comes.

    Args:
        group: one generation, started. Ended with the turn, in whatever way that ends.
        tokenizer: turns tokens into text.
        stop: stop strings.
        parser: tells reasoning, text and calls apart.
    """

    def __init__(self, group: GenerationGroup, tokenizer: Tokenizer, stop: Sequence[str], parser: OutputParser) -> None:
        self.choice = Choice(group.generations[0], tokenizer, stop)
        self.generation_id = group.generations[0].request.request_id
        self._group = group
        self._parser = parser

    def phases_ms(self) -> dict[str, float]:
        """Where the time went so far."""
        return self._group.generations[0].timeline.phases_ms()

    def cancel(self) -> None:
        """Give up what still runs."""
        self._group.cancel()

    async def begin(self) -> None:
        """Wait until something has come; errors up to here can still be HTTP errors.

        Raises:
            APIError: the first thing that came is a failure.
        """
        try:
            await self._group.news()
            error = self.choice.failure()
            if error is not None:
                raise error
        except BaseException:
            self._group.cancel()
            raise

    async def events(self) -> AsyncGenerator[list[OutputEvent], None]:
        """What is new, each time that something is, up to the end. `begin` comes first.

        Raises:
            APIError: the generation failed.
        """
        try:
            while True:
                text, _ = self.choice.advance()
                if self.choice.error is not None:
                    raise self.choice.error
                events = self._parser.push(text)
                if self.choice.is_complete:
                    events += self._parser.finish()
                if events:
                    yield events
                if self.choice.is_complete:
                    return
                await self._group.news()
        finally:
            self._group.cancel()
