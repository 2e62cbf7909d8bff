"""`LineRunner`: runs the lines of one batch that have no result yet."""

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from deployments.batches.calls import LineCalls
from deployments.batches.desk import BatchDesk
from deployments.batches.errors import BatchStoreAwayError
from deployments.batches.input_lines import InputLine, LineRequest, request_of
from deployments.batches.line_usage import usage_of
from deployments.batches.pace import Pace
from deployments.batches.records import BatchRecord, BatchStatus
from deployments.batches.result_lines import answered, line_id
from deployments.batches.results import Result, ResultBook

_LOOK_S = 0.4
"""How often it looks whether the batch shall end."""
_FLUSH_S, _LONGEST_FLUSH_S, _FLUSH_SHARE = 1.0, 30.0, 0.01
"""Results are kept every second at first, and later every hundredth of the time that the batch has run."""
_FLUSH_BYTES = 4 << 20
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 30.0
_READ_BYTES = 1 << 20
_BYTES_A_TOKEN = 4
_HELD_UP_SETBACKS, _HELD_UP_S = 4, 60.0
"""After so many refusals in a row, or one for so long, a batch is held up."""


@dataclass(frozen=True, slots=True)
class LineTools:
    """What lines are run with; the same for all batches of a router."""

    calls: LineCalls
    pace: Pace


