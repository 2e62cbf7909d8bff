"""A router's journal of live requests: what each one asked for, what it has got, and where it runs."""

import asyncio
import itertools
from collections.abc import Callable, Iterator, Sequence

from deployments.channel.messages import ChannelAddress, TokenItem, block_hash
from deployments.fleet.fleet import Fleet
from deployments.router.dispatcher import Dispatcher
from deployments.router.generation import Caller, Generation
from deployments.router.waiting import Ticket
from deployments.serve.engine_client import EngineClient
from llm.core.prefix_cache import PageHashes
from llm.serving.schemas import GenerationRequest

_FIRST_GUESS_OUTPUT_TOKENS = 256.0
_OUTPUT_MEMORY = 0.99
_PAGES_WORTH_SHARING = 2


class GenerationGroup:
    """The generations of one HTTP request, with one waiter for all: one wake-up a step, however many there are.

    Where several continue the same prompt, all but the first wait until the first one's prompt is in a replica's
    prefix cache, and share it there.
    """

    def __init__(self, requests: Sequence[GenerationRequest], caller: Caller, page_size: int) -> None:
        self.caller = caller
        self.generations = [Generation(self, i, request) for i, request in enumerate(requests)]
        self._news: list[Generation] = []
        self._waiter: asyncio.Future[None] | None = None
        self._leaders = _leaders(requests, _PAGES_WORTH_SHARING * page_size)
        self._begun = {leader: asyncio.Event() for leader in set(self._leaders.values())}
        self._hashes: dict[int, list[int]] = {}
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
        leader = self._leaders.get(generation.index, generation.index)
        if leader not in self._hashes:
            prompt = generation.request.prompt_token_ids or ()
            hashes = PageHashes(self._page_size, generation.request.cache_salt.encode())
            self._hashes[leader] = [block_hash(h) for h in hashes.extend(prompt, len(prompt))]
        return self._hashes[leader]

    def _expire(self) -> None:
        for generation in self.generations:
            generation.expire()


class Journal:
    """Every live generation of a router, by the number its tokens come under.

    Args:
        client: the engine replicas.
        fleet: this router's view of them.
        dispatcher: says where a request goes, and when.
        channel: where tokens come in; None to live on replies alone.
        max_resumes: how often a request may go on elsewhere after a failure; 0 turns failover off.
        on_over: told of every request that has ended, in whatever way.
    """

    def __init__(
        self,
        client: EngineClient,
        fleet: Fleet,
        dispatcher: Dispatcher,
        channel: ChannelAddress | None,
        *,
        max_resumes: int,
        on_over: Callable[[Generation], None] = lambda _: None,
    ) -> None:
        self.on_over = on_over
        self.on_move: Callable[[str | None], None] = lambda _: None
        """Told the replica whose stream goes on elsewhere."""
        self.client = client
        self.dispatcher = dispatcher
        self.channel = channel
        self.max_resumes = max_resumes
        self.page_size = 16
        self.num_requests = 0
        self.num_resumes = 0
        self.num_moves = 0
        self._fleet = fleet
        self._live: dict[int, Generation] = {}
        self._stream_ids = itertools.count(1)
        self._mean_output_tokens = _FIRST_GUESS_OUTPUT_TOKENS

    @property
    def num_live(self) -> int:
        """Generations that a replica runs or that wait for one."""
        return len(self._live)

    def start(self, requests: Sequence[GenerationRequest], caller: Caller) -> GenerationGroup:
        """Begin an HTTP request's generations.

        Raises:
            OverloadedError: too much waits already.
        """
        self.dispatcher.check(sum(self.work_of(request) for request in requests), caller.timeout_s)
        if caller.account is not None:
            prompts = {request.prompt_token_ids or () for request in requests}
            caller.account.charge(sum(len(prompt) for prompt in prompts))
        group = GenerationGroup(requests, caller, self.page_size)
        self.num_requests += len(requests)
        for generation in group.generations:
            generation.start(self)
        return group

    def work_of(self, request: GenerationRequest) -> int:
        """Tokens of prompt and expected output: what it takes out of a replica."""
        output = min(request.max_new_tokens, round(self._mean_output_tokens))
        return len(request.prompt_token_ids or ()) + output

    def claim(self, generation: Generation) -> Ticket:
        """Begin an attempt: a number for its tokens, and a place among those that wait for a replica."""
        request, caller = generation.request, generation.group.caller
        ticket = Ticket(
            next(self._stream_ids),
            num_tokens=len(request.prompt_token_ids or ()) + len(generation.token_ids),
            num_work_tokens=self.work_of(request),
            block_hashes=generation.group.block_hashes(generation),
            tenant=caller.tenant,
            priority=caller.priority,
            is_resumed=generation.num_resumes > 0,
        )
        self._live[ticket.stream_id] = generation
        self.dispatcher.enqueue(ticket)
        return ticket

    def release(self, ticket: Ticket) -> None:
        """The attempt is over; what still comes under its number is dropped."""
        generation = self._live.pop(ticket.stream_id)
        self.dispatcher.withdraw(ticket)
        if generation.end is not None:
            num_output = len(generation.token_ids)
            self._mean_output_tokens += (1 - _OUTPUT_MEMORY) * (num_output - self._mean_output_tokens)
        self._fleet.ended(ticket.stream_id)
        self.dispatcher.pump()

    def on_replica(self, replica_id: str) -> Iterator[Generation]:
        """Generations that run on a replica, as far as known."""
        return (generation for generation in list(self._live.values()) if generation.replica_id == replica_id)

    def take_items(self, replica_id: str, items: Sequence[TokenItem]) -> None:
        """Hand tokens from the channel to their generations."""
        live = self._live
        for item in items:
            generation = live.get(item.stream_id)
            if generation is not None:
                if generation.timeline.first_token_at is None:
                    self._fleet.prefilled(item.stream_id)
                if item.end is not None:  # reports come by the same way: the next one leaves it out
                    self._fleet.ended(item.stream_id)
                generation.take_item(item, replica_id)


def _leaders(requests: Sequence[GenerationRequest], min_tokens: int) -> dict[int, int]:
    """For each request whose prompt an earlier one has too, if it is worth sharing, the index of that one."""
    firsts: dict[tuple[int, ...], int] = {}
    leaders: dict[int, int] = {}
    for index, request in enumerate(requests):
        prompt = request.prompt_token_ids or ()
        if len(requests) == 1 or len(prompt) < min_tokens:
            continue
        first = firsts.setdefault(prompt, index)
        if first != index:
            leaders[index] = first
    return leaders
