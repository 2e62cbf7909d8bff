"""`Router`: everything between chats and the engine replicas. A plain class that runs without Ray."""

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from deployments.channel.listener import TokenListener
from deployments.channel.messages import EngineInfo
from deployments.config import AppConfig, LiveConfig
from deployments.errors import DeadlineError, ShuttingDownError
from deployments.fingerprint import fingerprint_of
from deployments.fleet.engine_client import EngineClient
from deployments.fleet.fleet import Fleet
from deployments.fleet.policy import make_policy
from deployments.fleet.watch import FleetWatch
from deployments.fleet.work import Prospects
from deployments.observe.finished_request import FinishedRequest
from deployments.observe.history import History, RouterHistory, describe
from deployments.observe.metrics import NoPeers, RouterMetrics, RouterPeers
from deployments.observe.request_log import log_request
from deployments.observe.tracing import RequestTracer
from deployments.router.access import Access
from deployments.router.cache_salt import salt_of
from deployments.router.caller import Caller
from deployments.router.dispatcher import Dispatcher
from deployments.router.fleet_view import FleetView
from deployments.router.group import GenerationGroup
from deployments.router.journal import Journal
from deployments.router.prompts import num_prompt_tokens, prompt_hashes
from llm.checkpoint.fingerprint import is_same_version
from llm.serving.schemas import GenerationRequest, Pooling

logger = logging.getLogger("ray.serve")

_ENGINE_CHECK_INTERVAL_S = 0.2
_FIRST_LOOK_S, _OWN_VERSION_CHECK_S = 1.0, 0.05
_SAMPLE_INTERVAL_S = 1.0
_TOTALS = ("num_live", "num_waiting", "num_requests", "num_refused", "num_resumes", "num_moves")
_REQUESTS_AT_ONCE = 64
"""Number of requests created in one turn of the event loop."""
_INLINE_TOKENS = 4096
"""Prompts of up to this many tokens in total are hashed at once; larger ones in a thread."""


