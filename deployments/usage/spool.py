"""Where a router's entries wait until the record has them.

A spool is two files on the router's node. `*.spool` holds entries, one JSON object a line, and is locked while its
router lives; `*.open` holds what open requests have used so far. Both outlive a router that is killed: another router
of the node finds the unlocked file, adds an entry for each request that was open, and delivers what is left.
"""

import fcntl
import logging
import os
import uuid
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Protocol

import msgspec

from deployments.usage.entries import REFUSED, Entry, moment
from deployments.usage.open_requests import OpenRequests, last_number, left_open
from llm.errors import ConfigError

logger = logging.getLogger("ray.serve")

_SUFFIX, _OPEN_SUFFIX = ".spool", ".open"
_MAX_BATCH_BYTES = 256 << 10
_TRUNCATE_BYTES = 1 << 20
_MAX_IN_MEMORY = 100_000
_MAX_BATCH_UNWRITTEN = 1000
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Entry).decode


class Spool(Protocol):
    """Keeps a router's entries until the record has them. One user at a time."""

    writer: str

    def open(self, entry: Entry, at: float) -> int | None:
        """Note that a request begins; returns the number to name it by, None if it is not noted."""
        ...

    def note(self, number: int, count: int, at: float) -> None:
        """Note how many tokens an open request has generated, or how many requests were refused."""
        ...

    def add(self, entry: Entry, number: int | None) -> None:
        """Keep an entry; the open request of this number has ended."""
        ...

    def batch(self) -> list[Entry]:
        """The next entries to deliver, in order; the same ones until they are dropped."""
        ...

    def drop_batch(self) -> None:
        """Let go of the last batch: the record has it."""
        ...

    def close(self) -> None:
        """Let another router take what is left."""
        ...


class MemorySpool:
    """A `Spool` for where no record is kept. The oldest entries go if there are too many."""

    def __init__(self) -> None:
        self.writer = uuid.uuid4().hex
        self._entries: deque[Entry] = deque(maxlen=_MAX_IN_MEMORY)
        self._batch: list[Entry] = []

    def open(self, entry: Entry, at: float) -> int | None:  # noqa: ARG002 - see `Spool`
        """See `Spool`."""
        return None

    def note(self, number: int, count: int, at: float) -> None:
        """See `Spool`."""

    def add(self, entry: Entry, number: int | None) -> None:  # noqa: ARG002 - see `Spool`
        """See `Spool`."""
        self._entries.append(entry)

    def batch(self) -> list[Entry]:
        """See `Spool`."""
        if not self._batch:
            self._batch = [self._entries.popleft() for _ in range(min(len(self._entries), 1000))]
        return self._batch

    def drop_batch(self) -> None:
        """See `Spool`."""
        self._batch = []

    def close(self) -> None:
        """See `Spool`."""


