"""One request on its way through the engines."""

import asyncio
import logging
import time
from collections.abc import Sequence

from deployments.channel.messages import (
    End,
    EngineTiming,
    Failure,
    FailureKind,
    GenerateCall,
    GenerateReply,
    Refusal,
    TokenItem,
    decode_reply,
    encode,
)
from deployments.errors import AdapterUnavailableError, ReplicaLostError
from deployments.fleet.engine_client import EngineClient, is_being_cancelled
from deployments.observe.finished_request import FinishedRequest, Timeline
from deployments.router.surroundings import Placement, Siblings
from deployments.router.suspicion import Part
from deployments.router.waiting import Ticket
from llm.errors import EngineError, InvalidRequestError, LLMError
from llm.serving.schemas import AdapterFailure, FinishReason, GenerationRequest, TokenLogprobs

logger = logging.getLogger("ray.serve")

_Placement = Placement["Generation"]

_RESUME_DELAY_S = 0.05
_INLINE_TOKENS = 4096
"""Calls with prompts of up to this many tokens are encoded at once; longer ones in a thread."""
_ADAPTER_FAILURES = frozenset(map(str, AdapterFailure))
_MAX_DECLINED = 200
"""How often in a row replicas may decline a request; it normally finds a replica within a few attempts."""


class Generation:
    """One request on its way through the engines. Lives on the router's event loop.

    Tokens come from the token channel as they are made, and again, in full, with the reply to the call. If the replica
    dies, stalls or is taken away, the request continues on another one after the tokens received so far.

    Attributes:
        group: the generations that answer the same HTTP request; removed once the task of this one has ended.
        index: its place in the group.
        token_ids: all tokens so far.
        logprobs: one entry for each of `token_ids` if the request asks for them.
        vector: the vector that its request gives, once it is there; as in `StepOutput`.
        prompt_logprobs: those of the prompt, if the request asks for them and once they are there; as in
            `GenerateReply`.
        end: how it ended, None while it runs.
        error: what went wrong; no further tokens will come, and `end` stays None.
        replica_id: where it runs, as far as known; None while it waits.
        num_resumes: how often it has continued elsewhere.
        is_suspect, has_arrived, part: see `Passenger`.
        failed_on: replicas that failed it; it never returns to one of them.
        timeline: when things happened.
        last_token_at: when its last tokens arrived, by the monotonic clock; `Journal` writes it.
    """

    def __init__(self, group: "Siblings[Generation]", index: int, request: GenerationRequest) -> None:
        self.group = group
        self.index = index
        self.request = request
        self.token_ids: list[int] = list(request.output_token_ids)
        self.logprobs: list[TokenLogprobs] = []
        self.vector: bytes | None = None
        self.prompt_logprobs: bytes | None = None
        self.end: End | None = None
        self.error: LLMError | None = None
        self.replica_id: str | None = None
        self.num_resumes = 0
        self.is_suspect = False
        self.has_arrived = False
        self.part: tuple[Part, float] | None = None
        self.failed_on: frozenset[str] = frozenset()
        now = time.monotonic()
        self.timeline = Timeline(group.caller.received_at or now, now)
        self.last_token_at: float | None = None
        self._num_charged = len(self.token_ids)
        self._is_announced = False
        self._leaving: Failure | None = None
        self._has_started = self._is_given_up = False
        self._num_failures = 0
        self._num_declined = 0
        self._ticket: Ticket | None = None
        self._task: asyncio.Task[None] | None = None
        self._call: asyncio.Task[GenerateReply] | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self.end is not None or self.error is not None

    def start(self, placement: _Placement) -> None:
        """Send it to a replica, once one has room. Even one that has been given up has to start, to end in order."""
        self._has_started = True
        if not self.group.must_wait(self):
            self._ticket = placement.claim(self)  # now, so that the next admission counts it
        self._task = asyncio.get_running_loop().create_task(self._drive(placement))
        self._task.add_done_callback(lambda _: self._end(placement))
        if self._is_given_up:
            self._task.cancel()

    def cancel(self) -> None:
        """Give it up; the engine drops it within a step. No effect once it has ended."""
        self._is_given_up = True
        if self._task is not None and self.end is None:
            self._task.cancel()

    def end_with(self, error: LLMError) -> None:
        """Give it up and tell its reader why. No effect once it has ended or been given up."""
        if (self._task is not None or not self._has_started) and not self.is_over:
            self._fail(error)
            self.cancel()

    @property
    def is_leaving(self) -> bool:
        """Whether it has been told to continue elsewhere."""
        return self._leaving is not None

    def leave_replica(self, why: str, *, is_failure: bool) -> None:
        """Continue elsewhere. No effect while it is on no replica, or a second time.

        Args:
            why: the reason, for the log.
            is_failure: the replica has failed; otherwise it is being taken away.
        """
        if self._call is not None and self._leaving is None and not self.is_over:
            self._leaving = Failure(FailureKind.FAILED if is_failure else FailureKind.LEAVING, why)
            self._call.cancel()

    def clear(self) -> None:
        """Note that it got a token where it runs, so it is no longer a suspect."""
        self.is_suspect = False
        self.part = None

    def finished(self) -> FinishedRequest:
        """What metrics, traces and the log are told about it once it has ended."""
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
            adapter=self.request.adapter.name if self.request.adapter is not None else "",
        )

    def take_item(self, item: TokenItem, replica_id: str) -> None:
        """Add what the token channel brought. After a gap that only the reply can fill, later items are left out."""
        self.replica_id = replica_id
        # The reply brings what the channel does not, including the end.
        if self.request.gives_vector or self.request.prompt_logprobs is not None:
            return
        known = len(self.token_ids)
        skip = known - item.offset
        if skip < 0 or self.is_over:
            return
        if skip < len(item.token_ids):
            self.token_ids.extend(item.token_ids[skip:] if skip else item.token_ids)
            self.group.note_tokens(len(item.token_ids) - skip)
            if item.logprobs is not None:
                self.logprobs.extend(item.logprobs[skip:])
        elif item.end is None:
            return
        if self.timeline.first_token_at is None:
            self._note_first_token(item.timing)
        self._finish(item.end)
        self.announce()

    def announce(self) -> None:
        """Tell the group that there is news; do so only once until the news is collected."""
        if not self._is_announced:
            self._is_announced = True
            self.group.wake_up(self)

    def mark_collected(self) -> None:
        """Note that the group's reader now handles this generation; later news is announced again."""
        self._is_announced = False

    async def _drive(self, placement: _Placement) -> None:
        """Call replicas until the request has ended."""
        try:
            await self.group.wait_for_turn(self)
            while not self.is_over:
                await self._attempt(placement)
        except LLMError as error:
            self._fail(error)
        except Exception as error:
            logger.exception("request %s failed", self.request.request_id)
            self._fail(EngineError(f"the request failed ({type(error).__name__})"))

    async def _attempt(self, placement: _Placement) -> None:
        """Make one call to one replica. On return the request has ended or is ready to continue elsewhere."""
        if self._ticket is None:
            self._ticket = placement.claim(self)
        try:
            ranking = await self._ticket.ranking
            self._leaving, self.has_arrived, self.part = None, False, None
            self.replica_id = ranking[0]
            if self.timeline.placed_at is None:
                self.timeline.placed_at = time.monotonic()
            failure = await self._run_on(placement, self._ticket.stream_id, ranking)
        finally:
            last_replica_id, self.replica_id = self.replica_id, None
            self._release(placement)
        if failure is not None and not self.is_over:
            await self._prepare_resume(placement, last_replica_id, failure)

    async def _run_on(self, placement: _Placement, stream_id: int, ranking: Sequence[str]) -> Failure | None:
        """Run on the first replica that takes it; returns why the request has to continue elsewhere, if it has to."""
        call = GenerateCall.of(
            self._remaining_request(),
            stream_id,
            placement.channel,
            placement.fingerprint,
            is_suspect=self.is_suspect,
        )
        self._call = asyncio.ensure_future(self._send(placement.client, call, ranking))
        try:
            reply = await self._call
        except ReplicaLostError as error:
            return Failure(FailureKind.FAILED, str(error))
        except asyncio.CancelledError:
            if self._leaving is None or is_being_cancelled():  # it may be given up at the same time
                raise
            return self._leaving
        finally:
            self._call = None
        if reply.refusal is not None:
            raise _error_of(reply.refusal)
        self._absorb(reply)
        if reply.failure is not None:
            self.replica_id = reply.replica_id
            self.has_arrived = reply.failure.kind is FailureKind.FAILED
        return reply.failure

    async def _send(self, client: EngineClient, call: GenerateCall, ranking: Sequence[str]) -> GenerateReply:
        num_tokens = len(self.request.prompt_token_ids or ())
        if self.request.gives_vector:
            return await self.group.batches.generate(client, call, ranking, num_tokens)
        if num_tokens <= _INLINE_TOKENS:
            data = encode(call)
        else:  # many answers to one long prompt are sent at the same time
            data = await asyncio.to_thread(encode, call)
        return decode_reply(await client.generate(data, ranking))

    async def _prepare_resume(self, placement: _Placement, replica_id: str | None, failure: Failure) -> None:
        """Prepare to continue elsewhere.

        Raises:
            EngineError: it must not.
        """
        if 0 < self.request.max_new_tokens <= len(self.token_ids):  # only the report of the end was lost
            self._finish(End(FinishReason.LENGTH))
            self.announce()
            return
        if failure.kind is FailureKind.DECLINED:
            await self._wait_after_declined()
            return
        has_failed = failure.kind is FailureKind.FAILED
        if has_failed and replica_id is not None:
            self._take_part(placement, replica_id, failure.message)
        self.num_resumes += 1
        self._num_declined = 0
        placement.note_move(replica_id, is_failure=has_failed)
        logger.warning(
            "request %s continues elsewhere after %d tokens: %s",
            self.request.request_id, len(self.token_ids), failure.message,
        )  # fmt: skip
        if has_failed and self._leaving is None:
            await asyncio.sleep(_RESUME_DELAY_S * self.num_resumes)

    async def _wait_after_declined(self) -> None:
        self._num_declined += 1
        if self._num_declined > _MAX_DECLINED:
            raise EngineError("no engine replica accepts the request")
        await asyncio.sleep(_RESUME_DELAY_S)

    def _take_part(self, placement: _Placement, replica_id: str, why: str) -> None:
        """Note that a replica has failed while it had this request.

        Raises:
            EngineError: the request has failed several replicas, or has been resumed too often.
        """
        part = placement.note_failure(self, replica_id, why)
        if part is Part.CULPRIT:
            raise EngineError("the request failed on several engine replicas; it is not tried on another one")
        is_bystander = part is Part.BYSTANDER
        if not placement.max_resumes or (self._num_failures >= placement.max_resumes and not is_bystander):
            raise EngineError("the engine replica was lost and the request could not be resumed")
        if not is_bystander:
            self._num_failures += 1
            self.failed_on |= {replica_id}
            self.is_suspect = True

    def _end(self, placement: _Placement) -> None:
        self._release(placement)
        self._charge()
        placement.note_over(self)
        self.group.note_over()
        # Group and generations refer to each other. Prompts and tokens would otherwise wait for the garbage collector.
        self._task = None
        del self.group

    def _charge(self) -> None:
        """Charge what was generated since the last time to the caller's account."""
        account = self.group.caller.account
        if account is not None:
            account.charge(len(self.token_ids) - self._num_charged)
            self._num_charged = len(self.token_ids)

    def _release(self, placement: _Placement) -> None:
        """Give up what was claimed for the present attempt."""
        if self._ticket is not None:
            placement.release(self, self._ticket)
            self._ticket = None

    def _remaining_request(self) -> GenerationRequest:
        if not self.num_resumes and not self._num_declined:
            return self.request
        # A new id, because an engine presumed lost may still run the old one.
        request_id = f"{self.request.request_id}-{self.num_resumes}-{self._num_declined}"
        return self.request.model_copy(update={"request_id": request_id, "output_token_ids": tuple(self.token_ids)})

    def _absorb(self, reply: GenerateReply) -> None:
        """Add what the channel did not bring."""
        missing = len(reply.token_ids) - len(self.token_ids)
        if missing > 0:
            self.token_ids.extend(reply.token_ids[-missing:])
            self.group.note_tokens(missing)
            if reply.logprobs is not None:
                self.logprobs.extend(reply.logprobs[-missing:])
        if reply.vector is not None:
            self.vector = reply.vector
        if reply.prompt_logprobs is not None:
            self.prompt_logprobs = reply.prompt_logprobs
        if (missing > 0 or reply.vector is not None) and self.timeline.first_token_at is None:
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


def _error_of(refusal: Refusal) -> LLMError:
    if refusal.code in _ADAPTER_FAILURES:
        return AdapterUnavailableError(refusal.message, refusal.code)
    return InvalidRequestError(refusal.message, param=refusal.param, code=refusal.code)
