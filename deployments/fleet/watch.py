"""`FleetWatch`: which replicas there are, which of them are healthy, and whose streams have to move."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from deployments.channel.messages import ChannelAddress, Report
from deployments.config import RouterConfig
from deployments.errors import ReplicaLostError
from deployments.fleet.departure import explain
from deployments.fleet.engine_client import EngineClient
from deployments.fleet.events import FleetRecord
from deployments.fleet.fleet import Fleet
from deployments.fleet.known_replica import KnownReplica
from deployments.fleet.start_watch import StartWatch
from deployments.fleet.succession import Succession
from deployments.fleet.verdict import Evidence, Limits, Standing, Verdict, judge
from deployments.fleet.work import Prospects, Work
from llm.checkpoint.fingerprint import is_same_version
from llm.serving.schemas import EngineStats

logger = logging.getLogger("ray.serve")

_CHECK_INTERVAL_S = 0.2
_ABSENT_AFTER_S = 0.5
"""If a check comes more than this long after the previous one, the router itself was not running in between."""
_ATTACH_TIMEOUT_S = 5.0
_ATTACH_RETRY_S = 0.3
_FORGET_AFTER_S = 10.0
_DELIBERATE_S = 1.0
"""A replica that was healthy when Ray Serve took it off its list, and is lost no sooner than this, was taken away."""
_QUEUE_NEWS_INTERVAL_S = 0.5
_STAY_INTERVAL_S, _STAY_S = 1.0, 3.0
"""How often a replica is asked to stay, and for how long each time."""
_TROUBLE = frozenset({Standing.DOUBTFUL, Standing.SILENT, Standing.STALLED, Standing.BROKEN})


class FleetWatch:
    """Keeps a router's `Fleet` correct. Lives on the router's event loop.

    It gathers the evidence on each replica, has `verdict.judge` decide, and acts on the decision: a replica that may
    not get new requests leaves the fleet, and if it may not keep the requests it has, they continue elsewhere.

    Args:
        client: the replicas.
        fleet: what to keep correct.
        work: the router's requests.
        channel: where replicas shall report; may be changed.
        config: the router's; may be changed.
        num_expected: least number of replicas that Ray Serve keeps running.
        fingerprint: the version of the model that the router was made for; may be changed.
        is_autoscaled: whether the number of replicas follows the load.
        clock: seconds; monotonic.
    """

    def __init__(
        self,
        client: EngineClient,
        fleet: Fleet,
        work: Work,
        channel: ChannelAddress,
        config: RouterConfig,
        num_expected: int,
        fingerprint: str,
        clock: Callable[[], float] = time.monotonic,
        *,
        is_autoscaled: bool = False,
    ) -> None:
        self._client = client
        self._fleet = fleet
        self._work = work
        self.channel = channel
        self.config = config
        self._num_expected = num_expected
        self._clock = clock
        self._checked_at = clock()
        self.fingerprint = fingerprint
        self._running: frozenset[str] = frozenset()
        self._replicas: dict[str, KnownReplica] = {}
        self._attaching: dict[str, asyncio.Task[None]] = {}
        self._waking: asyncio.Task[None] | None = None
        self._succession = Succession()
        self._is_without_own = False
        """Whether an update seems to be under way and Serve lists no replica of the router's version."""
        self._staying: set[asyncio.Task[None]] = set()
        self._telling: asyncio.Task[None] | None = None
        self._queue_news_at = 0.0
        self._is_autoscaled = is_autoscaled
        self.record = FleetRecord()
        self._starts = StartWatch(client, self.record, clock)
        client.watch(self.set_running)
        self._task = asyncio.get_running_loop().create_task(self._check_for_ever())

    def snapshot(self) -> dict[str, Any]:
        """Last reports of the replicas and the verdicts on them, including replicas gone for a few seconds."""
        now = self._clock()
        states = {}
        for replica_id, replica in self._replicas.items():
            if replica.stats is not None:
                states[replica_id] = replica.describe(self._judge(replica_id, replica), now)
        return states

    @property
    def has_running(self) -> bool:
        """Whether Serve lists any replica as running."""
        return bool(self._running)

    def knows(self, replica_id: str) -> bool:
        """Whether this is one of the replicas, or was until a moment ago."""
        return replica_id in self._replicas

    def stats_of(self, replica_id: str) -> EngineStats | None:
        """What a replica last reported; None if it has reported nothing yet."""
        replica = self._replicas.get(replica_id)
        return None if replica is None else replica.stats

    def running_stats(self) -> list[EngineStats]:
        """What the replicas on Serve's list last reported."""
        known = [self._replicas[replica_id].stats for replica_id in self._running]
        return [stats for stats in known if stats is not None]

    def num_generated(self) -> dict[str, int]:
        """Tokens that each replica has generated since it started, as it last reported."""
        known = {replica_id: replica.stats for replica_id, replica in self._replicas.items()}
        return {replica_id: stats.num_generated_tokens for replica_id, stats in known.items() if stats is not None}

    def versions(self) -> dict[str, str]:
        """Fingerprints of the replicas on Serve's list, as far as they have reported them."""
        known = {replica_id: self._replicas[replica_id].condition.fingerprint for replica_id in self._running}
        return {replica_id: fingerprint for replica_id, fingerprint in known.items() if fingerprint}

    def note_move(self, replica_id: str | None) -> None:
        """Note that a stream of this replica continues elsewhere."""
        if replica_id is not None:
            self.record.events.count(
                f"A stream of replica {replica_id} continues elsewhere",
                f"{{}} streams of replica {replica_id} continue elsewhere",
            )

    def note_failed_call(self, replica_id: str, why: str) -> bool:
        """Note that a call to a replica has failed, or the replica has died.

        Args:
            replica_id: the replica.
            why: the reason, in a sentence about the replica.

        Returns:
            Whether something is wrong; False if Ray Serve has taken the replica away in good order.
        """
        replica, now = self._replicas.get(replica_id), self._clock()
        if replica is None:
            return False
        if replica.delisted_at is not None and replica.was_serving and now - replica.delisted_at > _DELIBERATE_S:
            return False
        replica.call_failed_at, replica.call_error = now, why
        self._review(replica_id)
        return True

    def set_running(self, replica_ids: frozenset[str]) -> None:
        """Take in a change of Serve's list of running replicas."""
        now = self._clock()
        left, joined = self._running - replica_ids, replica_ids - self._running
        self._running = replica_ids
        for replica_id in left:
            replica = self._replicas[replica_id]
            replica.delisted_at, replica.was_serving = now, replica_id in self._fleet.replica_ids
            replica.silence_then_s = replica.silence_s(now)
            self.record.events.add(f"Ray Serve no longer lists replica {replica_id}")
        for replica_id in joined:
            replica = self._replicas.setdefault(replica_id, KnownReplica(now, now))
            replica.delisted_at = replica.departure = None
            self.record.events.add(f"Replica {replica_id} joined")
            self._starts.note_joined()
        if replica_ids:
            self._succession.begin(now)
        self._is_without_own = self._lacks_own_version()
        for replica_id in (*left, *joined):
            self._review(replica_id)
        self._ask_to_stay(now)
        self._work.fleet_changed()

    def take_report(self, report: Report) -> None:
        """Take in a replica's state."""
        replica_id, now = report.replica_id, self._clock()
        replica = self._replicas.setdefault(replica_id, KnownReplica(now, now, delisted_at=now))
        replica.heard_at, replica.stats, replica.condition = now, report.stats, report.condition
        if replica.delisted_at is None:
            self._succession.note(replica.joined_at, is_own=self._is_own_version(replica))
            self._is_without_own = self._lacks_own_version()
        is_complete = report.is_snapshot or replica_id in self._fleet.replica_ids
        if is_complete and self._judge(replica_id, replica, has_joined=True).may_get_new:
            self._fleet.report(
                replica_id,
                report.stats,
                report.added_blocks,
                report.removed_blocks,
                report.is_snapshot,
                report.received,
            )
        self._work.note_arrivals(report.received)
        self._review(replica_id)
        self._work.fleet_changed()

    def close(self) -> None:
        """Stop watching."""
        self._starts.close()
        for task in (self._task, self._waking, self._telling, *self._staying, *self._attaching.values()):
            if task is not None:
                task.cancel()

    def _judge(self, replica_id: str, replica: KnownReplica, *, has_joined: bool | None = None) -> Verdict:
        now, config = self._clock(), self.config
        evidence = Evidence(
            is_listed=replica.delisted_at is None,
            has_joined=replica_id in self._fleet.replica_ids if has_joined is None else has_joined,
            is_same_version=None if replica.heard_at is None else self._is_own_version(replica),
            silence_s=replica.silence_s(now),
            has_reported=replica.heard_at is not None,
            condition=replica.condition,
            call_failed_s=None if replica.call_failed_at is None else now - replica.call_failed_at,
            delisted_s=None if replica.delisted_at is None else now - replica.delisted_at,
            is_last=replica.delisted_at is not None and self._is_without_own,
        )
        return judge(evidence, Limits(config.silence_timeout_s, config.stall_timeout_s, config.drain_after_s))

    def _is_own_version(self, replica: KnownReplica) -> bool:
        return is_same_version(self.fingerprint, replica.condition.fingerprint)

    def _lacks_own_version(self) -> bool:
        """Whether no replica on Serve's list is of the router's version, and at least one is or may be of a later
        one."""
        is_unknown = False
        for replica_id in self._running:
            replica = self._replicas[replica_id]
            if replica.heard_at is None:
                is_unknown = True
            elif self._is_own_version(replica) and not self._judge(replica_id, replica).must_be_replaced:
                return False
        return is_unknown or self._succession.is_over

    def _review(self, replica_id: str) -> None:
        """Judge a replica again and act on the verdict."""
        replica = self._replicas[replica_id]
        verdict = self._judge(replica_id, replica)
        if not verdict.may_get_new:
            if replica_id in self._fleet.replica_ids:
                self._fleet.remove(replica_id)
                self._work.fleet_changed()
            if replica_id in self._running or verdict.standing is Standing.STAYING:
                self._attach(replica_id)
        if replica.departure is None and replica.delisted_at is not None:
            self._note_departure(replica_id, replica, verdict)
        if verdict.standing is not replica.standing:
            self._tell_standing(replica_id, replica.standing, verdict)
            replica.standing = verdict.standing
        if not verdict.may_keep and (verdict.is_failure or self._fleet.replica_ids):
            self._work.move_streams(replica_id, verdict.why, is_failure=verdict.is_failure)

    def _tell_standing(self, replica_id: str, before: Standing, verdict: Verdict) -> None:
        if verdict.standing in _TROUBLE:
            logger.warning("replica %s gets no new requests: %s", replica_id, verdict.why)
            self.record.events.add(f"Replica {replica_id} gets no new requests: {verdict.why}", is_bad=True)
        elif verdict.standing is Standing.SERVING and before in _TROUBLE:
            self.record.events.add(f"Replica {replica_id} is serving again")

    def _note_departure(self, replica_id: str, replica: KnownReplica, verdict: Verdict) -> None:
        """Record why a replica that Ray Serve no longer lists has left, once it has."""
        if verdict.standing is not Standing.GONE and not replica.condition.has_shut_down:
            return
        now, condition = self._clock(), replica.condition
        is_updating = any(version != condition.fingerprint for version in self.versions().values())
        traces = replica.traces(
            now,
            self.config.silence_timeout_s,
            is_updating=is_updating,
            is_autoscaled=self._is_autoscaled,
        )
        replica.departure = explain(traces)
        node = condition.machine.node if condition.machine is not None else None
        self.record.note_departure(replica_id, replica.departure, node, now - replica.joined_at)

    async def _check_for_ever(self) -> None:
        while True:
            await asyncio.sleep(_CHECK_INTERVAL_S)
            try:
                self._check()
            except Exception:
                logger.exception("checking the fleet failed")

    def _check(self) -> None:
        now = self._clock()
        absence_s, self._checked_at = now - self._checked_at - _CHECK_INTERVAL_S, now
        self._is_without_own = self._lacks_own_version()
        for replica_id, replica in list(self._replicas.items()):
            if absence_s > _ABSENT_AFTER_S:  # to a process that was stopped, all replicas would look dead at once
                replica.forgive(absence_s, now)
            self._review(replica_id)
            is_left = replica.delisted_at is not None and not self._work.is_on(replica_id)
            if is_left and replica.silence_s(now) > _FORGET_AFTER_S:
                del self._replicas[replica_id]
        self._ask_to_stay(now)
        self._wake_up()
        self._starts.look(is_needed=self._work.is_engine_wanted and not self._fleet.replica_ids)
        self._work.tick(self._prospects())
        self._tell_queue(now)

    def _prospects(self) -> Prospects:
        verdicts = {replica_id: self._judge(replica_id, self._replicas[replica_id]) for replica_id in self._running}
        hopeful = {
            replica_id
            for replica_id, verdict in verdicts.items()
            if not verdict.must_be_replaced and verdict.standing is not Standing.OTHER_VERSION
        }
        hopeful |= {i for i, replica in self._replicas.items() if replica.standing is Standing.STAYING}
        if self._succession.is_over:
            return Prospects(frozenset(hopeful), is_one_coming=False, is_outdated=not hopeful)
        is_one_coming = len(hopeful) < max(self._num_expected, len(verdicts))
        return Prospects(frozenset(hopeful), is_one_coming, self._starts.latest)

    def _ask_to_stay(self, now: float) -> None:
        """Keep replicas that Serve is taking away while this router has no others; new routers will soon take over."""
        for replica_id, replica in self._replicas.items():
            if replica.standing is Standing.STAYING and now - replica.asked_to_stay_at >= _STAY_INTERVAL_S:
                replica.asked_to_stay_at = now
                call = _unless_lost(self._client.stay(replica_id, _STAY_S))
                task = asyncio.get_running_loop().create_task(call)
                self._staying.add(task)
                task.add_done_callback(self._staying.discard)

    def _attach(self, replica_id: str) -> None:
        """Have a replica report here everything its prefix cache holds; until it does, no request goes there."""
        if replica_id not in self._attaching:
            task = asyncio.get_running_loop().create_task(self._attach_until_heard(replica_id))
            self._attaching[replica_id] = task
            task.add_done_callback(lambda _: self._attaching.pop(replica_id, None))

    async def _attach_until_heard(self, replica_id: str) -> None:
        has_answered = False  # its reports may come although the answer to the call is lost
        while True:
            try:
                with suppress(ReplicaLostError, TimeoutError):
                    async with asyncio.timeout(_ATTACH_TIMEOUT_S):
                        self._work.learn(await self._client.attach(replica_id, self.channel))
                        has_answered = True
            except Exception:
                logger.exception("replica %s cannot be asked to report; trying again", replica_id)
            await asyncio.sleep(_ATTACH_RETRY_S)
            is_staying = replica_id in self._replicas and self._replicas[replica_id].standing is Standing.STAYING
            if not (replica_id in self._running or is_staying):
                return
            if has_answered and replica_id in self._fleet.replica_ids:
                return

    def _wake_up(self) -> None:
        """While requests wait and there is no replica, have a call wait in Serve, which makes it scale up from 0."""
        is_needed = self._work.is_engine_wanted and not self._running
        if is_needed and (self._waking is None or self._waking.done()):
            self._waking = asyncio.get_running_loop().create_task(_unless_lost(self._client.wake()))
        elif not is_needed and self._waking is not None:
            self._waking.cancel()
            self._waking = None

    def _tell_queue(self, now: float) -> None:
        """Tell one replica how much waits here, for its autoscaling statistics to include."""
        if self._work.num_waiting and self._fleet.replica_ids and now >= self._queue_news_at:
            self._queue_news_at = now + _QUEUE_NEWS_INTERVAL_S
            replica_id = min(self._fleet.replica_ids)
            news = self._client.tell_queue(replica_id, self.channel, self._work.num_waiting_tokens)
            self._telling = asyncio.get_running_loop().create_task(_unless_lost(news))


async def _unless_lost(call: Awaitable[object]) -> None:
    with suppress(ReplicaLostError):
        await call
