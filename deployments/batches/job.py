"""`BatchJob`: runs one batch, from wherever an earlier router has left it."""

import asyncio
import logging
from collections.abc import Callable

import msgspec

from deployments.batches.assembly import assemble
from deployments.batches.desk import BatchDesk
from deployments.batches.errors import BatchStoreAwayError
from deployments.batches.input_lines import InputLines, scan
from deployments.batches.lease import Lease
from deployments.batches.line_runner import LineRunner, LineTools
from deployments.batches.records import Batch, BatchState, BatchStatus, LineFault
from deployments.batches.results import ResultBook

logger = logging.getLogger("ray.serve")


class BatchJob:
    """Brings one batch to its end. Writes the batch's state, as the holder of its lease.

    Args:
        desk: the store.
        batch: the batch as it stands.
        lease: of this batch.
        tools: what its lines are run with.
        max_body_bytes: most bytes of a line's body.
        on_results: told how many more lines have been answered, and how many have failed.
    """

    def __init__(
        self, desk: BatchDesk, batch: Batch, lease: Lease, tools: LineTools, max_body_bytes: int,
        on_results: Callable[[int, int], None] = lambda _completed, _failed: None,
    ) -> None:  # fmt: skip
        self.state = batch.state
        self._desk = desk
        self._batch = batch.record
        self._lease = lease
        self._tools = tools
        self._max_body_bytes = max_body_bytes
        self._on_results = on_results
        self._book = ResultBook(desk.store, batch.record.id, lease.number)
        self._lines: LineRunner | None = None

    @property
    def is_held_up(self) -> bool:
        """See `LineRunner`."""
        return self._lines is not None and self._lines.is_held_up

    async def run(self) -> None:
        """Run to the end. If it is cancelled, all results so far are kept and another router can go on.

        Raises:
            LeaseLostError: another router has the batch, or may have it.
            BatchStoreAwayError: the store could not be reached.
        """
        loop = asyncio.get_running_loop()
        renewing = loop.create_task(self._lease.keep(self._desk.run))
        work = loop.create_task(self._bring_to_end())
        try:
            done, _ = await asyncio.wait((renewing, work), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in (work, renewing):
                task.cancel()
            await asyncio.gather(work, renewing, return_exceptions=True)

    async def _bring_to_end(self) -> None:
        if not self.state.status.is_final:
            try:
                await self._run()
            except FileNotFoundError:
                if not await self._desk.run(self._is_input_gone):
                    raise
                fault = LineFault("input_file_gone", "The input file is no longer in the store; upload it again")
                await self._save(status=BatchStatus.FAILED, faults=(fault,), ended_at=self._now())
        await self._desk.run(self._book.drop)
        await self._desk.run(self._lease.drop)
        await self._desk.run(lambda: self._desk.ledger.strike_off(self._batch.id))

    async def _run(self) -> None:
        found = await self._desk.run(self._scan)
        if found.faults:
            await self._save(status=BatchStatus.FAILED, faults=tuple(found.faults), ended_at=self._now())
            return
        await self._desk.run(self._book.load)
        if self.state.in_progress_at is None:
            await self._save(status=BatchStatus.IN_PROGRESS, in_progress_at=self._now(), num_lines=len(found.lines),
                             model=found.only_model)  # fmt: skip
        self._lines = LineRunner(self._desk, self._tools, self._batch, found.lines, self._book, self._note_results)
        ending = await self._lines.run()
        # The results, too: whoever kept the last ones may have died before it could say so.
        await self._save(status=BatchStatus.FINALIZING, finalizing_at=self._now(), **self._kept())
        await self._desk.run(self._lease.renew)
        output, errors = await self._desk.run(
            lambda: assemble(self._desk.files, self._batch, found.lines, self._book, ending)
        )
        if ending is BatchStatus.COMPLETED and await self._is_cancelled():
            ending = BatchStatus.CANCELLED
        await self._save(status=ending, output_file_id=output, error_file_id=errors, ended_at=self._now())
        logger.info("%s is %s: %d lines completed, %d failed", self._batch.id, ending, self.state.num_completed,
                    self.state.num_failed)  # fmt: skip

    def _is_input_gone(self) -> bool:
        """Whether the input file is missing in a store that is there. Without it the batch could never end."""
        return self._desk.ledger.has(self._batch) and not self._desk.files.has_content(self._batch.input_file_id)

    def _scan(self) -> InputLines:
        batch = self._batch
        return scan(
            lambda start, end: self._desk.files.read(batch.input_file_id, start, end), batch.num_input_bytes,
            url=batch.endpoint, max_lines=self._desk.config.max_lines, max_body_bytes=self._max_body_bytes,
        )  # fmt: skip

    async def _is_cancelled(self) -> bool:
        return await self._desk.run(lambda: self._desk.ledger.is_cancelled(self._batch))

    async def _note_results(self) -> None:
        """Results have been kept: note how many there are."""
        book, state = self._book, self.state
        self._on_results(book.num_completed - state.num_completed, book.num_failed - state.num_failed)
        try:
            await self._save(**self._kept())
        except BatchStoreAwayError:
            logger.warning("the counts of %s could not be saved; they will be with the next results", self._batch.id)

    async def _save(self, **changes: object) -> None:
        state: BatchState = msgspec.structs.replace(self.state, **changes)
        await self._desk.run(lambda: self._desk.ledger.save(self._batch, state, self._lease.number))
        self.state = state

    def _kept(self) -> dict[str, object]:
        """What the state says of the results that have been kept."""
        book = self._book
        return {"num_completed": book.num_completed, "num_failed": book.num_failed, "usage": book.usage}

    def _now(self) -> int:
        return int(self._desk.clock())