class Router:
    """Owns the token channel, the view of the fleet and the journal of live requests.

    Create it on the event loop that it is to run on.

    Args:
        config: the application's configuration.
        client: the engine replicas.
        channel_host: address to listen on for tokens.
        peers: the other routers of the deployment; None if there are none.
        access: who may ask for how much; None for no limits on anyone. Closed with the router.

    Raises:
        ConfigError: tracing is wanted and OpenTelemetry is not installed.
    """

    def __init__(
        self,
        config: AppConfig,
        client: EngineClient,
        channel_host: str = "127.0.0.1",
        peers: RouterPeers | None = None,
        access: Access | None = None,
    ) -> None:
        self.config = config
        self.access = access or Access()
        self.channel_host = channel_host
        self.started_at = int(time.time())
        self.info: EngineInfo | None = None
        self.num_awaiting_engine = 0
        """Requests that wait for the first engine to say what it is."""
        self._engine_known = asyncio.Event()
        self.is_shutting_down = False
        self._client = client
        self.fleet = Fleet(make_policy(config.router.policy))
        self.dispatcher = Dispatcher(self.fleet, config.admission)
        self._listener = TokenListener(
            channel_host, config.token_channel.port, on_items=self._take_items, on_report=self._take_report
        )
        channel = self._listener.address
        self._peers = peers or NoPeers()
        self.metrics = RouterMetrics(
            config.model_name,
            self,
            self._peers,
            min_replicas=config.replicas.fewest_replicas,
            gpus_a_replica=config.engine.tensor_parallel_size,
        )
        self._history = History()
        self._sampled_at = -math.inf
        self.tracer = None
        if config.tracing.endpoint is not None:
            self.tracer = RequestTracer(config.tracing, config.model_name)
        self.journal = Journal(
            client,
            self.fleet,
            self.dispatcher,
            channel,
            max_resumes=config.router.max_resumes,
            on_over=self._request_over,
            history=self._history,
        )
        fingerprint = fingerprint_of(config)
        self._watch = FleetWatch(
            client,
            self.fleet,
            _Work(self),
            channel,
            config.router,
            config.replicas.fewest_replicas,
            fingerprint,
            is_autoscaled=config.replicas.autoscaling is not None,
        )
        self._view = FleetView(config, self._peers.router_id, self._watch, self.dispatcher)
        self.journal.fingerprint = fingerprint
        self.journal.on_move = self._watch.note_move
        self.journal.on_failed_call = self._watch.note_failed_call

    @property
    def is_ready(self) -> bool:
        """Whether an engine has reported what it is."""
        return self._engine_known.is_set()

    @property
    def can_answer(self) -> bool:
        """Whether a request that arrives now is answered: a replica serves, or the fleet is at zero on purpose and a
        request starts one."""
        autoscaling = self.config.replicas.autoscaling
        wakes_up = autoscaling is not None and autoscaling.min_replicas == 0 and not self._watch.has_running
        return wakes_up or (self.is_ready and bool(self.fleet.replica_ids))

    async def start(self, requests: Sequence[GenerationRequest], caller: Caller | None = None) -> GenerationGroup:
        """Begin to generate.

        Raises:
            OverloadedError: too much waits already.
            ShuttingDownError: after `shut_down`.
        """
        caller = caller or Caller()
        tenant = caller.tenant if self.config.prefix_cache_per_key else ""
        requests = [_salted(request, tenant) for request in requests]
        page_size = self.journal.page_size
        if num_prompt_tokens(requests) > _INLINE_TOKENS:
            hashes = await asyncio.to_thread(prompt_hashes, requests, page_size)
        else:
            hashes = prompt_hashes(requests, page_size)
        return self.journal.start(requests, caller, hashes)

    async def embed(self, inputs: Sequence[Sequence[int]], pooling: str, caller: Caller | None = None) -> list[bytes]:
        """Compute the vector of each input, as 32-bit floats. Cancelling gives up all of them.

        Raises:
            OverloadedError: too much waits already.
            LLMError: one of the vectors could not be computed.
        """
        requests = []
        for token_ids in inputs:
            requests.append(GenerationRequest(prompt_token_ids=tuple(token_ids), pooling=Pooling(pooling)))
            if len(requests) % _REQUESTS_AT_ONCE == 0:
                await asyncio.sleep(0)
        return await (await self.start(requests, caller)).vectors()

    async def wait_for_own_version(self) -> None:
        """If all running replicas are of other model versions, wait for one of this router's version.

        During a rolling update, the earlier routers keep the clients until this one can serve them. If there is no
        replica at all, or this router learns of none within a second, it does not wait.
        """
        started = time.monotonic()
        while not self.is_ready:
            if not self._watch.versions() and time.monotonic() - started > _FIRST_LOOK_S:
                return
            await asyncio.sleep(_OWN_VERSION_CHECK_S)

    async def wait_until_ready(self) -> EngineInfo:
        """Wait for the first engine."""
        await self._engine_known.wait()
        assert self.info is not None, "set before the event"
        return self.info

    async def engine_info(self, timeout_s: float | None = None) -> EngineInfo:
        """What the engines are. If none has reported it yet, wait for one, and have one started if there is none.

        Args:
            timeout_s: how long the client waits; None for as long as it takes.

        Raises:
            NoReplicaError: none has been running or starting for too long.
            DeadlineError: `timeout_s` is over.
            ShuttingDownError: after `shut_down`.
        """
        since = time.monotonic()
        self.num_awaiting_engine += 1
        try:
            while not self.is_ready:
                if self.is_shutting_down:
                    raise ShuttingDownError
                if self.dispatcher.is_hopeless(since):
                    raise self.dispatcher.no_replica()
                if timeout_s is not None and time.monotonic() - since > timeout_s:
                    raise DeadlineError("the request's timeout has passed")
                with suppress(TimeoutError):
                    async with asyncio.timeout(_ENGINE_CHECK_INTERVAL_S):
                        await self._engine_known.wait()
        finally:
            self.num_awaiting_engine -= 1
        return await self.wait_until_ready()

    def learn(self, info: EngineInfo) -> None:
        """Take in what a replica says about its engine; the first replica of this router's version decides."""
        if self.info is not None or not is_same_version(self.journal.fingerprint, info.fingerprint):
            return
        # More exact than this router's own value, because only the replicas have the weights.
        self.journal.fingerprint = self._watch.fingerprint = info.fingerprint
        self.journal.page_size = info.page_size
        self.dispatcher.learn_step_tokens(info.max_step_tokens)
        self.info = info
        self._engine_known.set()

    def reconfigure(self, live: LiveConfig) -> None:
        """Use other settings from now on; what `live` leaves out returns to its initial value."""
        changes = live.model_dump(exclude={"admission"}, exclude_none=True)
        self._watch.config = self.config.router.model_copy(update=changes)
        self.journal.max_resumes = self._watch.config.max_resumes
        self.dispatcher.config = live.admission or self.config.admission
        self.dispatcher.pump()

    def listen_on(self, host: str) -> None:
        """Have replicas send tokens to this address of this node from now on."""
        self.channel_host = host
        self.journal.channel = self._watch.channel = self._listener.listen_on(host)

    def shut_down(self) -> None:
        """End all open requests with an error and refuse new ones: the server is about to stop."""
        self.is_shutting_down = True
        self.journal.shut_down()

    def snapshot(self) -> dict[str, Any]:
        """State of this router and, as last reported, of the replicas."""
        return {
            "router": {
                "num_live": self.journal.num_live,
                "num_waiting": self.dispatcher.num_waiting,
                "num_waiting_tokens": self.dispatcher.num_waiting_tokens,
                "num_requests": self.journal.num_requests,
                "num_refused": self.dispatcher.num_refused,
                "num_resumes": self.journal.num_resumes,
                "num_moves": self.journal.num_moves,
                "channel": asdict(self._listener.counters),
                **self.access.snapshot(),
            },
            "replicas": self._watch.snapshot(),
        }

    def fleet_event(self) -> dict[str, Any]:
        """The current state for the fleet page; see `FleetView`."""
        return self._view.event(self.snapshot(), self.info)

    def history(self) -> RouterHistory:
        """This router's part of the last 15 minutes."""
        counts = self.snapshot()["router"]
        return RouterHistory(self._peers.router_id, self._history.slots(), {name: counts[name] for name in _TOTALS})

    async def fleet_history(self) -> dict[str, Any]:
        """The last 15 minutes as seen by all routers that answer; see `history.describe`."""
        own = self.history()
        others = [one for one in await self._peers.histories() if one.router_id != own.router_id]
        return await asyncio.to_thread(describe, [own, *others], time.time())

    def sample(self) -> None:
        """Record the current state once a second; called more often."""
        now = time.monotonic()
        if now - self._sampled_at < _SAMPLE_INTERVAL_S:
            return
        self._sampled_at = now
        self._history.sample(
            num_live=self.journal.num_live,
            num_waiting=self.dispatcher.num_waiting,
            num_serving=len(self.fleet.replica_ids),
            generated=self._watch.num_generated(),
        )

    def close(self) -> None:
        """Stop listening."""
        self.access.close()
        self._watch.close()
        self._listener.close()
        if self.tracer is not None:
            self.tracer.close()

    def _request_over(self, request: FinishedRequest) -> None:
        self.metrics.request_over(request)
        log_request(request)
        if self.tracer is not None:
            self.tracer.request_over(request)

    def _take_items(self, replica_id: str, items: list[Any]) -> None:
        self.journal.take_items(replica_id, items)

    def _take_report(self, report: Any) -> None:
        self._watch.take_report(report)


