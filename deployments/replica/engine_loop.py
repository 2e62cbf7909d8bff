"""`EngineLoop`: the one thread that owns a replica's engine."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from deployments.channel.messages import (
    ChannelAddress,
    End,
    Failure,
    FailureKind,
    GenerateReply,
    Machine,
    Refusal,
)
from deployments.channel.sender import TokenSender
from deployments.replica.engine_factory import Engine
from deployments.replica.loop_health import LoopHealth
from deployments.replica.open_request import OpenRequest
from deployments.replica.own_request import own_request
from llm.errors import EngineError, InvalidRequestError
from llm.serving.schemas import (
    EngineStats,
    FinishReason,
    GenerationRequest,
    StepFailure,
    StepOutput,
    TokenLogprobs,
)

logger = logging.getLogger(__name__)

REPORT_INTERVAL_S = 0.1
_MAX_FAILED_STEPS = 3
"""Consecutive failed steps after which the engine counts as broken."""
_SHUTTING_DOWN = "the replica is shutting down"
_ROUTER_IS_GONE = "the token channel to the router was lost"
_PROBE_NEW_TOKENS = 2
_MAX_NEW_TOKENS_BETWEEN_STEPS = 65_536
"""Once this many prompt tokens have begun, further requests begin after the next step, so that running ones do not
wait."""
_SUSPECT_HEAD_START_S = 0.002
"""The report that a suspect has arrived must leave the process before the suspect can end it."""


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A request as it arrived; see `EngineLoop.generate`."""

    request: GenerationRequest
    stream_id: int
    channel: ChannelAddress | None
    resolve: Callable[[GenerateReply], None]
    is_suspect: bool


@dataclass(slots=True)
class _Commands:
    """Commands of other threads to the loop, in order."""

    pending: deque[Callable[[], object]] = field(default_factory=deque)
    wake_up: threading.Event = field(default_factory=threading.Event)


