"""`BatchRunner`: a router's part in running batches. It takes those that nobody runs, a few at a time."""

import asyncio
import logging
import math
import random
import time
from collections import Counter
from contextlib import suppress
from typing import Any

from deployments.batches.calls import Capacity, LineCalls
from deployments.batches.desk import BatchDesk
from deployments.batches.errors import BatchStoreAwayError, LeaseLostError
from deployments.batches.job import BatchJob
from deployments.batches.lease import Lease, LeaseBook
from deployments.batches.ledger import ActiveBatch
from deployments.batches.line_runner import LineTools
from deployments.batches.pace import Pace
from deployments.batches.records import BatchStatus

logger = logging.getLogger("ray.serve")

_LOOK_S = 1.0
"""How often it looks for batches that nobody runs."""
_HEAD_START_S = 1.5
"""For each batch that a router runs, it leaves a free one to others for this long, so that batches spread."""
_COOL_DOWN_S = 15.0
"""After a batch could not be run here, it is left to others for this long."""
_ASIDE_S = 60.0
"""A batch that is held up lets those of other keys go first, for this long."""
_SWEEP_S = 3600.0


class BatchRunner:
    """Runs batches on one router, until it is stopped.

    Args:
        desk: the store.
        calls: answers lines.
        capacity: knows what is idle.
        name: of the router.
        max_body_bytes: most bytes of a line's body.
    """

    def __init__(self, desk: BatchDesk, calls: LineCalls, capacity: Capacity, name: str, max_body_bytes: int) -> None:
        config = desk.config
        self.num_lines: Counter[str] = Counter()
        """Lines that have ended here, by "completed" or "failed"."""
        self.num_ended: Counter[BatchStatus] = Counter()
        """Batches that have ended here."""
        self.num_unfinished = 0
        """Unfinished batches, wherever they run."""
        self._desk = desk
        self._tools = LineTools(calls, Pace(capacity, config.max_row_use, config.max_concurrency))
        self._leases = LeaseBook(desk.store, name, config.lease_s)
        self._max_body_bytes = max_body_bytes
        self._known: dict[str, ActiveBatch] = {}
        self._jobs: dict[str, asyncio.Task[None]] = {}
        self._running: dict[str, BatchJob] = {}
        self._free_since: dict[str, float] = {}
        self._not_before: dict[str, float] = {}
        self._next_sweep = time.monotonic() + random.uniform(0.02, 1) * _SWEEP_S
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look for batches. Call it on the event loop."""
        self._task = asyncio.get_running_loop().create_task(self._run_for_ever())

    async def stop(self) -> None:
        """Let go of all batches, so that other routers can go on with them at once. Results so far are kept."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        jobs = list(self._jobs.values())
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)

    def snapshot(self) -> dict[str, Any]:
        """What runs here, and what has run."""
        return {
            "num_running": len(self._jobs),
            "num_unfinished": self.num_unfinished,
            "num_open_lines": self._tools.pace.num_open,
            "num_completed_lines": self.num_lines["completed"],
            "num_failed_lines": self.num_lines["failed"],
            "num_ended": {status.value: self.num_ended[status] for status in BatchStatus if status.is_final},
        }

    async def _run_for_ever(self) -> None:
        while True:
            self._desk.changed.clear()
            try:
                await self._look()
                if time.monotonic() >= self._next_sweep:
                    self._next_sweep = time.monotonic() + _SWEEP_S
                    await self._desk.run(self._desk.sweep)
            except BatchStoreAwayError as error:
                logger.warning("%s", error)
            except Exception:  # the edge of the loop that must not end
                logger.exception("looking for batches failed")
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S * random.uniform(0.8, 1.2)):
                    await self._desk.changed.wait()

    async def _look(self) -> None:
        """Take batches that nobody runs, as many as this router may run."""
        ids = await self._desk.run(self._desk.ledger.active_ids)
        self.num_unfinished = len(ids)
        self._forget_all_but(set(ids))
        for batch_id in ids:
            if batch_id not in self._known:
                active = await self._desk.run(lambda batch_id=batch_id: self._desk.ledger.active(batch_id))  # type: ignore[misc]
                if active is not None:
                    self._known[batch_id] = active
        held_up = self._held_up()
        for active in self._in_turn():
            is_full = len(self._jobs) >= self._desk.config.max_running
            if is_full and not held_up:
                return
            if is_full and active.owner in held_up:
                continue
            if await self._is_for_here(active.id):
                if is_full:
                    self._lay_aside(next(iter(held_up.values())))
                    return
                lease = await self._desk.run(lambda active=active: self._leases.take(active.id))  # type: ignore[misc]
                if lease is not None:
                    self._begin(active, lease)

    def _held_up(self) -> dict[str, str]:
        """A batch that is held up of each key that has one."""
        return {self._known[batch_id].owner: batch_id for batch_id, job in self._running.items() if job.is_held_up}

    def _lay_aside(self, batch_id: str) -> None:
        """Let go of a batch for a while; its results are kept."""
        if time.monotonic() >= self._not_before.get(batch_id, -math.inf):
            self._not_before[batch_id] = time.monotonic() + _ASIDE_S
            self._jobs[batch_id].cancel()

    def _in_turn(self) -> list[ActiveBatch]:
        """The batches that do not run here: those first whose owner has the fewest that do, then the oldest."""
        num_running = Counter(self._known[batch_id].owner for batch_id in self._jobs)
        waiting = [active for active in self._known.values() if active.id not in self._jobs]
        return sorted(waiting, key=lambda active: (num_running[active.owner], active.id))

    async def _is_for_here(self, batch_id: str) -> bool:
        """Whether nobody runs a batch, and other routers have had the chance to take it."""
        now = time.monotonic()
        if now < self._not_before.get(batch_id, -math.inf):
            return False
        if not await self._desk.run(lambda: self._leases.is_free(batch_id)):
            self._free_since.pop(batch_id, None)
            return False
        free_since = self._free_since.setdefault(batch_id, now)
        return now - free_since >= len(self._jobs) * _HEAD_START_S

    def _begin(self, active: ActiveBatch, lease: Lease) -> None:
        job = asyncio.get_running_loop().create_task(self._run(active, lease))
        self._jobs[active.id] = job
        self._free_since.pop(active.id, None)
        job.add_done_callback(lambda _: self._ended(active.id))

    def _ended(self, batch_id: str) -> None:
        del self._jobs[batch_id]
        self._running.pop(batch_id, None)
        self._desk.changed.set()

    async def _run(self, active: ActiveBatch, lease: Lease) -> None:
        """Run a batch, and let go of it if it cannot be brought to its end here."""
        cool_down_s = _COOL_DOWN_S
        try:
            batch = await self._desk.run(lambda: self._desk.ledger.find(active))
            if batch is not None:
                job = BatchJob(self._desk, batch, lease, self._tools, self._max_body_bytes, self._count)
                self._running[active.id] = job
                await job.run()
                self.num_ended[job.state.status] += 1
                return
            cool_down_s = _LOOK_S  # it is just being made
        except LeaseLostError as error:
            logger.warning("%s; this router lets go of it", error)
        except BatchStoreAwayError as error:
            logger.warning("%s is left to other routers for now: %s", active.id, error)
        except asyncio.CancelledError:
            await self._release(lease)
            raise
        except Exception:  # the edge of a batch: others go on
            logger.exception("%s cannot be run here", active.id)
        self._not_before[active.id] = time.monotonic() + cool_down_s
        await self._release(lease)

    async def _release(self, lease: Lease) -> None:
        with suppress(BatchStoreAwayError):
            await self._desk.run(lease.release)

    def _count(self, num_completed: int, num_failed: int) -> None:
        self.num_lines["completed"] += num_completed
        self.num_lines["failed"] += num_failed

    def _forget_all_but(self, batch_ids: set[str]) -> None:
        self._leases.forget(batch_ids)
        self._known = {i: active for i, active in self._known.items() if i in batch_ids or i in self._jobs}
        self._free_since = {i: since for i, since in self._free_since.items() if i in batch_ids}
        self._not_before = {i: until for i, until in self._not_before.items() if i in batch_ids}