def _salted(request: GenerationRequest, tenant: str) -> GenerationRequest:
    """The request as engines get it, with a salt that also separates tenants. The same object if there is no salt."""
    salt = salt_of(tenant, request.cache_salt)
    return request if salt == request.cache_salt else request.model_copy(update={"cache_salt": salt})


class _Work:
    """The requests of a router, as its `FleetWatch` sees them."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._dispatcher = router.dispatcher
        self._journal = router.journal

    @property
    def num_waiting(self) -> int:
        """See `Work`."""
        return self._dispatcher.num_waiting

    @property
    def num_waiting_tokens(self) -> int:
        """See `Work`."""
        return self._dispatcher.num_waiting_tokens

    def fleet_changed(self) -> None:
        """See `Work`."""
        self._dispatcher.pump()

    @property
    def is_engine_wanted(self) -> bool:
        """See `Work`."""
        return self._dispatcher.num_waiting > 0 or self._router.num_awaiting_engine > 0

    def learn(self, info: EngineInfo) -> None:
        """See `Work`."""
        self._router.learn(info)

    def tick(self, prospects: Prospects) -> None:
        """See `Work`."""
        self._dispatcher.tick(prospects)
        self._router.sample()

    def note_arrivals(self, stream_ids: Sequence[int]) -> None:
        """See `Work`."""
        self._journal.note_arrivals(stream_ids)

    def is_on(self, replica_id: str) -> bool:
        """See `Work`."""
        return any(True for _ in self._journal.on_replica(replica_id))

    def move_streams(self, replica_id: str, why: str, *, is_failure: bool) -> None:
        """See `Work`."""
        self._journal.move_streams(replica_id, why, is_failure=is_failure)
