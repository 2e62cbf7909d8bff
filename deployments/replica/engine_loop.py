"""`EngineLoop`: the one thread that owns a replica's engine."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from deployments.channel.messages import (
    ChannelAddress,
    EmbedCall,
    EmbedReply,
    End,
    EngineTiming,
    GenerateReply,
    Refusal,
    end_of,
)
from deployments.channel.sender import OutgoingStream, TokenSender
from deployments.replica.engine_factory import EmbeddingWork, Engine
from llm.errors import EngineError, InvalidRequestError
from llm.serving.schemas import EngineStats, FinishReason, GenerationRequest, StepOutput, TokenLogprobs

logger = logging.getLogger(__name__)

REPORT_INTERVAL_S = 0.1
_ROUTER_IS_GONE = "the token channel to the router was lost"

Reply = TypeVar("Reply")


@dataclass(slots=True)
class _OpenRequest:
    """A request that the engine runs, and everything it has generated."""

    resolve: Callable[[GenerateReply], None]
    token_ids: list[int]
    stream: OutgoingStream | None
    logprobs: list[TokenLogprobs] | None = None
    received_at: float = field(default_factory=time.monotonic)
    timing: EngineTiming | None = None


@dataclass(slots=True)
class LoopHealth:
    """What a health check looks at. The loop writes, others read."""

    failure: str | None = None
    """Why the engine will never step again."""
    busy_since: float | None = None
    """When the step that now runs began, by the monotonic clock."""


@dataclass(slots=True)
class _Commands:
    """What other threads ask of the loop, in order."""

    pending: deque[Callable[[], None]] = field(default_factory=deque)
    wake_up: threading.Event = field(default_factory=threading.Event)


class EngineLoop:
    """Runs an engine on a thread of its own; everything here but `_…` methods may be called from any thread.

    Every request that is submitted gets exactly one reply, unless it is aborted.

    Args:
        engine: nobody else may touch it from now on.
        replica_id: goes with every reply and report.
        sender: where tokens go while they are made; the loop's thread owns it.
    """

    def __init__(self, engine: Engine, replica_id: str, sender: TokenSender | None = None) -> None:
        self.health = LoopHealth()
        self.latest_stats: EngineStats = engine.stats()
        self._engine = engine
        self._replica_id = replica_id
        self._sender = sender or TokenSender(replica_id)
        self._open: dict[str, _OpenRequest] = {}
        self._embeddings: deque[tuple[EmbeddingWork, asyncio.Future[EmbedReply], Callable[[EmbedReply], None]]] = (
            deque()
        )
        self._commands = _Commands()
        self._is_stopping = False
        self._next_report_at = 0.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; open requests get a failure. Returns when it is done."""
        self._is_stopping = True
        self._commands.wake_up.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    async def generate(
        self, request: GenerationRequest, stream_id: int = 0, channel: ChannelAddress | None = None
    ) -> GenerateReply:
        """Run a request to its end. Cancelling this aborts it in the engine.

        Raises:
            EngineError: the loop has been stopped.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[GenerateReply] = loop.create_future()
        if self._is_stopping:
            raise EngineError("the replica is shutting down")

        def resolve(reply: GenerateReply) -> None:
            loop.call_soon_threadsafe(_set_unless_done, future, reply)

        self._do(lambda: self._add(request, stream_id, channel, resolve))
        try:
            return await future
        except asyncio.CancelledError:
            self._do(lambda: self._abort(request.request_id))
            raise

    async def embed(self, call: EmbedCall) -> EmbedReply:
        """Compute a vector, a chunk between two steps.

        Raises:
            EngineError: the loop has been stopped.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[EmbedReply] = loop.create_future()
        if self._is_stopping:
            raise EngineError("the replica is shutting down")

        def resolve(reply: EmbedReply) -> None:
            loop.call_soon_threadsafe(_set_unless_done, future, reply)

        self._do(lambda: self._begin_embedding(call, future, resolve))
        return await future

    def attach(self, channel: ChannelAddress) -> None:
        """Report to this router from now on, whether or not it sends requests."""
        self._do(lambda: self._attach(channel))

    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def _do(self, command: Callable[[], None]) -> None:
        """Have the loop's thread run `command` before its next step."""
        self._commands.pending.append(command)
        self._commands.wake_up.set()

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                self._obey()
                if self._embeddings:
                    self._advance_embedding()
                if self._engine.scheduler.has_pending_work:
                    self._step()
                elif not self._embeddings:
                    self._report()
                    self._commands.wake_up.wait(REPORT_INTERVAL_S)
        except Exception as error:
            logger.exception("the engine broke down")
            self._break_down(f"{type(error).__name__}: {error}")
        else:
            self._break_down("the replica is shutting down")
        while not self._is_stopping:  # the health check fails by now; requests that still come are answered
            self._commands.wake_up.wait()
            self._obey()
        self._obey()
        self._sender.close()

    def _obey(self) -> None:
        self._commands.wake_up.clear()
        while self._commands.pending:
            self._commands.pending.popleft()()

    def _step(self) -> None:
        self.health.busy_since = time.monotonic()
        outputs = self._engine.step()
        self.health.busy_since = None
        for output in outputs:
            self._take(output)
        self._sender.flush()
        self._report()

    def _take(self, output: StepOutput) -> None:
        """Send a request's new tokens and, at its end, resolve it."""
        request = self._open.get(output.request_id)
        if request is None:  # aborted while the step ran
            return
        request.token_ids.extend(output.token_ids)
        if output.logprobs is not None:
            if request.logprobs is None:
                request.logprobs = []
            request.logprobs.extend(output.logprobs)
        end = end_of(output)
        timing = None
        if request.timing is None and output.token_ids:
            elapsed = time.monotonic() - request.received_at
            timing = request.timing = EngineTiming(output.queue_s, max(0.0, elapsed - output.queue_s))
        if request.stream is not None:
            request.stream.push(output.token_ids, output.logprobs, end, timing)
        if end is not None:
            self._close(output.request_id, request, end)

    def _close(self, request_id: str, request: _OpenRequest, end: End) -> None:
        del self._open[request_id]
        if request.stream is not None:
            request.stream.close()
        request.resolve(
            GenerateReply(self._replica_id, request.token_ids, request.logprobs, end, timing=request.timing)
        )

    def _add(
        self,
        request: GenerationRequest,
        stream_id: int,
        channel: ChannelAddress | None,
        resolve: Callable[[GenerateReply], None],
    ) -> None:
        if self.health.failure is not None:
            resolve(GenerateReply(self._replica_id, list(request.output_token_ids), failure=self.health.failure))
            return
        try:
            self._engine.add_request(request)
        except InvalidRequestError as error:
            resolve(GenerateReply(self._replica_id, refusal=Refusal(str(error), error.param, error.code)))
            return
        stream = None
        if channel is not None:
            on_lost = partial(self._give_up, request.request_id, _ROUTER_IS_GONE)
            stream = self._sender.open(stream_id, channel, len(request.output_token_ids), on_lost)
        self._open[request.request_id] = _OpenRequest(resolve, list(request.output_token_ids), stream)

    def _attach(self, channel: ChannelAddress) -> None:
        self._sender.attach(channel)
        self._next_report_at = 0.0

    def _begin_embedding(
        self, call: EmbedCall, future: "asyncio.Future[EmbedReply]", resolve: Callable[[EmbedReply], None]
    ) -> None:
        if self.health.failure is not None:
            resolve(EmbedReply(failure=self.health.failure))
            return
        try:
            self._embeddings.append((self._engine.embed(call.token_ids, call.pooling), future, resolve))
        except InvalidRequestError as error:
            resolve(EmbedReply(refusal=Refusal(str(error), error.param, error.code)))

    def _advance_embedding(self) -> None:
        """Compute a chunk of the oldest embedding that somebody still waits for."""
        work, future, resolve = self._embeddings[0]
        vector = None
        try:
            vector = None if future.cancelled() else work.advance()
        except Exception as error:  # it concerns this embedding only
            logger.exception("an embedding failed")
            resolve(EmbedReply(failure=f"{type(error).__name__}: {error}"))
        else:
            if vector is None and not future.cancelled():
                return
            resolve(EmbedReply(vector=vector))
        self._embeddings.popleft()

    def _abort(self, request_id: str) -> None:
        request = self._open.pop(request_id, None)
        if request is None:
            return
        self._engine.abort(request_id)
        if request.stream is not None:
            request.stream.close()
        request.resolve(GenerateReply(self._replica_id, request.token_ids, end=End(FinishReason.ABORT)))

    def _give_up(self, request_id: str, failure: str) -> None:
        """Stop generating for a router that is gone; one that lives on all the same may go on elsewhere."""
        request = self._open.pop(request_id, None)
        if request is None:
            return
        self._engine.abort(request_id)
        if request.stream is not None:
            request.stream.close()
        request.resolve(GenerateReply(self._replica_id, request.token_ids, request.logprobs, failure=failure))

    def _report(self) -> None:
        """Tell the routers how things stand, a few times a second."""
        now = time.monotonic()
        if now < self._next_report_at:
            return
        self._next_report_at = now + REPORT_INTERVAL_S
        self.latest_stats = self._engine.stats()
        pool = self._engine.scheduler.pool
        self._sender.report(self.latest_stats, pool.take_changes(), pool.content)

    def _break_down(self, failure: str) -> None:
        """Answer everything that is open; from now on every request is answered with the failure."""
        self.health.failure = failure
        self.health.busy_since = None
        for request in self._open.values():
            request.resolve(GenerateReply(self._replica_id, request.token_ids, request.logprobs, failure=failure))
        self._open.clear()
        for _, _, resolve_embedding in self._embeddings:
            resolve_embedding(EmbedReply(failure=failure))
        self._embeddings.clear()


def _set_unless_done(future: "asyncio.Future[Reply]", reply: Reply) -> None:
    if not future.done():
        future.set_result(reply)
