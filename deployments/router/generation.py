"""One request on its way through the engines."""

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Protocol

from deployments.channel.messages import (
    ChannelAddress,
    End,
    EngineTiming,
    GenerateCall,
    GenerateReply,
    TokenItem,
    decode_reply,
    encode,
)
from deployments.errors import DeadlineError, ReplicaLostError
from deployments.fleet.engine_client import EngineClient, is_being_cancelled
from deployments.observe.finished_request import FinishedRequest, Timeline
from deployments.router.caller import Caller
from deployments.router.waiting import Ticket
from llm.errors import EngineError, InvalidRequestError, LLMError
from llm.serving.schemas import FinishReason, GenerationRequest, TokenLogprobs

logger = logging.getLogger("ray.serve")

_RESUME_DELAY_S = 0.05
_INLINE_TOKENS = 4096


class Siblings(Protocol):
    """The generations that answer the same HTTP request, as one of them sees the group."""

    @property
    def caller(self) -> Caller:
        """Who sent the HTTP request."""
        ...

    def wake_up(self, generation: "Generation") -> None:
        """Tell the group's reader that a generation has news."""
        ...

    def shares_prompt(self, generation: "Generation") -> bool:
        """Whether the generation waits for another one's prompt."""
        ...

    async def wait_for_shared_prompt(self, generation: "Generation") -> None:
        """Wait until the generation's prompt has been prefilled, if another one sees to that."""
        ...

    def note_begun(self, generation: "Generation") -> None:
        """The generation has its first token, or never will."""
        ...

    def block_hashes(self, generation: "Generation") -> Sequence[int]:
        """What the replicas' reports call the full pages of the generation's prompt."""
        ...


class Placement(Protocol):
    """How a generation gets to the engine replicas."""

    @property
    def client(self) -> EngineClient:
        """Calls the replicas."""
        ...

    @property
    def channel(self) -> ChannelAddress | None:
        """Where tokens come in; None to live on replies alone."""
        ...

    @property
    def max_resumes(self) -> int:
        """How often a request may go on elsewhere after a failure."""
        ...

    def claim(self, generation: "Generation") -> Ticket:
        """Begin an attempt: a number for its tokens, and a place among those that wait for a replica."""
        ...

    def release(self, generation: "Generation", ticket: Ticket) -> None:
        """End an attempt."""
        ...

    def note_move(self, replica_id: str | None, *, is_failure: bool) -> None:
        """A stream of this replica goes on elsewhere."""
        ...

    def note_over(self, generation: "Generation") -> None:
        """The generation is over, in whatever way."""
        ...


