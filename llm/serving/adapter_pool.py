"""`AdapterPool`: which adapters are on the device and in host memory, and the requests that wait for theirs."""

import logging
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeVar

from llm.errors import AdapterChangedError, LLMError, RankLostError
from llm.scheduling.sequence import Sequence
from llm.schemas import AdapterFailure, AdapterRef
from llm.serving.adapter_copies import MOST_READINGS

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MOST_PASSING = 64
"""Requests for adapters on the device that may pass one whose adapter finds no slot."""
_MOST_INSPECTED = 512
"""Requests that a step looks at."""


class Copies(Protocol):
    """What reads adapters and copies them: `AdapterCopies`, or `RankAdapters` where there are several ranks."""

    @property
    def num_places(self) -> int:
        """Adapters that host memory holds."""
        ...

    def read(self, adapter: AdapterRef, place: int) -> Future[int]:
        """See `AdapterCopies.read`."""
        ...

    def move(self, place: int, slot: int, rank: int) -> Future[None]:
        """See `AdapterCopies.move`."""
        ...

    def close(self) -> None:
        """See `AdapterCopies.close`."""
        ...


@dataclass(frozen=True, slots=True)
class _Held:
    """An adapter in host memory: its place there, and its rank."""

    place: int
    rank: int


@dataclass(frozen=True, slots=True)
class LoadFailure:
    """Why an adapter could not be loaded: a message, and whose fault it is; None for that of a rank that is lost."""

    message: str
    kind: AdapterFailure | None


