"""Results of a batch: kept bit by bit while it runs, and put in the order of its lines at the end.

Results are kept in parts, `work/BATCH/parts/LEASE-NUMBER`, which are written once. A part begins with a line that says
which results it holds; they follow. Whoever continues a batch reads these first lines, and runs the lines that have no
result yet. If two routers ever ran the same line, its first result counts and the other is left out.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec

from deployments.batches.line_usage import TokenUsage
from deployments.batches.store import ByteRange, Store, read_record

_AT_ONCE_BYTES, _AT_ONCE_LINES = 8 << 20, 256
"""How much of the results is read at once."""


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a line.

    Attributes:
        line: its index in the file, from 0.
        is_error: it belongs in the file of errors.
        text: the line for the file of results, without a line break.
        usage: its tokens.
    """

    line: int
    is_error: bool
    text: bytes
    usage: TokenUsage


class _Entry(msgspec.Struct, array_like=True, frozen=True):
    """A result in the first line of a part."""

    line: int
    is_error: bool
    num_bytes: int
    usage: TokenUsage = TokenUsage()


_encode = msgspec.json.encode
_decode = msgspec.json.Decoder(list[_Entry]).decode


def _split(part: bytes) -> tuple[int, list[_Entry]]:
    """Where a part's results begin, and which they are.

    Raises:
        msgspec.MsgspecError: it is damaged.
    """
    head, _, _ = part.partition(b"\n")
    entries = _decode(head)
    start = len(head) + 1
    if len(part) != start + sum(entry.num_bytes for entry in entries):
        raise msgspec.DecodeError("results are missing")
    return start, entries


@dataclass(frozen=True, slots=True)
class _Kept:
    """Where a result is."""

    is_error: bool
    place: ByteRange


class ResultBook:
    """The results of one batch. All methods block.

    Args:
        store: where the parts are.
        batch_id: the batch.
        lease_number: of the lease under which parts are written, so that no two routers use the same name.
    """

    def __init__(self, store: Store, batch_id: str, lease_number: int) -> None:
        self._store = store
        self._folder = f"work/{batch_id}/parts"
        self._lease_number = lease_number
        self._num_parts = 0
        self._adding = threading.Lock()
        self._kept: dict[int, _Kept] = {}
        self.num_failed = 0
        """Results that are errors."""
        self.usage = TokenUsage()
        """Tokens of all results."""

    @property
    def num_completed(self) -> int:
        """Results that are answers."""
        return len(self._kept) - self.num_failed

    def has(self, line: int) -> bool:
        """Whether a line has a result."""
        return line in self._kept

    def load(self) -> None:
        """Find the results that are there already. Lines whose results are damaged run again."""
        for name in self._store.names(self._folder):
            part = read_record(self._store, f"{self._folder}/{name}", _split)
            if part is not None:
                self._note(name, *part)

    def add(self, results: Sequence[Result]) -> None:
        """Keep results, so that they outlast this process. Lines that have a result already keep that one."""
        with self._adding:
            self._add([result for result in results if result.line not in self._kept])

    def _add(self, results: Sequence[Result]) -> None:
        if not results:
            return
        entries = [_Entry(result.line, result.is_error, len(result.text), result.usage) for result in results]
        head = _encode(entries)
        self._num_parts += 1
        name = f"{self._lease_number:08d}-{self._num_parts:08d}"
        self._store.write(f"{self._folder}/{name}", b"".join((head, b"\n", *(result.text for result in results))))
        self._note(name, len(head) + 1, entries)

    def is_error(self, line: int) -> bool:
        """Whether the result of a line is an error."""
        return self._kept[line].is_error

    def texts(self, wanted: Sequence[int]) -> Iterator[bytes]:
        """The results of these lines, which have one."""
        first = 0
        while first < len(wanted):
            end, num_bytes = first, 0
            while end < len(wanted) and end - first < _AT_ONCE_LINES and num_bytes < _AT_ONCE_BYTES:
                place = self._kept[wanted[end]].place
                num_bytes += place.end - place.start
                end += 1
            lines = wanted[first:end]
            yield from self._store.read_ranges([self._kept[line].place for line in lines])
            first = end

    def drop(self) -> None:
        """Remove all parts: the batch has ended."""
        for name in self._store.names(self._folder):
            self._store.delete(f"{self._folder}/{name}")

    def _note(self, name: str, start: int, entries: Sequence[_Entry]) -> None:
        for entry in entries:
            place = ByteRange(f"{self._folder}/{name}", start, start + entry.num_bytes)
            if entry.line not in self._kept:
                self._kept[entry.line] = _Kept(entry.is_error, place)
                self.num_failed += entry.is_error
                self.usage = self.usage.plus(entry.usage)
            start += entry.num_bytes