class EngineLoop:
    """Runs an engine on a thread of its own; all methods except `_…` ones may be called from any thread.

    Every request that is submitted gets exactly one reply, unless it is aborted. Requests whose step fails are answered
    with a failure, since another replica may continue them. After a failed step the engine proves itself with a short
    request of its own; after some failures in a row, or at once when its device is lost, it breaks down for good.

    Args:
        engine: nobody else may touch it from now on.
        replica_id: goes with every reply and report.
        sender: where tokens go as they are generated; the loop's thread owns it.
        fingerprint: identifies the model version; it goes with every report.
        machine: says where the replica runs; it goes with every report, too.
    """

    def __init__(
        self,
        engine: Engine,
        replica_id: str,
        sender: TokenSender | None = None,
        *,
        fingerprint: str = "",
        machine: Callable[[], Machine | None] = lambda: None,
    ) -> None:
        self.health = LoopHealth()
        self.latest_stats: EngineStats = engine.stats()
        self._engine = engine
        self._replica_id = replica_id
        self._sender = sender or TokenSender(replica_id)
        self._fingerprint = fingerprint
        self._machine = machine
        self._open: dict[str, OpenRequest] = {}
        self._suspect: str | None = None
        self._waiting_suspects: deque[_Arrival] = deque()
        self._broken: Failure | None = None
        self._num_probes = 0
        self._commands = _Commands()
        self._num_new_tokens = 0
        """Prompt tokens of the requests that have begun since the last step."""
        self._is_stopping = False
        self._next_report_at = 0.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread and return once it has ended; open requests get a failure."""
        self._is_stopping = True
        self._commands.wake_up.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    async def generate(
        self,
        request: GenerationRequest,
        stream_id: int = 0,
        channel: ChannelAddress | None = None,
        *,
        is_suspect: bool = False,
    ) -> GenerateReply:
        """Run a request to its end. Cancelling this aborts it in the engine.

        Args:
            request: what to run.
            stream_id: the router's number for it.
            channel: where to push its tokens; None for the reply alone.
            is_suspect: whether another replica failed while running it. It begins once every other suspect here has a
                token, so that only one suspect can be the cause of a failure.
        """
        if self._is_stopping:
            return self._failed(list(request.output_token_ids), Failure(FailureKind.LEAVING, _SHUTTING_DOWN))
        loop = asyncio.get_running_loop()
        future: asyncio.Future[GenerateReply] = loop.create_future()

        def resolve(reply: GenerateReply) -> None:
            loop.call_soon_threadsafe(_set_unless_done, future, reply)

        arrival = _Arrival(request, stream_id, channel, resolve, is_suspect)
        self._do(lambda: self._add(arrival))
        try:
            return await future
        except asyncio.CancelledError:
            self._do(lambda: self._abort(request.request_id))
            raise

    def attach(self, channel: ChannelAddress) -> None:
        """Report to this router from now on, even if it sends no requests."""
        self._do(lambda: self._attach(channel))

    def forget_adapters(self, digests: Sequence[str]) -> None:
        """Have the engine give up adapters as soon as no request uses them."""
        for digest in digests:
            self._do(partial(self._engine.unload_adapter, digest))

    def _do(self, command: Callable[[], object]) -> None:
        """Have the loop's thread run `command` before its next step."""
        self._commands.pending.append(command)
        self._commands.wake_up.set()

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                self._obey()
                if self._engine.failure is not None:  # this may happen without a failed step
                    raise EngineError(self._engine.failure)
                if self._engine.scheduler.has_pending_work:
                    self._step()
                else:
                    self._report()
                    self._commands.wake_up.wait(REPORT_INTERVAL_S)
        except Exception as error:
            logger.exception("the engine broke down")
            self._break_down(Failure(FailureKind.FAILED, f"{type(error).__name__}: {error}"))
        else:
            self._break_down(Failure(FailureKind.LEAVING, _SHUTTING_DOWN))
        self._engine.close()
        while not self._is_stopping:  # the health check fails by now; requests that still arrive are answered
            self._commands.wake_up.wait(REPORT_INTERVAL_S)
            self._obey()
            self._report()
        self._obey()
        self._sender.close()

    def _obey(self) -> None:
        """Run other threads' commands in order; those after many new prompt tokens wait for the next time."""
        self._commands.wake_up.clear()
        self._num_new_tokens = 0
        while self._commands.pending:
            if self._num_new_tokens >= _MAX_NEW_TOKENS_BETWEEN_STEPS:
                self._commands.wake_up.set()
                break
            self._commands.pending.popleft()()
        while self._waiting_suspects and self._suspect is None:
            self._begin(self._waiting_suspects.popleft())

    def _step(self) -> None:
        self.health.busy_since = time.monotonic()
        outputs = self._engine.step()
        self.health.busy_since = None
        failed = next((output for output in outputs if output.step_failure is not None), None)
        if failed is not None:
            self.health.num_failed_steps += 1
            self._next_report_at = 0.0
            self._report()  # before the requests are answered: nothing new may arrive here
        elif any(output.token_ids or output.vector for output in outputs):
            self.health.num_failed_steps = 0
        for output in outputs:
            self._take(output)
        self._sender.flush()
        if failed is not None:
            self._recover(failed)
        self._report()

    def _recover(self, failed: StepOutput) -> None:
        """Have the engine prove that it can still step.

        Raises:
            EngineError: it has failed too often, or its device is lost.
        """
        num_failed = self.health.num_failed_steps
        if failed.step_failure is StepFailure.DEVICE:
            raise EngineError(f"the device is lost: {failed.error}")
        if num_failed >= _MAX_FAILED_STEPS:
            raise EngineError(f"{num_failed} steps failed one after the other, the last with {failed.error}")
        logger.error("a step failed, %d in a row: %s", num_failed, failed.error)
        self._num_probes += 1
        probe = own_request(
            self._engine, num_prompt_tokens=1, max_new_tokens=_PROBE_NEW_TOKENS, request_id=f"probe-{self._num_probes}"
        )
        self._engine.add_request(probe)

    def _take(self, output: StepOutput) -> None:
        """Send a request's new tokens and, at its end, resolve it."""
        request = self._open.get(output.request_id)
        if request is None:  # aborted while the step ran, or a probe
            return
        if output.step_failure is not None:
            self._fail(output.request_id, request, Failure(FailureKind.FAILED, output.error or "a step failed"))
            return
        if output.adapter_failure is not None:
            refusal = Refusal(output.error or "the adapter cannot be loaded", "model", output.adapter_failure)
            self._answer(output.request_id, request, GenerateReply(self._replica_id, refusal=refusal))
            return
        if output.request_id == self._suspect:
            self._suspect = None
        end = request.take(output)
        if end is not None:
            self._answer(output.request_id, request, request.reply(self._replica_id, end, output.vector))

    def _answer(self, request_id: str, request: OpenRequest, reply: GenerateReply) -> None:
        """Let go of a request and resolve it."""
        self._forget(request_id)
        if request.stream is not None:
            request.stream.close()
        request.resolve(reply)

    def _fail(self, request_id: str, request: OpenRequest, failure: Failure) -> None:
        """Answer with a failure a request that another replica may continue."""
        self._answer(request_id, request, self._failed(request.token_ids, failure, request.logprobs))

    def _failed(
        self, token_ids: list[int], failure: Failure, logprobs: list[TokenLogprobs] | None = None
    ) -> GenerateReply:
        return GenerateReply(self._replica_id, token_ids, logprobs, failure=failure)

    def _forget(self, request_id: str) -> OpenRequest | None:
        if request_id == self._suspect:
            self._suspect = None
        return self._open.pop(request_id, None)

    def _add(self, arrival: _Arrival) -> None:
        if self._broken is not None:
            arrival.resolve(self._failed(list(arrival.request.output_token_ids), self._broken))
        elif arrival.is_suspect and self._suspect is not None:
            self._waiting_suspects.append(arrival)
        else:
            self._begin(arrival)

    def _begin(self, arrival: _Arrival) -> None:
        """Give a request to the engine; routers are told that a suspect has arrived before it can do anything."""
        request = arrival.request
        self._num_new_tokens += len(request.prompt_token_ids or request.prompt or ())
        try:
            self._engine.add_request(request)
        except InvalidRequestError as error:
            arrival.resolve(GenerateReply(self._replica_id, refusal=Refusal(str(error), error.param, error.code)))
            return
        num_output, stream = len(request.output_token_ids), None
        if arrival.channel is not None:
            on_lost = partial(self._give_up, request.request_id)
            stream = self._sender.open(arrival.stream_id, arrival.channel, num_output, on_lost)
        self._open[request.request_id] = OpenRequest(arrival.resolve, list(request.output_token_ids), stream)
        if arrival.is_suspect:
            self._suspect = request.request_id
            self._next_report_at = 0.0
            self._report()
            time.sleep(_SUSPECT_HEAD_START_S)

    def _decline_waiting_suspects(self, request_id: str | None = None) -> None:
        """Answer suspects that have not begun: all of them, or only one that is given up."""
        for arrival in list(self._waiting_suspects):
            if request_id in (None, arrival.request.request_id):
                self._waiting_suspects.remove(arrival)
                failure = Failure(FailureKind.DECLINED, "the request has not begun")
                arrival.resolve(self._failed(list(arrival.request.output_token_ids), failure))

    def _attach(self, channel: ChannelAddress) -> None:
        self._sender.attach(channel)
        self._next_report_at = 0.0

    def _abort(self, request_id: str) -> None:
        self._decline_waiting_suspects(request_id)
        request = self._forget(request_id)
        if request is None:
            return
        self._engine.abort(request_id)
        reply = GenerateReply(self._replica_id, request.token_ids, end=End(FinishReason.ABORT))
        self._answer(request_id, request, reply)

    def _give_up(self, request_id: str) -> None:
        """Stop generating for a router that is gone; if it is alive after all, it may continue elsewhere."""
        request = self._forget(request_id)
        if request is None:
            return
        self._engine.abort(request_id)
        self._fail(request_id, request, Failure(FailureKind.LEAVING, _ROUTER_IS_GONE))

    def _report(self) -> None:
        """Report the engine's state to the routers a few times a second."""
        now = time.monotonic()
        if now < self._next_report_at:
            return
        self._next_report_at = now + REPORT_INTERVAL_S
        self.latest_stats = self._engine.stats()
        pool = self._engine.scheduler.pool
        condition = self.health.condition(self._fingerprint, self._machine())
        self._sender.report(self.latest_stats, pool.take_changes(), pool.content, condition)

    def _break_down(self, failure: Failure) -> None:
        """Answer all open requests with the failure, and every later one too."""
        self._broken = failure
        self.health.failure = failure.message
        self.health.has_shut_down = failure.kind is FailureKind.LEAVING
        self.health.busy_since = None
        self._next_report_at = 0.0
        self._report()
        for request_id, request in list(self._open.items()):
            self._fail(request_id, request, failure)
        self._decline_waiting_suspects()


def _set_unless_done(future: "asyncio.Future[GenerateReply]", reply: GenerateReply) -> None:
    if not future.done():
        future.set_result(reply)
