"""The generations that answer one HTTP request."""

import asyncio
from collections.abc import Mapping, Sequence

from deployments.errors import DeadlineError, KeyRevokedError
from deployments.router.batch import CallBatches
from deployments.router.caller import Caller
from deployments.router.generation import Generation
from deployments.router.prompts import leaders, prompt_hashes
from llm.errors import EngineError
from llm.serving.schemas import GenerationRequest

_PAGES_WORTH_SHARING = 2
_NUM_AT_ONCE = 64
"""Number of generations that start in one turn of the event loop."""


class GenerationGroup:
    """The generations of one HTTP request, with one waiter for all, so each step wakes it up once.

    If several have the same prompt, or all of them a long beginning in common, all but the first wait until the first
    one's prompt is in a replica's prefix cache, and share it there. If there are many, they start a few at a time, so
    that the event loop can run other work in between.
    """

    def __init__(
        self,
        requests: Sequence[GenerationRequest],
        caller: Caller,
        page_size: int,
        hashes: Mapping[int, list[int]] | None = None,
    ) -> None:
        self.caller = caller
        self.generations = [Generation(self, i, request) for i, request in enumerate(requests)]
        self._news: list[Generation] = []
        self._waiter: asyncio.Future[None] | None = None
        self._leaders = leaders(requests, _PAGES_WORTH_SHARING * page_size)
        self.batches = CallBatches()
        self._turns = [asyncio.Event() for _ in range(_NUM_AT_ONCE, len(requests), _NUM_AT_ONCE)]
        self._num_turns = 0
        if self._turns:
            asyncio.get_running_loop().call_soon(self._begin_turn)
        self._begun = {leader: asyncio.Event() for leader in set(self._leaders.values())}
        self._hashes = dict(hashes or {})
        self._page_size = page_size
        self._deadline: asyncio.TimerHandle | None = None
        if caller.timeout_s is not None:
            self._deadline = asyncio.get_running_loop().call_later(caller.timeout_s, self._expire)

    async def news(self) -> list[Generation]:
        """Wait until generations have news; return those. One caller at a time."""
        while not self._news:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        news, self._news = self._news, []
        for generation in news:
            generation.mark_collected()
        return news

    def wake_up(self, generation: Generation) -> None:
        """Note that a generation has news."""
        self._news.append(generation)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def cancel(self) -> None:
        """Give up the generations that still run. Safe to call at any time, more than once."""
        if self._deadline is not None:
            self._deadline.cancel()
        for generation in self.generations:
            generation.cancel()

    async def vectors(self) -> list[bytes]:
        """Wait for the vector that each request gives. Cancelling gives up those that run.

        Raises:
            LLMError: one of them failed; the others are given up.
        """
        generations = list(self.generations)
        num_left = len(generations)
        try:
            while num_left:
                for generation in await self.news():
                    if generation.error is not None:
                        raise generation.error
                    if generation.end is not None and generation.vector is None:
                        raise EngineError(f"the vector could not be computed: {generation.end.error}")
                    num_left -= generation.is_over
        finally:
            self.cancel()
        return [generation.vector for generation in generations if generation.vector is not None]

    def must_wait(self, generation: Generation) -> bool:
        """Whether the generation must let others go first."""
        return generation.index >= _NUM_AT_ONCE or generation.index in self._leaders

    async def wait_for_turn(self, generation: Generation) -> None:
        """Wait until it may start, and, if another generation prefills its prompt, until that is done."""
        if generation.index >= _NUM_AT_ONCE:
            await self._turns[generation.index // _NUM_AT_ONCE - 1].wait()
        leader = self._leaders.get(generation.index)
        if leader is not None:
            await self._begun[leader].wait()

    def note_begun(self, generation: Generation) -> None:
        """Note that a generation has its first token, or never will."""
        if generation.index in self._begun:
            self._begun[generation.index].set()

    def block_hashes(self, generation: Generation) -> Sequence[int]:
        """The hashes by which replicas' reports name the full pages of a prompt; computed once for equal prompts."""
        name = id(generation.request.prompt_token_ids)
        if name not in self._hashes:
            self._hashes |= prompt_hashes([generation.request], self._page_size)
        return self._hashes[name]

    def revoke(self) -> None:
        """End the generations that still run, because their API key has been revoked."""
        for generation in self.generations:
            generation.end_with(KeyRevokedError("The API key of this request has been revoked"))

    def _begin_turn(self) -> None:
        """Let the next few start."""
        self._turns[self._num_turns].set()
        self._num_turns += 1
        if self._num_turns < len(self._turns):
            asyncio.get_running_loop().call_soon(self._begin_turn)

    def _expire(self) -> None:
        for generation in self.generations:
            generation.end_with(DeadlineError("the request's timeout has passed"))
