"""One request on its way through the engines, and the group of those that answer one HTTP request."""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deployments.channel.messages import End, EngineTiming, GenerateCall, GenerateReply, TokenItem, decode_reply, encode
from deployments.errors import DeadlineError, ReplicaLostError
from deployments.router.accounts import Account
from deployments.router.waiting import Ticket
from deployments.serve.engine_client import is_being_cancelled
from llm.errors import EngineError, InvalidRequestError, LLMError
from llm.serving.schemas import FinishReason, GenerationRequest, TokenLogprobs

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from deployments.router.journal import GenerationGroup, Journal

logger = logging.getLogger("ray.serve")

_RESUME_DELAY_S = 0.05


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and how urgently.

    Attributes:
        tenant: whose share the request counts on; "" where there are no keys.
        priority: lower goes first.
        timeout_s: how long the client waits for the whole answer; None for as long as it takes.
        received_at: when the HTTP request came, by the monotonic clock; None for now.
        account: where its tokens are counted; None where there are no keys.
        span: the HTTP request's in its trace; None where there are no traces.
        request_id: the HTTP request's `X-Request-ID`, for the log.
    """

    tenant: str = ""
    priority: int = 0
    timeout_s: float | None = None
    received_at: float | None = None
    account: Account | None = None
    span: "Span | None" = None
    request_id: str = ""


@dataclass(slots=True)
class Timeline:
    """When things happened to a request, by the monotonic clock, and how long the engine took; None for not yet."""

    received_at: float
    started_at: float
    """Parsed, tokenised and admitted."""
    placed_at: float | None = None
    """Sent to a replica, the first time."""
    first_token_at: float | None = None
    ended_at: float | None = None
    engine: EngineTiming | None = None

    def phases_ms(self) -> dict[str, float]:
        """Milliseconds in each phase that is over: route, queue, prefill, relay, decode."""
        phases = {"route": self.started_at - self.received_at}
        if self.placed_at is not None and self.first_token_at is not None:
            engine = self.engine or EngineTiming(0.0, self.first_token_at - self.placed_at)
            phases["queue"] = self.placed_at - self.started_at + engine.queue_s
            phases["prefill"] = engine.prefill_s
            phases["relay"] = max(0.0, self.first_token_at - self.placed_at - engine.queue_s - engine.prefill_s)
            if self.ended_at is not None:
                phases["decode"] = self.ended_at - self.first_token_at
        return {name: round(1000 * seconds, 3) for name, seconds in phases.items()}


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

    def __init__(self, group: "GenerationGroup", index: int, request: GenerationRequest) -> None:
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
        self._call: asyncio.Task[bytes] | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self.end is not None or self.error is not None

    def start(self, journal: "Journal") -> None:
        """Send it to a replica, once one has room."""
        if not self.group.shares_prompt(self):
            self._ticket = journal.claim(self)  # now, so that what is admitted next counts it
        self._task = asyncio.get_running_loop().create_task(self._drive(journal))
        self._task.add_done_callback(lambda _: self._end(journal))

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

    async def _drive(self, journal: "Journal") -> None:
        """Call replicas until the request is over."""
        try:
            await self.group.wait_for_shared_prompt(self)
            while not self.is_over:
                await self._attempt(journal)
        except LLMError as error:
            self._fail(error)
        except Exception as error:
            logger.exception("request %s failed", self.request.request_id)
            self._fail(EngineError(f"the request failed ({type(error).__name__})"))

    async def _attempt(self, journal: "Journal") -> None:
        """One call to one replica. Returns with the request over, or ready to go on elsewhere."""
        if self._ticket is None:
            self._ticket = journal.claim(self)
        try:
            ranking = await self._ticket.ranking
            self.replica_id = ranking[0]
            if self.timeline.placed_at is None:
                self.timeline.placed_at = time.monotonic()
            failure = await self._run_on(journal, self._ticket.stream_id, ranking)
        finally:
            last_replica_id, self.replica_id = self.replica_id, None
            self._release(journal)
        if failure is not None and not self.is_over:
            await self._prepare_resume(journal, last_replica_id, failure)

    async def _run_on(self, journal: "Journal", stream_id: int, ranking: Sequence[str]) -> str | None:
        """Run on the first replica that takes it; returns why the request has to go on elsewhere, if it has to."""
        call = encode(GenerateCall.of(self._remaining_request(), stream_id, journal.channel))
        self._is_leaving = False
        self._call = asyncio.ensure_future(journal.client.generate(call, ranking))
        try:
            reply = decode_reply(await self._call)
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

    async def _prepare_resume(self, journal: "Journal", replica_id: str | None, failure: str) -> None:
        """Get ready to go on elsewhere.

        Raises:
            EngineError: it has gone on too often already.
        """
        if len(self.token_ids) >= self.request.max_new_tokens:  # only the news of the end was lost
            self._finish(End(FinishReason.LENGTH))
            self.announce()
            return
        if self._is_leaving:
            journal.num_moves += 1
        elif self.num_resumes >= journal.max_resumes:
            raise EngineError("the engine replica was lost and the request could not be resumed")
        else:
            journal.num_resumes += 1
        self.num_resumes += 1
        journal.on_move(replica_id)
        logger.warning(
            "request %s goes on elsewhere behind %d tokens: %s",
            self.request.request_id, len(self.token_ids), failure,
        )  # fmt: skip
        if not self._is_leaving:
            await asyncio.sleep(_RESUME_DELAY_S * self.num_resumes)

    def _end(self, journal: "Journal") -> None:
        self._release(journal)
        self._charge()
        journal.on_over(self)
        # Group and generations refer to each other. Left so, prompts and tokens would wait for the garbage collector.
        self._task = None
        del self.group

    def _charge(self) -> None:
        """Count what was generated since the last time on the caller's account."""
        account = self.group.caller.account
        if account is not None:
            account.charge(len(self.token_ids) - self._num_charged)
            self._num_charged = len(self.token_ids)

    def _release(self, journal: "Journal") -> None:
        """Give up what was claimed for the present attempt."""
        if self._ticket is not None:
            journal.release(self._ticket)
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
        self.timeline.engine = timing
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
