"""`Router`: everything between chats and the engine replicas of one model. A plain class that runs without Ray."""

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from deployments.channel.messages import ChannelAddress, EngineInfo, Report, TokenItem
from deployments.config import LiveConfig, PlatformConfig
from deployments.errors import DeadlineError, ShuttingDownError
from deployments.fingerprint import fingerprint_of
from deployments.fleet.engine_client import EngineClient
from deployments.fleet.events import FleetRecord
from deployments.fleet.fleet import Fleet
from deployments.fleet.policy import make_policy
from deployments.fleet.watch import FleetWatch
from deployments.fleet.work import Prospects
from deployments.model_config import ServedModelConfig
from deployments.observe.finished_request import FinishedRequest
from deployments.observe.history import History, RouterHistory
from deployments.observe.metrics import NoPeers, RouterMetrics, RouterPeers
from deployments.observe.request_log import log_request
from deployments.observe.tracing import RequestTracer
from deployments.router.cache_salt import as_sent
from deployments.router.caller import Caller
from deployments.router.dispatcher import Dispatcher
from deployments.router.fleet_view import FleetView
from deployments.router.group import GenerationGroup
from deployments.router.journal import Journal
from deployments.router.meter import Meter
from deployments.router.model_state import ModelState
from deployments.router.prompts import num_prompt_tokens, prompt_hashes
from deployments.router.token_hub import TokenHub
from llm.checkpoint.fingerprint import is_same_version
from llm.serving.schemas import AdapterRef, EngineStats, GenerationRequest

logger = logging.getLogger("ray.serve")

_ENGINE_CHECK_INTERVAL_S = 0.2
_FIRST_LOOK_S, _OWN_VERSION_CHECK_S = 1.0, 0.05
_SAMPLE_INTERVAL_S = 1.0
_TOTALS = ("num_live", "num_waiting", "num_requests", "num_refused", "num_resumes", "num_moves")
_INLINE_TOKENS = 4096
"""Prompts of up to this many tokens in total are hashed at once; larger ones in a thread."""


