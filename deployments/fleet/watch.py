"""`FleetWatch`: which replicas there are, which of them are well, and whose streams have to move."""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any, Protocol

from deployments.channel.messages import ChannelAddress, EngineInfo, Report
from deployments.config import RouterConfig
from deployments.errors import ReplicaLostError
from deployments.fleet.engine_client import EngineClient
from deployments.fleet.events import News
from deployments.fleet.fleet import Fleet
from llm.serving.schemas import EngineStats

logger = logging.getLogger("ray.serve")

_CHECK_INTERVAL_S = 0.2
_ATTACH_TIMEOUT_S = 5.0
_ATTACH_RETRY_S = 1.0
_FORGET_AFTER_S, _GONE_AFTER_S = 10.0, 1.0
_QUEUE_NEWS_INTERVAL_S = 0.5
_STARTING_INTERVAL_S = 1.0


class Work(Protocol):
    """A router's requests, as far as they depend on the fleet."""

    @property
    def num_waiting(self) -> int:
        """Requests that no replica has yet."""
        ...

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens that these have to prefill."""
        ...

    def fleet_changed(self) -> None:
        """Send on what has room now."""
        ...

    @property
    def is_engine_wanted(self) -> bool:
        """Whether any request waits for a replica to start or to say what its engine is."""
        ...

    def learn(self, info: EngineInfo) -> None:
        """A replica has said what its engine is."""
        ...

    def tick(self, *, is_starting: bool) -> None:
        """Give up what has waited too long; called a few times a second.

        Args:
            is_starting: whether a replica is on its way.
        """
        ...

    def is_on(self, replica_id: str) -> bool:
        """Whether any request runs on a replica."""
        ...

    def move_streams(self, replica_id: str, why: str) -> None:
        """Have what runs on a replica go on elsewhere, if failover is on.

        Args:
            why: the rest of a sentence that begins with the replica.
        """
        ...


class FleetWatch:
    """Keeps a router's `Fleet` true. Lives on the router's event loop.

    A replica serves once Serve lists it as running and it reports to this router. One that falls silent is left out of
    new choices at once and loses its streams after `stall_timeout_s`; one that Serve has taken off its list is being
    taken away, and hands over what it has not finished after `drain_after_s`.

    Args:
        client: the replicas.
        fleet: what to keep true.
        work: the router's requests.
        channel: where replicas shall report; may be changed.
        config: the router's; may be changed.
        clock: seconds; monotonic.
    """

    def __init__(
        self,
        client: EngineClient,
        fleet: Fleet,
        work: Work,
        channel: ChannelAddress,
        config: RouterConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._fleet = fleet
        self._work = work
        self.channel = channel
        self.config = config
        self._clock = clock
        self._running: frozenset[str] = frozenset()
        self._heard: dict[str, tuple[EngineStats, float]] = {}
        self._draining: dict[str, float] = {}
        self._attaching: dict[str, asyncio.Task[None]] = {}
        self._waking: asyncio.Task[None] | None = None
        self._asking: asyncio.Task[None] | None = None
        self._num_starting = 0
        self._asked_at = -math.inf
        self._telling: asyncio.Task[None] | None = None
        self._queue_news_at = 0.0
        self.news = News()
        client.watch(self.set_running)
        self._task = asyncio.get_running_loop().create_task(self._check_for_ever())

    def snapshot(self) -> dict[str, Any]:
        """Last reports of the replicas, those included that have been gone for a few seconds only."""
        now, serving = self._clock(), self._serving()
        return {
            replica_id: {
                **asdict(stats),
                "age_s": round(now - heard_at, 3),
                "is_serving": replica_id in serving,
                "state": self._state(replica_id, now - heard_at),
            }
            for replica_id, (stats, heard_at) in self._heard.items()
        }

    @property
    def has_running(self) -> bool:
        """Whether Serve lists any replica as running."""
        return bool(self._running)

    def running_stats(self) -> list[EngineStats]:
        """What the replicas on Serve's list last reported."""
        return [stats for replica_id, (stats, _) in self._heard.items() if replica_id in self._running]

    def note_move(self, replica_id: str | None) -> None:
        """A stream of this replica goes on elsewhere."""
        if replica_id is not None:
            self.news.count(
                f"A stream of replica {replica_id} goes on elsewhere",
                f"{{}} streams of replica {replica_id} go on elsewhere",
            )

    def _state(self, replica_id: str, silence_s: float) -> str:
        if replica_id in self._fleet.replica_ids:
            return "serving"
        if replica_id in self._running:
            return "silent" if silence_s > self.config.silence_timeout_s else "starting"
        return "gone" if silence_s > _GONE_AFTER_S else "leaving"

    def set_running(self, replica_ids: frozenset[str]) -> None:
        """Serve's list of running replicas has changed."""
        now = self._clock()
        for replica_id in self._running - replica_ids:
            self._fleet.remove(replica_id)
            self._draining[replica_id] = now
            self.news.add(f"Replica {replica_id} has left", is_bad=True)
        for replica_id in replica_ids - self._running:
            self._draining.pop(replica_id, None)
            self._attach(replica_id)
            self.news.add(f"Replica {replica_id} has come")
        self._running = replica_ids
        self._work.fleet_changed()

    def take_report(self, report: Report) -> None:
        """A replica has told its state."""
        replica_id = report.replica_id
        self._heard[replica_id] = report.stats, self._clock()
        if replica_id in self._running and (report.is_snapshot or replica_id in self._serving()):
            self._fleet.report(
                replica_id,
                report.stats,
                report.added_blocks,
                report.removed_blocks,
                report.is_snapshot,
                report.received,
            )
            self._work.fleet_changed()

    def close(self) -> None:
        """Stop watching."""
        for task in (self._task, self._waking, self._asking, self._telling, *self._attaching.values()):
            if task is not None:
                task.cancel()

    def _serving(self) -> set[str]:
        return set(self._fleet.replica_ids)

    async def _check_for_ever(self) -> None:
        while True:
            await asyncio.sleep(_CHECK_INTERVAL_S)
            try:
                self._check()
            except Exception:
                logger.exception("checking the fleet failed")

    def _check(self) -> None:
        now = self._clock()
        self._leave_silent_replicas(now)
        self._leave_draining_replicas(now)
        self._wake_up()
        self._ask_who_starts(now)
        self._work.tick(is_starting=self._num_starting > 0)
        self._tell_queue(now)
        for replica_id, (_, heard_at) in list(self._heard.items()):
            if now - heard_at > _FORGET_AFTER_S and replica_id not in self._running:
                del self._heard[replica_id]

    def _leave_silent_replicas(self, now: float) -> None:
        for replica_id in self._running:
            silence_s = now - self._heard[replica_id][1] if replica_id in self._heard else 0.0
            if silence_s > self.config.silence_timeout_s and replica_id in self._serving():
                logger.warning("replica %s has been silent for %.1f s: nothing new goes there", replica_id, silence_s)
                self.news.add(f"Replica {replica_id} is silent: nothing new goes there", is_bad=True)
                self._fleet.remove(replica_id)
                self._attach(replica_id)
                self._work.fleet_changed()
            if silence_s > self.config.stall_timeout_s:
                self._work.move_streams(replica_id, "stalls")

    def _leave_draining_replicas(self, now: float) -> None:
        for replica_id, since in list(self._draining.items()):
            if not self._work.is_on(replica_id):
                if now - since > _FORGET_AFTER_S:
                    del self._draining[replica_id]
            elif now - since > self.config.drain_after_s and self._fleet.replica_ids:
                self._work.move_streams(replica_id, "is being taken away")

    def _attach(self, replica_id: str) -> None:
        """Have a replica report here, with everything its prefix cache holds; until it does, nothing goes there."""
        if replica_id not in self._attaching:
            task = asyncio.get_running_loop().create_task(self._attach_until_heard(replica_id))
            self._attaching[replica_id] = task
            task.add_done_callback(lambda _: self._attaching.pop(replica_id, None))

    async def _attach_until_heard(self, replica_id: str) -> None:
        while True:
            try:
                with suppress(ReplicaLostError, TimeoutError):
                    async with asyncio.timeout(_ATTACH_TIMEOUT_S):
                        self._work.learn(await self._client.attach(replica_id, self.channel))
            except Exception:
                logger.exception("replica %s cannot be asked to report; trying again", replica_id)
            await asyncio.sleep(_ATTACH_RETRY_S)
            if replica_id not in self._running or replica_id in self._serving():
                return

    def _wake_up(self) -> None:
        """While requests wait and there is no replica, have a call wait in Serve, which scales up from 0 by that."""
        is_needed = self._work.is_engine_wanted and not self._running
        if is_needed and (self._waking is None or self._waking.done()):
            self._waking = asyncio.get_running_loop().create_task(_unless_lost(self._client.wake()))
        elif not is_needed and self._waking is not None:
            self._waking.cancel()
            self._waking = None

    def _ask_who_starts(self, now: float) -> None:
        """While requests wait and there is no replica, keep up with how many are being started."""
        if not self._work.is_engine_wanted or self._running:
            self._num_starting = 0
        elif now - self._asked_at > _STARTING_INTERVAL_S and (self._asking is None or self._asking.done()):
            self._asked_at = now
            self._asking = asyncio.get_running_loop().create_task(self._count_starting())

    async def _count_starting(self) -> None:
        try:
            self._num_starting = await self._client.num_starting()
        except Exception:
            logger.exception("Serve cannot be asked which replicas are starting; trying again")

    def _tell_queue(self, now: float) -> None:
        """Tell one replica how much waits here: its autoscaling statistics count it in."""
        if self._work.num_waiting and self._fleet.replica_ids and now >= self._queue_news_at:
            self._queue_news_at = now + _QUEUE_NEWS_INTERVAL_S
            replica_id = min(self._fleet.replica_ids)
            news = self._client.tell_queue(replica_id, self.channel, self._work.num_waiting_tokens)
            self._telling = asyncio.get_running_loop().create_task(_unless_lost(news))


async def _unless_lost(call: Awaitable[object]) -> None:
    with suppress(ReplicaLostError):
        await call
