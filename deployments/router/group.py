"""The generations that answer one HTTP request."""

import asyncio
from collections.abc import Mapping, Sequence

from deployments.channel.messages import block_hash
from deployments.router.caller import Caller
from deployments.router.generation import Generation
from llm.core.prefix_cache import PageHashes
from llm.serving.schemas import GenerationRequest

_PAGES_WORTH_SHARING = 2


class GenerationGroup:
    """The generations of one HTTP request, with one waiter for all: one wake-up a step, however many there are.

    Where several continue the same prompt, all but the first wait until the first one's prompt is in a replica's
    prefix cache, and share it there.
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
        self._leaders = _leaders(requests, _PAGES_WORTH_SHARING * page_size)
        self._begun = {leader: asyncio.Event() for leader in set(self._leaders.values())}
        self._hashes = dict(hashes or {})
        self._page_size = page_size
        self._deadline: asyncio.TimerHandle | None = None
        if caller.timeout_s is not None:
            self._deadline = asyncio.get_running_loop().call_later(caller.timeout_s, self._expire)

    async def news(self) -> list[Generation]:
        """Wait until generations have got on; return these. One caller at a time."""
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
        """A generation has got on."""
        self._news.append(generation)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def cancel(self) -> None:
        """Give up what still runs. Safe to call at any time, more than once."""
        if self._deadline is not None:
            self._deadline.cancel()
        for generation in self.generations:
            generation.cancel()

    def shares_prompt(self, generation: Generation) -> bool:
        """Whether it waits for another one's prompt."""
        return generation.index in self._leaders

    async def wait_for_shared_prompt(self, generation: Generation) -> None:
        """Wait until this generation's prompt has been prefilled, if another one sees to that."""
        leader = self._leaders.get(generation.index)
        if leader is not None:
            await self._begun[leader].wait()

    def note_begun(self, generation: Generation) -> None:
        """A generation has its first token, or never will."""
        if generation.index in self._begun:
            self._begun[generation.index].set()

    def block_hashes(self, generation: Generation) -> Sequence[int]:
        """What the replicas' reports call the full pages of a prompt; worked out once for equal prompts."""
        name = id(generation.request.prompt_token_ids)
        if name not in self._hashes:
            self._hashes |= prompt_hashes([generation.request], self._page_size)
        return self._hashes[name]

    def _expire(self) -> None:
        for generation in self.generations:
            generation.expire()


def prompt_hashes(requests: Sequence[GenerationRequest], page_size: int) -> dict[int, list[int]]:
    """What the replicas' reports call the full pages of each prompt, by the prompt's `id`."""
    found: dict[int, list[int]] = {}
    for request in requests:
        prompt = request.prompt_token_ids or ()
        if id(prompt) not in found:
            hashes = PageHashes(page_size, request.cache_salt.encode())
            found[id(prompt)] = [block_hash(name) for name in hashes.extend(prompt, len(prompt))]
    return found


def _leaders(requests: Sequence[GenerationRequest], min_tokens: int) -> dict[int, int]:
    """For each request whose prompt an earlier one has too, if it is worth sharing, the index of that one."""
    firsts: dict[tuple[int, ...], int] = {}
    same: dict[int, int] = {}  # by identity: to hash and compare a long prompt for each answer would take seconds
    leaders: dict[int, int] = {}
    for index, request in enumerate(requests):
        prompt = request.prompt_token_ids or ()
        if len(requests) == 1 or len(prompt) < min_tokens:
            continue
        first = same.get(id(prompt))
        if first is None:
            first = same[id(prompt)] = firsts.setdefault(prompt, index)
        if first != index:
            leaders[index] = first
    return leaders
