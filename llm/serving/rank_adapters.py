"""Adapters of a model that is split across several ranks: each rank has its part of each, in the same slot.

Rank 0 decides what is read and copied, and where. A slot counts as filled once every rank has filled it, so steps name
slots and nothing else.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

import msgspec

from llm.errors import AdapterChangedError, CheckpointError, LLMError
from llm.schemas import AdapterRef
from llm.serving.adapter_copies import AdapterCopies

T = TypeVar("T")


class ReadAdapter(msgspec.Struct, frozen=True, tag="read"):
    """Rank 0's order to read an adapter into a place in host memory."""

    adapter: dict[str, Any]
    """Fields of the `AdapterRef`."""
    place: int


class MoveAdapter(msgspec.Struct, frozen=True, tag="move"):
    """Rank 0's order to copy a place to a slot, behind the steps sent so far."""

    place: int
    slot: int
    rank: int
    """Of the adapter."""


AdapterOrder = ReadAdapter | MoveAdapter


class AdapterOutcome(msgspec.Struct, frozen=True):
    """What became of an order."""

    error: str | None = None
    """None if it is carried out."""
    has_changed: bool = False
    """See `AdapterChangedError`."""


def carry_out(copies: AdapterCopies, order: AdapterOrder, reply: Callable[[AdapterOutcome], None]) -> None:
    """Begin what rank 0 has ordered; the outcome is told from another thread."""
    future: Future[Any]
    if isinstance(order, ReadAdapter):
        future = copies.read(AdapterRef(**order.adapter), order.place)
    else:
        future = copies.move(order.place, order.slot, order.rank)
    future.add_done_callback(lambda done: reply(_outcome_of(done)))


class TaskGroup(Protocol):
    """What `RankAdapters` asks of a `RankGroup`."""

    def begin(self, content: object) -> Future[Sequence[Any]]:
        """See `RankGroup.begin`."""
        ...


class RankAdapters:
    """`AdapterCopies` of all ranks: what this one does, the others do too.

    Args:
        own: this rank's.
        group: the other ranks, which have as many places and slots.
    """

    def __init__(self, own: AdapterCopies, group: TaskGroup) -> None:
        self._own = own
        self._group = group

    @property
    def num_places(self) -> int:
        """See `AdapterCopies`."""
        return self._own.num_places

    def read(self, adapter: AdapterRef, place: int) -> Future[int]:
        """See `AdapterCopies.read`. A place is free again only when no rank reads into it any more."""
        others = self._group.begin(ReadAdapter(adapter.model_dump(), place))
        return _joined(self._own.read(adapter, place), others)

    def move(self, place: int, slot: int, rank: int) -> Future[None]:
        """See `AdapterCopies.move`."""
        others = self._group.begin(MoveAdapter(place, slot, rank))
        return _joined(self._own.move(place, slot, rank), others)

    def close(self) -> None:
        """See `AdapterCopies.close`; the other ranks end with their processes."""
        self._own.close()


def _joined(own: Future[T], others: Future[Sequence[Any]]) -> Future[T]:
    """The result of `own` once all ranks are done, or the first rank's error."""
    joined: Future[T] = Future()

    def finish() -> None:
        try:
            result = own.result()
            for rank, outcome in enumerate(others.result(), start=1):
                _raise_failure(rank, msgspec.convert(outcome, AdapterOutcome))
        except BaseException as error:  # noqa: BLE001  # whoever waits for the future gets it
            joined.set_exception(error)
        else:
            joined.set_result(result)

    own.add_done_callback(lambda _: others.add_done_callback(lambda _: finish()))
    return joined


def _raise_failure(rank: int, outcome: AdapterOutcome) -> None:
    if outcome.error is not None:
        kind = AdapterChangedError if outcome.has_changed else CheckpointError
        raise kind(f"on rank {rank}: {outcome.error}")


def _outcome_of(future: Future[Any]) -> AdapterOutcome:
    error = future.exception()
    if error is None:
        return AdapterOutcome()
    message = str(error) if isinstance(error, LLMError) else f"{type(error).__name__}: {error}"
    return AdapterOutcome(message, isinstance(error, AdapterChangedError))
