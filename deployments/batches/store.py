"""`Store`: where files and batches are kept. All routers of a deployment use the same one, and nothing else."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, TypeVar

import msgspec

T = TypeVar("T")

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Part of an object: from byte `start` up to, not including, byte `end`."""

    name: str
    start: int
    end: int


class ObjectWriter(Protocol):
    """An object that is being written. Nobody sees it before `commit`."""

    def write(self, data: bytes) -> None:
        """Add bytes."""
        ...

    def commit(self) -> None:
        """Make the object appear as a whole, in place of one with the same name."""
        ...

    def abort(self) -> None:
        """Drop what has been written. No effect after `commit`."""
        ...


class Store(Protocol):
    """Objects by name. A name is a path such as `folder/name`; folders exist as long as something is in them.

    All methods block, may be called from any thread, and raise `OSError` if the store cannot be read or written.
    """

    def read(self, name: str) -> bytes:
        """The whole object.

        Raises:
            FileNotFoundError: there is none.
        """
        ...

    def read_ranges(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        """Parts of objects, in the order of `ranges`. A range past the object's end gives what there is.

        Raises:
            FileNotFoundError: an object is missing.
        """
        ...

    def write(self, name: str, data: bytes) -> None:
        """Replace an object. Others read the old bytes or the new ones, never a mixture."""
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Make an object that does not exist yet. If several do so at once, one of them gets True."""
        ...

    def writer(self, name: str) -> ObjectWriter:
        """Write an object bit by bit."""
        ...

    def names(self, folder: str) -> list[str]:
        """Last parts of the names of everything directly in a folder, in order; empty if there is nothing."""
        ...

    def delete(self, name: str) -> None:
        """Remove an object. No effect if there is none."""
        ...

    def drop_leftovers(self, min_age_s: float) -> None:
        """Remove what writers that died have left, if it is at least this old."""
        ...


def read_record(store: Store, name: str, decode: Callable[[bytes], T]) -> T | None:
    """What an object says; None if there is none, or if it is damaged, so that one such object holds up no other."""
    try:
        return decode(store.read(name))
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError:
        _note_damaged(name)
        return None


@lru_cache(maxsize=1000)
def _note_damaged(name: str) -> None:
    """Log an object once."""
    logger.error("%s in the store of batches is damaged and is left out", name)
