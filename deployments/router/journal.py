"""A router's journal of live requests: what each one asked for, what it has received, and where it runs."""

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from deployments.channel.messages import ChannelAddress, TokenItem
from deployments.errors import ShuttingDownError
from deployments.fleet.engine_client import EngineClient
from deployments.fleet.fleet import Fleet, RoutingKey
from deployments.fleet.sessions import session_key
from deployments.observe.finished_request import FinishedRequest
from deployments.observe.history import History
from deployments.router.caller import Caller
from deployments.router.dispatcher import Dispatcher
from deployments.router.generation import Generation
from deployments.router.group import GenerationGroup
from deployments.router.meter import Meter
from deployments.router.prompts import num_prompt_tokens
from deployments.router.suspicion import Part, assign_parts, part_of
from deployments.router.waiting import Ticket
from llm.serving.schemas import GenerationRequest

logger = logging.getLogger("ray.serve")

_FIRST_GUESS_OUTPUT_TOKENS = 256.0
_OUTPUT_MEMORY = 0.99


class Journal:
    """Every live generation of a router, by the number under which its tokens arrive.

    Args:
        client: the engine replicas.
        fleet: this router's view of them.
        dispatcher: says where a request goes, and when.
        channel: where tokens arrive; None to rely only on replies.
        fingerprint: the version of the model that requests are for; may be changed.
        max_resumes: how often a request may continue elsewhere after a failure; 0 turns failover off.
        on_over: called for every request that has ended, in whatever way.
        on_move: called with the replica whose stream continues elsewhere.
        on_failed_call: called with the replica that failed a call, and why; returns whether something is wrong with it.
        history: is told when tokens arrive.
        meter: counts what requests use; None to count nothing.
    """

    def __init__(
        self,
        client: EngineClient,
        fleet: Fleet,
        dispatcher: Dispatcher,
        channel: ChannelAddress | None,
        *,
        fingerprint: str,
        max_resumes: int,
        on_over: Callable[[FinishedRequest], None],
        on_move: Callable[[str | None], None],
        on_failed_call: Callable[[str, str], bool],
        history: History,
        meter: Meter | None = None,
    ) -> None:
        self._meter = meter
        self._history = history
        self._on_over = on_over
        self._on_move = on_move
        self.on_failed_call = on_failed_call
        self.client = client
        self.dispatcher = dispatcher
        self.channel = channel
        self.fingerprint = fingerprint
        self.max_resumes = max_resumes
        self.page_size = 16
        self.num_requests = 0
        self.num_resumes = 0
        self.num_moves = 0
        self._fleet = fleet
        self._live: dict[int, Generation] = {}
        self._is_shut_down = False
        self._stream_ids = itertools.count(1)
        self._mean_output_tokens = _FIRST_GUESS_OUTPUT_TOKENS

    @property
    def num_live(self) -> int:
        """Number of generations that run on a replica or wait for one."""
        return len(self._live)

    def start(
        self, requests: Sequence[GenerationRequest], caller: Caller, hashes: Mapping[int, Sequence[int]]
    ) -> GenerationGroup:
        """Begin an HTTP request's generations.

        Args:
            requests: what to generate.
            caller: who asks.
            hashes: what `prompt_hashes` returned for them.

        Raises:
            OverloadedError: too much waits already.
            ShuttingDownError: after `shut_down`.
        """
        self._check_is_up()
        self.dispatcher.check(sum(self.work_of(request) for request in requests), caller.timeout_s)
        num_tokens = num_prompt_tokens(requests)
        if caller.account is not None:
            caller.account.charge(num_tokens)
        metered = self._meter.open(caller.tenant, caller.sheet, num_tokens) if self._meter is not None else None
        group = GenerationGroup(requests, caller, self.page_size, hashes, metered)
        self.num_requests += len(requests)
        group.start(self)
        if caller.account is not None:
            caller.account.watch(group, caller.key_digest)
        return group

    def work_of(self, request: GenerationRequest) -> int:
        """Tokens of prompt and expected output: the work that it costs a replica."""
        output = min(request.max_new_tokens, round(self._mean_output_tokens)) if not request.gives_vector else 0
        return len(request.prompt_token_ids or ()) + output

    def claim(self, generation: Generation) -> Ticket:
        """Begin an attempt: get a number for its tokens, and a place in the queue for a replica.

        Raises:
            ShuttingDownError: after `shut_down`.
        """
        self._check_is_up()
        request, caller = generation.request, generation.group.caller
        key = RoutingKey(
            num_tokens=len(request.prompt_token_ids or ()) + len(generation.token_ids),
            block_hashes=generation.group.block_hashes(generation),
            session=session_key(caller.tenant, caller.session_id),
            adapter=request.adapter.digest if request.adapter is not None else "",
        )
        ticket = Ticket(
            next(self._stream_ids),
            key,
            num_work_tokens=self.work_of(request),
            tenant=caller.tenant,
            priority=caller.priority,
            num_output_tokens=len(generation.token_ids),
            is_resumed=generation.num_resumes > 0,
            is_suspect=generation.is_suspect,
            excluded=generation.failed_on,
        )
        self._live[ticket.stream_id] = generation
        self.dispatcher.enqueue(ticket)
        return ticket

    def release(self, generation: Generation, ticket: Ticket) -> None:
        """End the attempt; anything that still arrives under its number is dropped."""
        del self._live[ticket.stream_id]
        self.dispatcher.withdraw(ticket)
        if generation.end is not None and not generation.request.gives_vector:
            num_output = len(generation.token_ids)
            self._mean_output_tokens += (1 - _OUTPUT_MEMORY) * (num_output - self._mean_output_tokens)
        self._fleet.ended(ticket.stream_id)
        self.dispatcher.pump()

    def note_move(self, replica_id: str | None, *, is_failure: bool) -> None:
        """Note that a stream of this replica continues elsewhere, after a failure or because it was asked to leave."""
        if is_failure:
            self.num_resumes += 1
        else:
            self.num_moves += 1
        self._on_move(replica_id)

    def note_failure(self, generation: Generation, replica_id: str, why: str) -> Part:
        """Note that a replica has failed while it had the generation; see `Placement`."""
        if not self.on_failed_call(replica_id, why):
            return Part.BYSTANDER
        now = time.monotonic()
        assign_parts([generation, *self.on_replica(replica_id)], now)
        part = part_of(generation, now)
        assert part is not None, "assigned above"
        return part

    def note_arrivals(self, stream_ids: Iterable[int]) -> None:
        """Note that streams have arrived at the replica that they were sent to."""
        for stream_id in stream_ids:
            generation = self._live.get(stream_id)
            if generation is not None:
                generation.has_arrived = True

    def note_over(self, generation: Generation) -> None:
        """Note that a generation has ended, in whatever way."""
        timeline = generation.timeline
        if generation.last_token_at is None and timeline.first_token_at is not None and generation.token_ids:
            self._history.note_first_token(timeline.first_token_at - timeline.received_at)  # it came with the reply
        self._on_over(generation.finished())

    def move_streams(self, replica_id: str, why: str, *, is_failure: bool) -> None:
        """Have the requests on a replica continue elsewhere. No effect if failover is off."""
        generations = [generation for generation in self.on_replica(replica_id) if not generation.is_leaving]
        if not self.max_resumes or not generations:
            return
        logger.warning("replica %s: %s; its %d streams continue elsewhere", replica_id, why, len(generations))
        if is_failure:
            assign_parts(generations, time.monotonic())
        for generation in generations:
            generation.leave_replica(why, is_failure=is_failure)

    def shut_down(self) -> None:
        """End every live generation with `ShuttingDownError`, and begin no more."""
        self._is_shut_down = True
        for generation in list(self._live.values()):
            generation.end_with(ShuttingDownError())

    def _check_is_up(self) -> None:
        if self._is_shut_down:
            raise ShuttingDownError

    @property
    def adapters(self) -> set[str]:
        """Digests of the adapters of all live generations."""
        requests = (generation.request for generation in self._live.values())
        return {request.adapter.digest for request in requests if request.adapter is not None}

    def on_replica(self, replica_id: str) -> Iterator[Generation]:
        """Generations that run on a replica, as far as known."""
        return (generation for generation in list(self._live.values()) if generation.replica_id == replica_id)

    def take_items(self, replica_id: str, items: Sequence[TokenItem]) -> None:
        """Hand tokens from the channel to their generations."""
        live, now = self._live, time.monotonic()
        gaps: list[float] = []
        for item in items:
            generation = live.get(item.stream_id)
            if generation is not None:
                if generation.timeline.first_token_at is None:
                    self._fleet.prefilled(item.stream_id)
                if item.end is not None:  # reports use the same channel: the next one leaves it out
                    self._fleet.ended(item.stream_id)
                generation.take_item(item, replica_id)
                if item.token_ids:
                    self._note_arrival(generation, now, gaps)
                if (item.token_ids or item.end) and (generation.is_suspect or generation.part is not None):
                    generation.clear()
                    self.dispatcher.clear(item.stream_id)
                    self.dispatcher.pump()
        if gaps:
            self._history.note_gaps(*gaps)

    def _note_arrival(self, generation: Generation, now: float, gaps: list[float]) -> None:
        """Note new tokens: tell the history of the first ones, and add the time since the last ones to `gaps`."""
        last_at = generation.last_token_at
        if last_at is not None:
            gaps.append(now - last_at)
        elif generation.timeline.first_token_at is not None:
            self._history.note_first_token(now - generation.timeline.received_at)
        else:  # what it waits for comes only with the reply
            return
        generation.last_token_at = now
