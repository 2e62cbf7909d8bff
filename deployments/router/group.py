"""The generations that answer one HTTP request."""

import asyncio
from collections.abc import Mapping, Sequence

from deployments.errors import DeadlineError, KeyRevokedError
from deployments.router.batch import CallBatches
from deployments.router.caller import Caller
from deployments.router.generation import Generation
from deployments.router.metered_request import MeteredRequest
from deployments.router.prompts import leaders
from deployments.router.surroundings import Placement
from llm.errors import EngineError, InvalidRequestError
from llm.serving.schemas import FinishReason, GenerationRequest

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
        hashes: Mapping[int, Sequence[int]],
        metered: MeteredRequest | None,
    ) -> None:
        self.caller = caller
        self.generations = [Generation(self, i, request) for i, request in enumerate(requests)]
        self._news: list[Generation] = []
        self._waiter: asyncio.Future[None] | None = None
        self._leaders = leaders(requests, _PAGES_WORTH_SHARING * page_size)
        self.batches = CallBatches()
        self._metered = metered
        self._num_running = len(requests)
        self._begun = {leader: asyncio.Event() for leader in set(self._leaders.values())}
        self._hashes = hashes
        self._deadline: asyncio.TimerHandle | None = None
        if caller.timeout_s is not None:
            self._deadline = asyncio.get_running_loop().call_later(caller.timeout_s, self._expire)

    def start(self, placement: Placement[Generation], first: int = 0) -> None:
        """Start the generations, a few in each turn of the event loop, from the index `first` on."""
        last = first + _NUM_AT_ONCE
        for generation in self.generations[first:last]:
            generation.start(placement)
        if last < len(self.generations):
            asyncio.get_running_loop().call_soon(self.start, placement, last)

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
        self.settle(str(FinishReason.STOP))
        return [generation.vector for generation in generations if generation.vector is not None]

    def must_wait(self, generation: Generation) -> bool:
        """Whether the generation must let others go first."""
        return generation.index >= _NUM_AT_ONCE or generation.index in self._leaders

    async def wait_for_turn(self, generation: Generation) -> None:
        """If another generation prefills its prompt, wait until that is done."""
        leader = self._leaders.get(generation.index)
        if leader is not None:
            await self._begun[leader].wait()

    def note_begun(self, generation: Generation) -> None:
        """Note that a generation has its first token, or never will."""
        if generation.index in self._begun:
            self._begun[generation.index].set()

    def note_tokens(self, num_tokens: int) -> None:
        """Count tokens that a generation has got."""
        if self._metered is not None:
            self._metered.add_output(num_tokens)

    def note_over(self) -> None:
        """Note that the task of a generation has ended. After the last one, what the group has used is recorded."""
        self._num_running -= 1
        if self._num_running:
            return
        error = next((generation.error for generation in self.generations if generation.error is not None), None)
        ends = [generation.end for generation in self.generations if generation.end is not None]
        if error is not None:
            self.settle("error", type(error).__name__)
        else:
            self.settle(str(ends[0].reason) if len(ends) == len(self.generations) else "abort")

    def settle(self, outcome: str, reason: str = "", num_output_tokens: int | None = None) -> None:
        """Record what the group has used; call it before the client is told of the end. No effect a second time.

        Args:
            outcome, reason: as in `Entry`.
            num_output_tokens: as the answer counts them; None for all that were generated.
        """
        metered = self._metered
        if metered is None or metered.is_closed:
            return
        is_computed = any(
            g.timeline.placed_at and not isinstance(g.error, InvalidRequestError) for g in self.generations
        )
        first_of_prompt = {id(g.request.prompt_token_ids): g for g in reversed(self.generations)}
        metered.close(
            outcome,
            reason,
            prompt_tokens=metered.entry.prompt_tokens if is_computed else 0,
            cached_tokens=sum(g.end.num_cached_tokens for g in first_of_prompt.values() if g.end is not None),
            output_tokens=metered.num_output_tokens if num_output_tokens is None else num_output_tokens,
        )

    def block_hashes(self, generation: Generation) -> Sequence[int]:
        """The hashes by which replicas' reports name the full pages of a prompt."""
        return self._hashes[id(generation.request.prompt_token_ids)]

    def revoke(self, why: str) -> None:
        """End the generations that still run, because their API key has been revoked or has expired."""
        for generation in self.generations:
            generation.end_with(KeyRevokedError(why))

    def _expire(self) -> None:
        for generation in self.generations:
            generation.end_with(DeadlineError("the request's timeout has passed"))