class FileSpool:
    """A `Spool` that outlives its process.

    An entry that cannot be written, because the disk is full, waits in memory. It is written once there is room, or
    delivered from there, because the record may be elsewhere.

    Args:
        path: the file; it is created, or, if another router has left it, taken over.
        fd: its descriptor, locked.
        open_requests: the open requests of its router; None for a file that was taken over.
    """

    def __init__(self, path: Path, fd: int, open_requests: OpenRequests | None) -> None:
        self.writer = path.stem
        self._path = path
        self._fd = fd
        self._open = open_requests
        self._size = os.fstat(fd).st_size
        self._delivered = 0
        self._batch: list[Entry] = []
        self._batch_end = 0
        self._unwritten: deque[tuple[Entry, int | None]] = deque()
        self._is_full = False

    @classmethod
    def create(cls, directory: Path) -> "FileSpool":
        """The spool of a router that starts.

        Raises:
            ConfigError: the directory cannot be written to.
        """
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            path = directory / f"{uuid.uuid4().hex}{_SUFFIX}"
            new = path.with_suffix(".new")
            fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX)
            open_requests = OpenRequests(path.with_suffix(_OPEN_SUFFIX))
            new.rename(path)  # now that it is locked: an unlocked one would be taken for a dead router's
        except OSError as error:
            raise ConfigError(
                f"accounts.spool: {directory} cannot be written to ({error.strerror}); name a directory of this node"
            ) from None
        return cls(path, fd, open_requests)

    def open(self, entry: Entry, at: float) -> int | None:
        """See `Spool`."""
        return self._open.open(_encode(entry), at) if self._open is not None else None

    def note(self, number: int, count: int, at: float) -> None:
        """See `Spool`."""
        if self._open is not None:
            self._open.note(number, count, at)

    def add(self, entry: Entry, number: int | None) -> None:
        """See `Spool`. What it returns from is in the kernel's hands, and safe from the death of this process."""
        if self._open is not None:
            self._open.note_last(entry.seq)
        self._unwritten.append((entry, number))
        self._write_waiting()

    def batch(self) -> list[Entry]:
        """See `Spool`."""
        if not self._batch:
            self._write_waiting()
        while not self._batch and self._delivered < self._size:
            data = os.pread(self._fd, _MAX_BATCH_BYTES, self._delivered)
            whole = data[: data.rfind(b"\n") + 1]
            self._batch = list(_parsed(whole))
            self._batch_end = self._delivered + len(whole)
            if not self._batch:
                self._delivered = self._batch_end if whole else self._size
        if not self._batch:
            self._batch = [entry for entry, _ in islice(self._unwritten, _MAX_BATCH_UNWRITTEN)]
            self._batch_end = self._delivered
        return self._batch

    def drop_batch(self) -> None:
        """See `Spool`."""
        if self._batch:
            while self._unwritten and self._unwritten[0][0].seq <= self._batch[-1].seq:
                self._let_go_of_first()
            self._batch, self._delivered = [], self._batch_end
        if self._delivered == self._size > _TRUNCATE_BYTES:
            os.ftruncate(self._fd, 0)
            self._size = self._delivered = self._batch_end = 0

    @property
    def is_empty(self) -> bool:
        """Whether everything has been delivered."""
        return self._delivered >= self._size and not self._unwritten

    def close(self) -> None:
        """See `Spool`."""
        self._write_waiting()
        if self._open is not None:
            self._open.close()
        if self.is_empty:
            self.remove()
        else:
            os.close(self._fd)

    def remove(self) -> None:
        """Delete the files, whose entries the record has."""
        self._path.with_suffix(_OPEN_SUFFIX).unlink(missing_ok=True)
        self._path.unlink(missing_ok=True)
        os.close(self._fd)

    def _write_waiting(self) -> None:
        """Write the entries that are not in the file yet, as far as there is room."""
        try:
            while self._unwritten:
                self._write(self._unwritten[0][0])
                self._let_go_of_first()
        except OSError as error:
            if not self._is_full:
                logger.error("usage cannot be written to %s (%s); it waits in memory", self._path, error.strerror)
            self._is_full = True
        else:
            self._is_full = False

    def _let_go_of_first(self) -> None:
        """The first entry that waited is safe: if this process is killed, nobody need make one for its request."""
        _, number = self._unwritten.popleft()
        if number is not None and self._open is not None:
            self._open.free(number)

    def _write(self, entry: Entry) -> None:
        line = _encode(entry) + b"\n"
        try:
            num_written = os.write(self._fd, line)
            if num_written < len(line):
                raise OSError(0, "only a part of it fits")
        except OSError:
            os.ftruncate(self._fd, self._size)
            raise
        self._size += len(line)


def orphans(directory: Path) -> Iterator[FileSpool]:
    """The spools that routers of this node have left, each locked and complete. The caller closes them."""
    for path in sorted(directory.glob(f"*{_SUFFIX}")):
        try:
            fd = os.open(path, os.O_RDWR | os.O_APPEND)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_there = path.exists()  # whoever had the lock before may have deleted it
        except BlockingIOError:
            is_there = False
        if not is_there:
            os.close(fd)
            continue
        yield _complete(path, fd)


def _complete(path: Path, fd: int) -> FileSpool:
    """Add an entry for each request that was open when the spool's router was killed."""
    data = path.read_bytes()
    os.ftruncate(fd, data.rfind(b"\n") + 1)  # what follows was being written; its request counts as open
    spool = FileSpool(path, fd, None)
    known = list(_parsed(data[: data.rfind(b"\n") + 1]))
    ended = {entry.opened for entry in known}
    open_path = path.with_suffix(_OPEN_SUFFIX)
    left = open_path.read_bytes() if open_path.exists() else b""
    seq = max(last_number(left), *(entry.seq for entry in known), 0)
    for content, count, at in left_open(left):
        try:
            entry = _decode(content)
        except msgspec.MsgspecError:
            continue
        is_empty_tally = entry.outcome == REFUSED and not count
        if entry.opened not in ended and not is_empty_tally:
            seq += 1
            spool.add(_as_left(entry, seq, count, at), None)
    return spool


def _as_left(entry: Entry, seq: int, count: int, at: float) -> Entry:
    """The entry of a request that never ended, or of refusals that were still being counted."""
    field = "num_requests" if entry.outcome == REFUSED else "output_tokens"
    return msgspec.structs.replace(entry, seq=seq, at=moment(at), **{field: count})


def _parsed(data: bytes) -> Iterator[Entry]:
    for line in data.splitlines():
        try:
            yield _decode(line)
        except msgspec.MsgspecError:
            logger.error("a line of a spool with usage cannot be read and is left out")