class LineRunner:
    """Runs lines until all have a result or the batch shall end.

    Args:
        desk: the store.
        tools: what lines are run with.
        batch: the batch.
        lines: all its lines.
        book: takes the results.
        on_kept: called when results have been kept.
    """

    def __init__(
        self, desk: BatchDesk, tools: LineTools, batch: BatchRecord, lines: Sequence[InputLine], book: ResultBook,
        on_kept: Callable[[], Awaitable[None]],
    ) -> None:  # fmt: skip
        self._desk = desk
        self._tools = tools
        self._batch = batch
        self._book = book
        self._on_kept = on_kept
        self._lines = lines
        self._source = _LineSource(desk, batch, lines)
        self._todo = deque(i for i in range(len(lines)) if not book.has(i))
        self._open: set[asyncio.Task[None]] = set()
        self._fresh: list[Result] = []
        self._num_fresh_bytes = 0
        self._is_full = asyncio.Event()
        self._has_flushed = asyncio.Event()
        self._num_setbacks = 0
        self._paused_until = 0.0

    @property
    def is_held_up(self) -> bool:
        """Whether the server has refused its lines for a while, as it does where its key's budget is used up."""
        return self._num_setbacks >= _HELD_UP_SETBACKS

    async def run(self) -> BatchStatus:
        """Run the lines; returns how the batch ends. Lines that are open when it ends early are given up.

        Raises:
            BatchStoreAwayError: the last results could not be kept.
        """
        loop = asyncio.get_running_loop()
        answering = loop.create_task(self._answer_all())
        watching = loop.create_task(self._until_it_shall_end())
        flushing = loop.create_task(self._flush_for_ever())
        tasks: set[asyncio.Task[Any]] = {answering, watching, flushing}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            return watching.result() if watching in done else BatchStatus.COMPLETED
        finally:
            await _end([*tasks, *self._open])
            await self._flush()

    async def _answer_all(self) -> None:
        while self._todo or self._open:
            while self._todo:
                await self._may_go_on()
                index = self._todo.popleft()
                request = await self._request(index)
                await self._tools.pace.begin(request.model, len(request.body) // _BYTES_A_TOKEN)
                self._open.add(asyncio.get_running_loop().create_task(self._answer(index, request)))
                self._let_go_of_done()
            if self._open:
                await asyncio.wait(self._open, return_when=asyncio.FIRST_COMPLETED)
            self._let_go_of_done()

    async def _request(self, index: int) -> LineRequest:
        """What a line asks for, as soon as the store can be read."""
        while True:
            try:
                return await self._source.request(index)
            except BatchStoreAwayError:
                await asyncio.sleep(_LOOK_S)

    def _let_go_of_done(self) -> None:
        done = {task for task in self._open if task.done()}
        self._open -= done
        for task in done:
            task.result()

    async def _may_go_on(self) -> None:
        """Wait while the server refuses lines, and while results cannot be kept as fast as they come."""
        pause_s = self._paused_until - asyncio.get_running_loop().time()
        if pause_s > 0:
            await asyncio.sleep(pause_s)
        while self._num_fresh_bytes > 2 * _FLUSH_BYTES:
            self._has_flushed.clear()
            await self._has_flushed.wait()

    async def _answer(self, index: int, request: LineRequest) -> None:
        """Run a line that may begin."""
        try:
            answer = await self._tools.calls.call(
                self._batch.owner, self._batch.endpoint, request.body, line_id(self._batch.id, index)
            )
        finally:
            self._tools.pace.end()
        if answer.is_worth_another_try:
            self._todo.append(index)
            self._pause(answer.retry_after_s or 0.0)
            return
        self._num_setbacks = 0
        text = answered(self._batch.id, index, self._lines[index].custom_id, answer)
        self._fresh.append(Result(index, not answer.is_success, text, usage_of(answer.body)))
        self._num_fresh_bytes += len(text)
        if self._num_fresh_bytes > _FLUSH_BYTES:
            self._is_full.set()

    def _pause(self, retry_after_s: float) -> None:
        """Begin no lines for a while, which grows with each refusal after the last one."""
        now = asyncio.get_running_loop().time()
        if now < self._paused_until:
            return
        pause_s = max(retry_after_s, _FIRST_PAUSE_S * 2 ** min(self._num_setbacks, 10))
        self._num_setbacks = _HELD_UP_SETBACKS if retry_after_s >= _HELD_UP_S else self._num_setbacks + 1
        self._paused_until = now + min(pause_s, _LONGEST_PAUSE_S) * random.uniform(0.8, 1.2)

    async def _until_it_shall_end(self) -> BatchStatus:
        while True:
            with suppress(BatchStoreAwayError):  # if it stays away, the lease is lost
                if await self._desk.run(lambda: self._desk.ledger.is_cancelled(self._batch)):
                    return BatchStatus.CANCELLED
            if self._desk.clock() >= self._batch.expires_at:
                return BatchStatus.EXPIRED
            await asyncio.sleep(_LOOK_S)

    async def _flush_for_ever(self) -> None:
        clock = asyncio.get_running_loop().time
        started = clock()
        while True:
            pause_s = min(max(_FLUSH_S, _FLUSH_SHARE * (clock() - started)), _LONGEST_FLUSH_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._is_full.wait()
            self._is_full.clear()
            with suppress(BatchStoreAwayError):
                await self._flush()

    async def _flush(self) -> None:
        """Keep the results that are new."""
        fresh = self._fresh
        if not fresh:
            return
        self._fresh, num_bytes = [], self._num_fresh_bytes
        try:
            await self._desk.run(lambda: self._book.add(fresh))
        except BaseException:
            self._fresh = fresh + self._fresh
            raise
        self._num_fresh_bytes -= num_bytes
        self._has_flushed.set()
        await self._on_kept()


class _LineSource:
    """Reads lines from the file, several at a time where they follow on each other."""

    def __init__(self, desk: BatchDesk, batch: BatchRecord, lines: Sequence[InputLine]) -> None:
        self._desk = desk
        self._batch = batch
        self._lines = lines
        self._start, self._block = 0, b""

    async def request(self, index: int) -> LineRequest:
        """What a line asks for."""
        line = self._lines[index]
        if not self._start <= line.start <= line.end <= self._start + len(self._block):
            end = max(line.end, min(line.start + _READ_BYTES, self._batch.num_input_bytes))
            file_id = self._batch.input_file_id
            self._block = await self._desk.run(lambda: self._desk.files.read(file_id, line.start, end))
            self._start = line.start
        return request_of(self._block[line.start - self._start : line.end - self._start])


async def _end(tasks: Sequence["asyncio.Task[Any]"]) -> None:
    """Cancel tasks and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
