"""Which router runs a batch: the one that holds its lease.

A lease is a file with a number, `work/BATCH/lease/NUMBER`; the highest number holds. Making a file that does not exist
is the only thing that a store must do atomically: of all routers that want to take a batch over from the holder of
number 7, one makes number 8. The holder rewrites its file again and again. Others do not compare clocks: they take the
batch over when the file has not changed for `lease_s` of their own time. Results do not depend on any of this; see
`results`. It keeps two routers from doing the same work.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import msgspec

from deployments.batches.errors import BatchStoreAwayError, LeaseLostError
from deployments.batches.store import Store, read_record

_encode = msgspec.json.encode


class _Beat(msgspec.Struct, frozen=True):
    """Content of a lease's file; `number` grows, and -1 says that the holder has let go of the batch."""

    holder: str
    number: int


_decode = msgspec.json.Decoder(_Beat).decode
_RELEASED = -1


@dataclass(frozen=True, slots=True)
class _Sight:
    """What a lease looked like, and when it was first seen like that."""

    number: int
    beat: _Beat | None
    since: float


class LeaseBook:
    """Takes leases for one router. All methods block.

    Args:
        store: where the leases are.
        holder: the router's name.
        lease_s: how long a lease holds without being renewed.
        clock: seconds; monotonic.
    """

    def __init__(self, store: Store, holder: str, lease_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._holder = holder
        self._lease_s = lease_s
        self._clock = clock
        self._seen: dict[str, _Sight] = {}

    def is_free(self, batch_id: str) -> bool:
        """Whether nobody runs a batch, as far as can be seen. It has to be asked again and again."""
        number = self._last(batch_id)
        beat = self._beat(batch_id, number)
        seen = self._seen.get(batch_id)
        if seen is None or (seen.number, seen.beat) != (number, beat):
            seen = self._seen[batch_id] = _Sight(number, beat, self._clock())
        if number == 0 or (beat is not None and beat.number == _RELEASED):
            return True
        return self._clock() - seen.since > self._lease_s

    def take(self, batch_id: str) -> "Lease | None":
        """Take the lease of a batch that `is_free`; None if another router has been faster."""
        seen = self._seen.pop(batch_id, None)
        number = (seen.number if seen is not None else self._last(batch_id)) + 1
        if not self._store.create(_name(batch_id, number), _encode(_Beat(self._holder, 0))):
            return None
        if self._last(batch_id) != number:  # this was about a lease of long ago, whose file had been removed
            self._store.delete(_name(batch_id, number))
            return None
        for earlier in _numbers(self._store, batch_id):
            if earlier < number:
                self._store.delete(_name(batch_id, earlier))
        return Lease(self._store, batch_id, number, self._holder, self._lease_s, self._clock)

    def forget(self, batch_ids: set[str]) -> None:
        """Keep in mind these batches only."""
        self._seen = {batch_id: seen for batch_id, seen in self._seen.items() if batch_id in batch_ids}

    def _last(self, batch_id: str) -> int:
        return max(_numbers(self._store, batch_id), default=0)

    def _beat(self, batch_id: str, number: int) -> _Beat | None:
        if number == 0:
            return None
        return read_record(self._store, _name(batch_id, number), _decode)


class Lease:
    """A batch that this router runs, as long as it renews it. See `LeaseBook` for the arguments.

    Attributes:
        number: higher than that of any holder before.
    """

    def __init__(
        self, store: Store, batch_id: str, number: int, holder: str, lease_s: float, clock: Callable[[], float]
    ) -> None:
        self.batch_id = batch_id
        self.number = number
        self.interval_s = lease_s / 5
        self._store = store
        self._holder = holder
        self._lease_s = lease_s
        self._clock = clock
        self._num_beats = 0
        self._renewed_at = clock()

    def renew(self) -> None:
        """Say that the batch still runs here. Blocks.

        Raises:
            LeaseLostError: another router has it.
        """
        started = self._clock()
        if max(_numbers(self._store, self.batch_id), default=self.number + 1) != self.number:
            raise LeaseLostError(f"{self.batch_id} is run by another router")
        self._num_beats += 1
        self._store.write(_name(self.batch_id, self.number), _encode(_Beat(self._holder, self._num_beats)))
        self._renewed_at = started

    async def keep(self, run: Callable[[Callable[[], None]], Coroutine[Any, Any, None]]) -> None:
        """Renew it for ever, or until it is lost.

        Args:
            run: calls what blocks, in a thread.

        Raises:
            LeaseLostError: another router has it, or may have it, because the store could not be reached for too long.
        """
        while True:
            await asyncio.sleep(self.interval_s)
            try:
                async with asyncio.timeout(self._lease_s - self.interval_s):
                    await run(self.renew)
            except (BatchStoreAwayError, TimeoutError):
                if self._clock() - self._renewed_at > self._lease_s - self.interval_s:
                    raise LeaseLostError(f"the lease of {self.batch_id} could not be renewed") from None

    def release(self) -> None:
        """Let other routers have the batch at once. Blocks."""
        if max(_numbers(self._store, self.batch_id), default=0) == self.number:
            self._store.write(_name(self.batch_id, self.number), _encode(_Beat(self._holder, _RELEASED)))

    def drop(self) -> None:
        """Remove all traces: the batch has ended. Blocks."""
        for number in _numbers(self._store, self.batch_id):
            self._store.delete(_name(self.batch_id, number))


def _numbers(store: Store, batch_id: str) -> list[int]:
    return [int(name) for name in store.names(_folder(batch_id)) if name.isdigit()]


def _name(batch_id: str, number: int) -> str:
    return f"{_folder(batch_id)}/{number:08d}"


def _folder(batch_id: str) -> str:
    return f"work/{batch_id}/lease"
