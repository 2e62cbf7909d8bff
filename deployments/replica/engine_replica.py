"""`EngineReplica`: serves one engine to the routers. It does not depend on Ray."""

import asyncio
import logging
import time
from collections.abc import Sequence

from deployments.channel.messages import (
    EngineInfo,
    Failure,
    FailureKind,
    GenerateCall,
    GenerateReply,
    decode_address,
    decode_call,
    decode_calls,
    encode,
)
from deployments.model_config import ServedModelConfig
from deployments.replica.engine_factory import Engine, make_engine, num_cores
from deployments.replica.engine_loop import EngineLoop
from deployments.replica.machine import MachineWatch, gpu_indices
from deployments.replica.own_request import own_request
from llm.checkpoint.fingerprint import is_same_version
from llm.errors import ConfigError, EngineError
from llm.serving.schemas import EngineStats

logger = logging.getLogger("ray.serve")

_QUEUE_NEWS_LIFETIME_S = 2.0
_WARM_UP_PROMPT_TOKENS = 24
_WARM_UP_NEW_TOKENS = 4


class EngineReplica:
    """Owns one engine: loads it, warms it up, runs requests on it, and reports its health.

    Args:
        config: the settings of the model.
        replica_id: the name in replies and reports.
    """

    def __init__(self, config: ServedModelConfig, replica_id: str) -> None:
        started = time.monotonic()
        self._stall_timeout_s = config.replicas.stall_timeout_s
        self._queues: dict[str, tuple[int, float]] = {}
        engine, self._info = make_engine(config)
        _warm_up(engine)
        self.replica_id = replica_id
        self._machine = MachineWatch(gpu_indices(self._info.device, self._info.num_gpus), num_cores())
        self._loop = EngineLoop(
            engine,
            self.replica_id,
            fingerprint=self._info.fingerprint,
            machine=lambda: self._machine.latest,
        )
        self._loop.start()
        logger.info(
            "engine replica ready in %.1f s: model %s on %s, %s, attention backend %s, %d slots, context %d tokens",
            time.monotonic() - started, self._info.model, self._info.device, self._info.dtype, self._info.backend,
            self._info.num_slots, self._info.max_seq_len,
        )  # fmt: skip

    @property
    def info(self) -> EngineInfo:
        """What routers need to know about the engine."""
        return self._info

    async def wake(self, ranking: Sequence[str] = ()) -> None:
        """Do nothing: Serve starts a replica because a call waits for one."""

    async def attach(self, channel: bytes, ranking: Sequence[str] = ()) -> bytes:  # noqa: ARG002 - the request router's
        """Report this replica's state to the router behind an encoded `ChannelAddress` from now on; returns `info`."""
        self._loop.attach(decode_address(channel))
        return encode(self._info)

    async def stay(self, duration_s: float, ranking: Sequence[str]) -> None:
        """Do nothing for this long: Ray Serve lets a replica that it removes finish its calls."""
        if self.replica_id in ranking:
            await asyncio.sleep(duration_s)

    async def note_queue(self, router: str, ranking: Sequence[str], num_tokens: int) -> None:  # noqa: ARG002
        """Count a router's waiting tokens in this replica's autoscaling statistics, until its next call or for a
        while."""
        self._queues[router] = num_tokens, time.monotonic()

    async def forget_adapters(self, digests: Sequence[str], ranking: Sequence[str]) -> None:
        """Give up adapters as soon as no request uses them. No effect on a replica that was not meant."""
        if self.replica_id in ranking:
            self._loop.forget_adapters(digests)

    @property
    def queued_tokens(self) -> int:
        """Tokens to prefill of requests that wait in routers, as far as these told this replica."""
        oldest = time.monotonic() - _QUEUE_NEWS_LIFETIME_S
        return sum(num_tokens for num_tokens, told_at in self._queues.values() if told_at >= oldest)

    @property
    def latest_stats(self) -> EngineStats:
        """The engine's state when it last reported."""
        return self._loop.latest_stats

    async def generate(self, call: bytes, ranking: Sequence[str] = ()) -> bytes:
        """Run a `GenerateCall` to its end and return the `GenerateReply`. Canceling aborts it within a step.

        Args:
            call: encoded.
            ranking: the replicas that the router wants for it. If all of them are gone, Ray Serve hands the call to
                another one, which declines it, so that the call does not wait forever. Empty for any replica.
        """
        return encode(await self._run(decode_call(call), ranking))

    async def generate_batch(self, calls: bytes, ranking: Sequence[str] = ()) -> bytes:
        """Run a list of `GenerateCall`s side by side; returns their replies once all have ended. Canceling aborts all.

        For requests that give vectors, which take less time than a call.

        Args:
            calls: encoded.
            ranking: see `generate`.
        """
        return encode(await asyncio.gather(*(self._run(call, ranking) for call in decode_calls(calls))))

    async def _run(self, call: GenerateCall, ranking: Sequence[str]) -> GenerateReply:
        reason = self._reason_to_decline(call, ranking)
        if reason is not None:
            return GenerateReply(self.replica_id, failure=Failure(FailureKind.DECLINED, reason))
        return await self._loop.generate(call.to_request(), call.stream_id, call.channel, is_suspect=call.is_suspect)

    def _reason_to_decline(self, call: GenerateCall, ranking: Sequence[str]) -> str | None:
        if ranking and self.replica_id not in ranking:
            return "none of the replicas that were called is running"
        if call.fingerprint and not is_same_version(call.fingerprint, self._info.fingerprint):
            return "the replica runs another version of the model"
        return None

    def check_health(self) -> None:
        """Check that the engine is healthy; Ray Serve calls this about once a second.

        Raises:
            EngineError: the engine broke down or hangs in a step.
        """
        health = self._loop.health
        if health.failure is not None:
            raise EngineError(f"the engine broke down: {health.failure}")
        busy_since = health.busy_since
        if busy_since is not None and time.monotonic() - busy_since > self._stall_timeout_s:
            raise EngineError(f"a step has been running for more than {self._stall_timeout_s:g} s")

    def stop(self) -> None:
        """End the engine's thread."""
        self._machine.close()
        self._loop.stop()

    def __del__(self) -> None:
        if hasattr(self, "_loop"):
            self.stop()


def _warm_up(engine: Engine) -> None:
    """Run a short request, so that the first client does not wait for one-time work.

    Raises:
        ConfigError: the engine has no room for even that.
    """
    num_prompt = min(_WARM_UP_PROMPT_TOKENS, engine.max_seq_len - 1)
    if num_prompt < 1:
        raise ConfigError(f"max_seq_len {engine.max_seq_len} leaves no room for a token to generate; raise it")
    for temperature in (0.0, 1.0):
        request = own_request(
            engine, num_prompt_tokens=num_prompt, max_new_tokens=_WARM_UP_NEW_TOKENS, temperature=temperature
        )
        engine.add_request(request)
        while engine.scheduler.has_pending_work:
            for output in engine.step():
                if output.error is not None:
                    raise EngineError(f"the engine failed while warming up: {output.error}")