class AdapterPool:
    """Hands out the device's slots and the places in host memory, least recently used first.

    A request waits here, outside the scheduler's queue, until its adapter is in a slot. From then until the request
    ends the slot stays the adapter's, so a running row never waits for one. Threads read files and copy; the engine's
    thread only looks whether they are done. If all slots are taken, requests for adapters in slots may pass one that
    waits for a slot, but only so many: then a slot becomes free as the requests before it end.

    Not thread-safe: the engine's thread is the only caller and the only writer.

    Args:
        copies: reads adapters and copies them.
        num_slots: adapters that fit on the device.
    """

    def __init__(self, copies: Copies, num_slots: int) -> None:
        self._copies = copies
        self._waiting: deque[Sequence] = deque()
        self._held: OrderedDict[str, _Held] = OrderedDict()
        """Adapters in host memory by digest, the least recently used first."""
        self._slots: OrderedDict[str, int] = OrderedDict()
        """Slots of the adapters on the device, likewise."""
        self._free_places = list(range(copies.num_places))
        self._free_slots = list(range(num_slots))
        self._num_slots = num_slots
        self._readings: dict[str, tuple[int, Future[int]]] = {}
        """Places of adapters that are being read, and their ranks to come."""
        self._moves: dict[str, tuple[int, Future[None]]] = {}
        """Slots of adapters that are on their way from host memory."""
        self._num_users: Counter[str] = Counter()
        """Requests whose adapter must keep its slot: queued and running ones."""
        self._unwanted: set[str] = set()
        """Adapters to forget as soon as no request uses them."""
        self._num_passed = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def digests(self) -> tuple[str, ...]:
        """Adapters that are on the device or in host memory."""
        return tuple(self._held | self._slots)

    def add(self, sequence: Sequence) -> None:
        """Let a sequence, whose request has an adapter, wait for it."""
        self._unwanted.discard(_adapter_of(sequence).digest)
        self._waiting.append(sequence)

    def release(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended, whether it waits here or had its adapter."""
        if sequence.adapter_slot is None:
            if sequence in self._waiting:
                self._waiting.remove(sequence)
            return
        digest = _adapter_of(sequence).digest
        self._num_users[digest] -= 1
        if not self._num_users[digest]:
            del self._num_users[digest]
            if digest in self._unwanted:
                self.unload(digest)

    def unload(self, digest: str) -> bool:
        """Forget an adapter, once no request uses it or waits for it; False if there is nothing to forget."""
        is_wanted = any(_adapter_of(sequence).digest == digest for sequence in self._waiting)
        if self._num_users[digest] or digest in self._readings or digest in self._moves or is_wanted:
            self._unwanted.add(digest)
            return True
        self._unwanted.discard(digest)
        is_held = digest in self._held or digest in self._slots
        if digest in self._held:
            self._free_places.append(self._held.pop(digest).place)
        if digest in self._slots:
            self._free_slots.append(self._slots.pop(digest))
        return is_held

    def take(self, timeout_s: float) -> list[tuple[Sequence, LoadFailure | None]]:
        """The sequences whose adapter is in a slot now, or could not be loaded, then with the reason.

        Args:
            timeout_s: how long to wait if something is being read or copied.
        """
        futures: list[Future[Any]] = [future for _, future in self._readings.values()]
        futures += [future for _, future in self._moves.values()]
        if futures and timeout_s:
            wait(futures, timeout_s, return_when=FIRST_COMPLETED)
        errors = self._finish_readings() | self._finish_moves()
        taken: list[tuple[Sequence, LoadFailure | None]] = []
        is_behind = False
        for sequence in islice(self._waiting, _MOST_INSPECTED):
            digest = _adapter_of(sequence).digest
            if digest in errors:
                taken.append((sequence, errors[digest]))
            elif digest in self._slots and not (is_behind and self._num_passed >= _MOST_PASSING):
                self._num_passed += is_behind
                self._give(sequence, digest)
                taken.append((sequence, None))
            elif digest not in self._slots:
                is_behind = not self._bring(_adapter_of(sequence)) or is_behind
        if taken:
            gone = {sequence for sequence, _ in taken}
            self._waiting = deque(sequence for sequence in self._waiting if sequence not in gone)
        if not is_behind:
            self._num_passed = 0
        for digest in tuple(self._unwanted):
            self.unload(digest)
        return taken

    def check(self) -> None:
        """Assert that every slot and every place is free, held or being filled, once."""
        slots = [*self._free_slots, *self._slots.values(), *(slot for slot, _ in self._moves.values())]
        places = [*self._free_places, *(each.place for each in self._held.values())]
        places += [place for place, _ in self._readings.values()]
        assert sorted(slots) == list(range(self._num_slots)), "a slot has leaked"
        assert sorted(places) == list(range(self._copies.num_places)), "a place has leaked"
        assert all(digest in self._slots for digest in self._num_users), "an adapter in use has no slot"

    def close(self) -> None:
        """End the threads."""
        self._copies.close()

    def _give(self, sequence: Sequence, digest: str) -> None:
        self._slots.move_to_end(digest)
        if digest in self._held:
            self._held.move_to_end(digest)
        self._num_users[digest] += 1
        sequence.adapter_slot = self._slots[digest]

    def _bring(self, adapter: AdapterRef) -> bool:
        """Begin the next thing that an adapter needs to get into a slot; False if it needs a slot and finds none."""
        digest = adapter.digest
        if digest in self._moves or digest in self._readings:
            return True
        if digest in self._held:
            slot = self._find_slot()
            if slot is not None:
                self._held.move_to_end(digest)
                held = self._held[digest]
                self._moves[digest] = slot, self._copies.move(held.place, slot, held.rank)
            return slot is not None
        if len(self._readings) < MOST_READINGS:
            place = self._find_place()
            if place is not None:
                self._readings[digest] = place, self._copies.read(adapter, place)
        return True

    def _find_slot(self) -> int | None:
        """A free slot, or that of the least recently used adapter that no request uses; None if all are used."""
        if self._free_slots:
            return self._free_slots.pop()
        unused = next((digest for digest in self._slots if not self._num_users[digest]), None)
        return None if unused is None else self._slots.pop(unused)

    def _find_place(self) -> int | None:
        """The same in host memory, where an adapter that waits for a slot keeps its place."""
        if self._free_places:
            return self._free_places.pop()
        wanted = {_adapter_of(sequence).digest for sequence in self._waiting} - self._slots.keys()
        unused = next((digest for digest in self._held if digest not in self._moves and digest not in wanted), None)
        return None if unused is None else self._held.pop(unused).place

    def _finish_readings(self) -> dict[str, LoadFailure]:
        """Take in what has been read; what went wrong, by digest."""
        errors = {}
        for digest, place, future, failure in _ended(self._readings):
            if failure is None:
                self._held[digest] = _Held(place, future.result())
            else:
                self._free_places.append(place)
                errors[digest] = failure
        return errors

    def _finish_moves(self) -> dict[str, LoadFailure]:
        """Take in what has been copied; what went wrong, by digest."""
        errors = {}
        for digest, slot, _, failure in _ended(self._moves):
            if failure is None:
                self._slots[digest] = slot
            else:
                self._free_slots.append(slot)
                errors[digest] = failure
        return errors


def _ended(pending: dict[str, tuple[int, Future[T]]]) -> Iterator[tuple[str, int, Future[T], LoadFailure | None]]:
    """Take out what has ended: its digest, its place or slot, its future, and what went wrong."""
    for digest, (number, future) in list(pending.items()):
        if future.done():
            del pending[digest]
            error = future.exception()
            yield digest, number, future, None if error is None else _failure(error)


def _failure(error: BaseException) -> LoadFailure:
    message = str(error) if isinstance(error, LLMError) else f"{type(error).__name__}: {error}"
    logger.warning("an adapter could not be loaded: %s", message)
    if isinstance(error, RankLostError):
        return LoadFailure(message, None)
    kind = AdapterFailure.CHANGED if isinstance(error, AdapterChangedError) else AdapterFailure.UNREADABLE
    return LoadFailure(f"the adapter could not be loaded: {message}", kind)


def _adapter_of(sequence: Sequence) -> AdapterRef:
    adapter = sequence.request.adapter
    assert adapter is not None, "only those with one wait for it"
    return adapter