class Router:
    """Owns the view of one model's fleet and the journal of its live requests.

    Create it on the event loop that it is to run on.

    Args:
        key: a name that only this model has among those of the process: see `AppConfig.by_key`.
        config: the model's settings.
        platform: what concerns all models.
        client: the model's engine replicas.
        hub: where tokens arrive; shared with the other models' routers.
        peers: the other routers of the deployment; None if there are none.
        tracer: makes spans of requests; None for no traces. Shared, too.
        meter: counts what requests use; None to count nothing. Shared, too.
    """

    def __init__(
        self,
        key: str,
        config: ServedModelConfig,
        platform: PlatformConfig,
        client: EngineClient,
        hub: TokenHub,
        peers: RouterPeers | None = None,
        tracer: RequestTracer | None = None,
        meter: Meter | None = None,
    ) -> None:
        self.key = key
        self.config = config
        self.platform = platform
        self.started_at = int(time.time())
        self.info: EngineInfo | None = None
        self.num_awaiting_engine = 0
        """Requests that wait for the first engine to say what it is."""
        self._engine_known = asyncio.Event()
        self.is_shutting_down = False
        self._tracer = tracer
        self._router_id = (peers or NoPeers()).router_id
        self._history = History()
        self._sampled_at = -math.inf
        replicas, fingerprint = config.replicas, fingerprint_of(config)
        self.fleet = Fleet(make_policy(platform.router.policy))
        self.dispatcher = Dispatcher(self.fleet, config.admission)
        self._watch = FleetWatch(
            client, self.fleet, _Work(self), hub.address, platform.router, replicas.fewest_replicas, fingerprint,
            is_autoscaled=replicas.autoscaling is not None,
        )  # fmt: skip
        self._view = FleetView(key, config, self._watch, self.dispatcher)
        self.journal = Journal(
            client, self.fleet, self.dispatcher, hub.address, fingerprint=fingerprint,
            max_resumes=platform.router.max_resumes, on_over=self._request_over, on_move=self._watch.note_move,
            on_failed_call=self._watch.note_failed_call, history=self._history, meter=meter,
        )  # fmt: skip
        self.metrics = RouterMetrics(
            key, self._router_id, self,
            min_replicas=replicas.fewest_replicas, gpus_a_replica=config.engine.tensor_parallel_size,
        )  # fmt: skip
        hub.join(self)

    @property
    def is_ready(self) -> bool:
        """Whether an engine has reported what it is."""
        return self._engine_known.is_set()

    @property
    def weight(self) -> float:
        """Its share of the requests for its name, relative to other entries with the name."""
        return 1.0 if self.config.weight is None else self.config.weight

    @property
    def state(self) -> ModelState:
        """How the model's fleet stands."""
        if self.is_ready and self.fleet.replica_ids:
            return ModelState.READY
        if self.config.replicas.fewest_replicas == 0 and not self._watch.has_running:
            return ModelState.ASLEEP if not self.is_engine_wanted else ModelState.STARTING
        return ModelState.STARTING

    @property
    def can_answer(self) -> bool:
        """Whether a request that arrives now is answered: a replica serves, or the fleet is at zero on purpose and a
        request starts one."""
        wakes_up = self.config.replicas.fewest_replicas == 0 and not self._watch.has_running
        return wakes_up or self.state is ModelState.READY

    @property
    def is_engine_wanted(self) -> bool:
        """Whether requests wait for a replica."""
        return self.dispatcher.num_waiting > 0 or self.num_awaiting_engine > 0

    def stats_of(self, replica_id: str) -> EngineStats | None:
        """What a replica last reported; None if it has reported nothing yet."""
        return self._watch.stats_of(replica_id)

    async def start(
        self,
        requests: Sequence[GenerationRequest],
        caller: Caller | None = None,
        adapter: AdapterRef | None = None,
    ) -> GenerationGroup:
        """Begin to generate.

        Args:
            requests: what to generate.
            caller: who asks.
            adapter: what computes them; None for the model itself.

        Raises:
            OverloadedError: too much waits already.
            ShuttingDownError: after `shut_down`.
        """
        caller = caller or Caller()
        caller.sheet.model = caller.sheet.model or self.config.model_name
        tenant = caller.tenant if self.platform.prefix_cache_per_key else ""
        requests = [as_sent(request, tenant, adapter) for request in requests]
        page_size = self.journal.page_size
        if num_prompt_tokens(requests) > _INLINE_TOKENS:
            hashes = await asyncio.to_thread(prompt_hashes, requests, page_size)
        else:
            hashes = prompt_hashes(requests, page_size)
        return self.journal.start(requests, caller, hashes)

    async def vectors(
        self,
        requests: Sequence[GenerationRequest],
        caller: Caller | None = None,
        adapter: AdapterRef | None = None,
    ) -> list[bytes]:
        """Compute the vector that each request gives, as 32-bit floats. Cancelling gives up all of them.

        Raises:
            OverloadedError: too much waits already.
            LLMError: one of the vectors could not be computed.
        """
        return await (await self.start(requests, caller, adapter)).vectors()

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
        changes = live.model_dump(exclude={"admission", "admission_of"}, exclude_none=True)
        self._watch.config = self.platform.router.model_copy(update=changes)
        self.journal.max_resumes = self._watch.config.max_resumes
        self.dispatcher.config = live.admission_of.get(self.key) or live.admission or self.config.admission
        self.dispatcher.pump()

    def use_channel(self, channel: ChannelAddress) -> None:
        """Have replicas send tokens to this address from now on."""
        self.journal.channel = self._watch.channel = channel

    def knows(self, replica_id: str) -> bool:
        """Whether this is a replica of the model."""
        return self._watch.knows(replica_id)

    def shut_down(self) -> None:
        """End all open requests with an error and refuse new ones: the server is about to stop."""
        self.is_shutting_down = True
        self.journal.shut_down()

    def counts(self) -> dict[str, int]:
        """What this router has to do, and has done."""
        return {
            "num_live": self.journal.num_live,
            "num_waiting": self.dispatcher.num_waiting,
            "num_waiting_tokens": self.dispatcher.num_waiting_tokens,
            "num_requests": self.journal.num_requests,
            "num_refused": self.dispatcher.num_refused,
            "num_resumes": self.journal.num_resumes,
            "num_moves": self.journal.num_moves,
        }

    def snapshot(self) -> dict[str, Any]:
        """State of this router and, as last reported, of the replicas."""
        return {"router": self.counts(), "replicas": self._watch.snapshot()}

    def fleet_event(self) -> dict[str, Any]:
        """The current state for the fleet page; see `FleetView`."""
        return self._view.event(self._watch.snapshot(), self.info, self.state)

    @property
    def record(self) -> FleetRecord:
        """What has happened to the model's fleet."""
        return self._watch.record

    def history(self) -> RouterHistory:
        """This router's part of the last 15 minutes."""
        counts = self.counts()
        return RouterHistory(
            self._router_id, self._history.intervals(), {name: counts[name] for name in _TOTALS}, self.key
        )

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
        """Stop watching the fleet."""
        self._watch.close()

    def _request_over(self, request: FinishedRequest) -> None:
        self.metrics.request_over(request)
        log_request(request, self.key)
        if self._tracer is not None:
            self._tracer.request_over(request, self.config.model_name)

    def take_items(self, replica_id: str, items: Sequence[TokenItem]) -> None:
        """Take in what a replica has generated."""
        self.journal.take_items(replica_id, items)

    def take_report(self, report: Report) -> None:
        """Take in a replica's state."""
        self._watch.take_report(report)


class _Work:
    """The requests of a router, as its `FleetWatch` sees them."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._dispatcher = router.dispatcher

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
        return self._router.is_engine_wanted

    def learn(self, info: EngineInfo) -> None:
        """See `Work`."""
        self._router.learn(info)

    def tick(self, prospects: Prospects) -> None:
        """See `Work`."""
        self._dispatcher.tick(prospects)
        self._router.sample()

    def note_arrivals(self, stream_ids: Sequence[int]) -> None:
        """See `Work`."""
        self._router.journal.note_arrivals(stream_ids)

    def is_on(self, replica_id: str) -> bool:
        """See `Work`."""
        return any(True for _ in self._router.journal.on_replica(replica_id))

    def move_streams(self, replica_id: str, why: str, *, is_failure: bool) -> None:
        """See `Work`."""
        self._router.journal.move_streams(replica_id, why, is_failure=is_failure)