class Generation:
    """One request on its way through the engines. Lives on the router's event loop.

    Tokens come from the token channel as they are made, and once more, in full, with the reply to the call. If the
    replica dies, stalls or is taken away, the request goes on in another one behind the tokens that have come so far.

    Attributes:
        group: those that answer the same HTTP request; gone once its task has ended.
        index: its place in the group.
        token_ids: all tokens so far.
        logprobs: one entry for each of `token_ids` where the request asks for them.
        end: how it ended, None while it runs.
        error: what went wrong, with no further tokens to come. `end` stays None.
        replica_id: where it runs, as far as known; None while it waits.
        timeline: when things happened.
    """

    def __init__(self, group: Siblings, index: int, request: GenerationRequest) -> None:
        self.group = group
        self.index = index
        self.request = request
        self.token_ids: list[int] = list(request.output_token_ids)
        self.logprobs: list[TokenLogprobs] = []
        self.end: End | None = None
        self.error: LLMError | None = None
        self.replica_id: str | None = None
        self.num_resumes = 0
        now = time.monotonic()
        self.timeline = Timeline(group.caller.received_at or now, now)
        self._num_charged = len(self.token_ids)
        self._is_announced = False
        self._is_leaving = False
        self._ticket: Ticket | None = None
        self._task: asyncio.Task[None] | None = None
        self._call: asyncio.Task[GenerateReply] | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self.end is not None or self.error is not None

    def start(self, placement: Placement) -> None:
        """Send it to a replica, once one has room."""
        if not self.group.shares_prompt(self):
            self._ticket = placement.claim(self)  # now, so that what is admitted next counts it
        self._task = asyncio.get_running_loop().create_task(self._drive(placement))
        self._task.add_done_callback(lambda _: self._end(placement))

    def cancel(self) -> None:
        """Give it up; the engine drops it within a step. No effect on one that is over."""
        if self._task is not None and self.end is None:
            self._task.cancel()

    def expire(self) -> None:
        """Its time is over. No effect on one that is, or has been given up."""
        if self._task is not None and not self.is_over:
            self._fail(DeadlineError("the request's timeout is over"))
            self.cancel()

    def leave_replica(self) -> None:
        """Go on elsewhere, though the replica has not failed. No effect while it is on none."""
        if self._call is not None and not self.is_over:
            self._is_leaving = True
            self._call.cancel()

    def finished(self) -> FinishedRequest:
        """What metrics, traces and the log are told of it once it is over."""
        caller = self.group.caller
        return FinishedRequest(
            http_request_id=caller.request_id,
            generation_id=self.request.request_id,
            tenant=caller.tenant,
            finish_reason=str(self.end.reason) if self.end is not None else None,
            error_type=type(self.error).__name__ if self.error is not None else None,
            num_prompt_tokens=len(self.request.prompt_token_ids or ()),
            num_output_tokens=len(self.token_ids),
            num_moves=self.num_resumes,
            timeline=self.timeline,
            span=caller.span,
        )

    def take_item(self, item: TokenItem, replica_id: str) -> None:
        """Add what the token channel brought. After a gap only the reply can fill, later items are left out."""
        self.replica_id = replica_id
        known = len(self.token_ids)
        skip = known - item.offset
        if skip < 0 or self.is_over:
            return
        if skip < len(item.token_ids):
            self.token_ids.extend(item.token_ids[skip:] if skip else item.token_ids)
            if item.logprobs is not None:
                self.logprobs.extend(item.logprobs[skip:])
        elif item.end is None:
            return
        if self.timeline.first_token_at is None:
            self._note_first_token(item.timing)
        self._finish(item.end)
        self.announce()

    def announce(self) -> None:
        """Tell the group that there is news, once until the news is collected."""
        if not self._is_announced:
            self._is_announced = True
            self.group.wake_up(self)

    def mark_collected(self) -> None:
        """The group's reader has this generation in hand; later news is announced again."""
        self._is_announced = False

    async def _drive(self, placement: Placement) -> None:
        """Call replicas until the request is over."""
        try:
            await self.group.wait_for_shared_prompt(self)
            while not self.is_over:
                await self._attempt(placement)
        except LLMError as error:
            self._fail(error)
        except Exception as error:
            logger.exception("request %s failed", self.request.request_id)
            self._fail(EngineError(f"the request failed ({type(error).__name__})"))

    async def _attempt(self, placement: Placement) -> None:
        """One call to one replica. Returns with the request over, or ready to go on elsewhere."""
        if self._ticket is None:
            self._ticket = placement.claim(self)
        try:
            ranking = await self._ticket.ranking
            self.replica_id = ranking[0]
            if self.timeline.placed_at is None:
                self.timeline.placed_at = time.monotonic()
            failure = await self._run_on(placement, self._ticket.stream_id, ranking)
        finally:
            last_replica_id, self.replica_id = self.replica_id, None
            self._release(placement)
        if failure is not None and not self.is_over:
            await self._prepare_resume(placement, last_replica_id, failure)

    async def _run_on(self, placement: Placement, stream_id: int, ranking: Sequence[str]) -> str | None:
        """Run on the first replica that takes it; returns why the request has to go on elsewhere, if it has to."""
        call = GenerateCall.of(self._remaining_request(), stream_id, placement.channel)
        self._is_leaving = False
        self._call = asyncio.ensure_future(self._send(placement.client, call, ranking))
        try:
            reply = await self._call
        except ReplicaLostError as error:
            return str(error)
        except asyncio.CancelledError:
            if not self._is_leaving or is_being_cancelled():  # it may be given up at the same time
                raise
            return f"it leaves replica {self.replica_id}"
        finally:
            self._call = None
        if reply.refusal is not None:
            raise InvalidRequestError(reply.refusal.message, param=reply.refusal.param, code=reply.refusal.code)
        self._absorb(reply)
        return reply.failure

    async def _send(self, client: EngineClient, call: GenerateCall, ranking: Sequence[str]) -> GenerateReply:
        if len(self.request.prompt_token_ids or ()) <= _INLINE_TOKENS:
            data = encode(call)
        else:  # many answers to one long prompt are sent at once
            data = await asyncio.to_thread(encode, call)
        return decode_reply(await client.generate(data, ranking))

    async def _prepare_resume(self, placement: Placement, replica_id: str | None, failure: str) -> None:
        """Get ready to go on elsewhere.

        Raises:
            EngineError: it has gone on too often already.
        """
        if len(self.token_ids) >= self.request.max_new_tokens:  # only the news of the end was lost
            self._finish(End(FinishReason.LENGTH))
            self.announce()
            return
        if not self._is_leaving and self.num_resumes >= placement.max_resumes:
            raise EngineError("the engine replica was lost and the request could not be resumed")
        self.num_resumes += 1
        placement.note_move(replica_id, is_failure=not self._is_leaving)
        logger.warning(
            "request %s goes on elsewhere behind %d tokens: %s",
            self.request.request_id, len(self.token_ids), failure,
        )  # fmt: skip
        if not self._is_leaving:
            await asyncio.sleep(_RESUME_DELAY_S * self.num_resumes)

    def _end(self, placement: Placement) -> None:
        self._release(placement)
        self._charge()
        placement.note_over(self)
        # Group and generations refer to each other. Left so, prompts and tokens would wait for the garbage collector.
        self._task = None
        del self.group

    def _charge(self) -> None:
        """Count what was generated since the last time on the caller's account."""
        account = self.group.caller.account
        if account is not None:
            account.charge(len(self.token_ids) - self._num_charged)
            self._num_charged = len(self.token_ids)

    def _release(self, placement: Placement) -> None:
        """Give up what was claimed for the present attempt."""
        if self._ticket is not None:
            placement.release(self, self._ticket)
            self._ticket = None

    def _remaining_request(self) -> GenerationRequest:
        if not self.num_resumes:
            return self.request
        # A new id: the engine that is thought lost may still run the old one.
        request_id = f"{self.request.request_id}-{self.num_resumes}"
        return self.request.model_copy(update={"request_id": request_id, "output_token_ids": tuple(self.token_ids)})

    def _absorb(self, reply: GenerateReply) -> None:
        """Add what the channel did not bring."""
        missing = len(reply.token_ids) - len(self.token_ids)
        if missing > 0:
            self.token_ids.extend(reply.token_ids[-missing:])
            if reply.logprobs is not None:
                self.logprobs.extend(reply.logprobs[-missing:])
            if self.timeline.first_token_at is None:
                self._note_first_token(reply.timing)
        if self.end is None and (missing > 0 or reply.end is not None):
            self._finish(reply.end)
            self.announce()

    def _note_first_token(self, timing: EngineTiming | None) -> None:
        self.timeline.first_token_at = time.monotonic()
        if timing is not None:
            self.timeline.engine_queue_s, self.timeline.engine_prefill_s = timing.queue_s, timing.prefill_s
        self.group.note_begun(self)

    def _finish(self, end: End | None) -> None:
        self.end = end
        if end is not None:
            self.timeline.ended_at = time.monotonic()
            self._charge()  # before the answer goes out, whose headers say what is left
            self.group.note_begun(self)

    def _fail(self, error: LLMError) -> None:
        if not self.is_over:
            self.error = error
            self.group.note_begun(self)
            self.announce()
