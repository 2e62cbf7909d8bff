"""`JsonLinesRecord`: entries in a file, one JSON object a line."""

import fcntl
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from deployments.errors import RecordAwayError
from deployments.usage.entries import Entry, Spent, UsageQuery, UsageRow
from deployments.usage.sums import Sums

logger = logging.getLogger("ray.serve")

_CHUNK_BYTES = 4 << 20
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Entry).decode


class JsonLinesRecord:
    """A `Record` in a file that is only ever appended to.

    Several processes may share the file: each reads what the others have appended before it appends. What the file
    holds is summed up in memory, so that asking does not read it again.

    Args:
        path: the file; it is created if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None
        self._inode = 0
        self._offset = 0
        self._sums = Sums()

    def append(self, entries: Sequence[Entry]) -> None:
        """See `Record`."""
        with self._locked() as fd:
            news = self._sums.news(entries)
            if not news:
                return
            left = memoryview(b"".join(_encode(entry) + b"\n" for entry in news))
            while left:
                left = left[os.write(fd, left) :]
            os.fdatasync(fd)
            self._catch_up(fd)

    def rows(self, query: UsageQuery) -> list[UsageRow]:
        """See `Record`."""
        with self._locked():
            return self._sums.rows(query)

    def spent(self, keys: Sequence[str], today: str) -> dict[str, Spent]:
        """See `Record`."""
        with self._locked():
            return self._sums.spent(keys, today)

    def close(self) -> None:
        """See `Record`."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """The file's descriptor, while nobody else writes to it and everything in it is known.

        Raises:
            RecordAwayError: the file cannot be read or written.
        """
        try:
            fd = self._open()
            fcntl.flock(fd, fcntl.LOCK_EX)
            try:
                self._catch_up(fd)
                yield fd
            finally:
                fcntl.flock(fd, fcntl.LOCK_UN)
        except OSError as error:
            self.close()  # a part may have been written: begin again with what the file then holds
            raise RecordAwayError(f"{self._path}: {error.strerror or type(error).__name__}") from error

    def _open(self) -> int:
        """The file's descriptor. After a rotation it is a new file, and what the old one held still counts."""
        if self._fd is not None:
            try:
                is_same = self._path.stat().st_ino == self._inode
            except FileNotFoundError:
                is_same = False
            if is_same:
                return self._fd
            self.close()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        inode = os.fstat(fd).st_ino
        if inode != self._inode:
            self._inode, self._offset = inode, 0
        self._fd = fd
        return fd

    def _catch_up(self, fd: int) -> None:
        """Add up what has been appended since the last time; end a line that a killed process left unfinished."""
        rest = b""
        while data := os.pread(fd, _CHUNK_BYTES, self._offset + len(rest)):
            *lines, rest = (rest + data).split(b"\n")
            self._sums.add(_parsed(lines, self._path))
            self._offset += sum(map(len, lines)) + len(lines)
        if rest:
            os.write(fd, b"\n")
            self._offset += len(rest) + 1
            self._sums.add(_parsed([rest], self._path))


def _parsed(lines: Sequence[bytes], path: Path) -> Iterator[Entry]:
    for line in lines:
        if line.strip():
            try:
                yield _decode(line)
            except msgspec.MsgspecError:
                logger.error("a line of %s is no entry of the record and does not count", path)
