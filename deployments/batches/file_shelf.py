"""`FileShelf`: the files of each API key."""

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import msgspec

from deployments.batches.errors import BatchRefusedError, RefusalKind, no_such_file
from deployments.batches.records import FileRecord, Purpose, created_at_of, is_file_id, is_upload_id, new_file_id
from deployments.batches.store import ByteRange, ObjectWriter, Store, read_record
from deployments.batches_config import BatchesConfig

LONGEST_UPLOAD_S = 24 * 3600.0
"""An upload that has not ended after this time never will."""
_CONTENT = "content"
_encode = msgspec.json.encode
_decode = msgspec.json.Decoder(FileRecord).decode


def folder_of(owner: str) -> str:
    """The folder of an API key's records: a digest, because the key's name may hold anything."""
    return hashlib.sha256(owner.encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Page:
    """Which part of a list is asked for.

    Attributes:
        limit: most entries.
        after: id of the last entry of the page before; None for the first page.
        is_ascending: the oldest first.
    """

    limit: int
    after: str | None = None
    is_ascending: bool = False

    def ids(self, ids: Sequence[str]) -> list[str]:
        """All ids from the beginning of this page on, in its order; more than the page holds."""
        found = sorted(ids, reverse=not self.is_ascending)
        if self.after is None:
            return found
        after = self.after
        return [one for one in found if (one > after if self.is_ascending else one < after)]


class FileShelf:
    """Keeps files. All methods block; none changes what it was given.

    A file exists from the moment its record does, which is written after its content.

    Args:
        store: where they are kept.
        config: their bounds.
        clock: seconds since 1970.
    """

    def __init__(self, store: Store, config: BatchesConfig, clock: Callable[[], float]) -> None:
        self._store = store
        self._config = config
        self._clock = clock

    def begin(self, owner: str) -> "Upload":
        """Begin to write a file that a client sends.

        Raises:
            BatchRefusedError: this key has too many files.
        """
        most = self._config.max_files_per_key
        if len(self._store.names(_records(owner))) >= most:
            raise BatchRefusedError(
                RefusalKind.INVALID, f"This API key has {most} files; delete some", code="too_many_files"
            )
        return self.begin_as(owner, new_file_id(self._clock()), self._config.max_file_bytes)

    def begin_as(self, owner: str, file_id: str, max_bytes: int | None = None) -> "Upload":
        """Begin to write a file with this id, in place of one that has it."""
        return Upload(self, owner, file_id, self._store.writer(_content(file_id)), max_bytes)

    def keep(self, owner: str, file_id: str, filename: str, purpose: Purpose, num_bytes: int,
             expires_after_s: float | None) -> FileRecord:  # fmt: skip
        """Write the record of a file whose content is complete."""
        now = self._clock()
        lifetime_s = min(expires_after_s or self._config.retention_s, self._config.retention_s)
        record = FileRecord(file_id, filename, purpose, num_bytes, int(now), int(now + lifetime_s))
        self._store.write(_record(owner, file_id), _encode(record))
        return record

    def get(self, owner: str, file_id: str, param: str | None = None) -> FileRecord:
        """A file's record.

        Raises:
            BatchRefusedError: there is no such file, or it is another key's; `param` names the field that asks for it.
        """
        record = self._find(owner, file_id)
        if record is None:
            raise no_such_file(file_id, param)
        return record

    def read(self, file_id: str, start: int, end: int) -> bytes:
        """Bytes of a file that is known to exist.

        Raises:
            FileNotFoundError: it has been deleted meanwhile.
        """
        return self._store.read_ranges([ByteRange(_content(file_id), start, end)])[0]

    def has_content(self, file_id: str) -> bool:
        """Whether a file's content is in the store."""
        try:
            self.read(file_id, 0, 1)
        except FileNotFoundError:
            return False
        return True

    def page(self, owner: str, page: Page, purpose: str | None = None) -> tuple[list[FileRecord], bool]:
        """A page of an API key's files, and whether there are more."""
        found: list[FileRecord] = []
        for file_id in page.ids(self._store.names(_records(owner))):
            record = self._find(owner, file_id)
            if record is None or (purpose is not None and record.purpose != purpose):
                continue
            if len(found) == page.limit:
                return found, True
            found.append(record)
        return found, False

    def delete(self, owner: str, file_id: str) -> None:
        """Delete a file.

        Raises:
            BatchRefusedError: see `get`.
        """
        self.get(owner, file_id)
        self._store.delete(_record(owner, file_id))
        self._store.delete(_content(file_id))

    def sweep(self, in_use: Collection[str] = ()) -> None:
        """Delete the files whose time is over, and content whose upload ended without a record.

        Args:
            in_use: ids of files that are still read.
        """
        content = self._store.names(_CONTENT)  # before the records, which are written after it
        kept: set[str] = set(in_use)
        for folder in self._store.names("files"):
            for file_id in filter(is_file_id, self._store.names(f"files/{folder}")):
                if not self._is_over(f"files/{folder}/{file_id}"):
                    kept.add(file_id)
                elif file_id not in kept:
                    self._store.delete(f"files/{folder}/{file_id}")
                    self._store.delete(_content(file_id))
        lost_before = self._clock() - LONGEST_UPLOAD_S
        for file_id in content:
            if file_id not in kept and is_upload_id(file_id) and created_at_of(file_id) < lost_before:
                self._store.delete(_content(file_id))
        self._store.drop_leftovers(LONGEST_UPLOAD_S)

    def _find(self, owner: str, file_id: str) -> FileRecord | None:
        return self._read(_record(owner, file_id)) if is_file_id(file_id) else None

    def _read(self, name: str) -> FileRecord | None:
        """A record; None if there is none, or its time is over."""
        record = read_record(self._store, name, _decode)
        return record if record is not None and record.expires_at > self._clock() else None

    def _is_over(self, name: str) -> bool:
        """Whether a file's time is over. A record that cannot be read says nothing of it."""
        record = read_record(self._store, name, _decode)
        return record is not None and record.expires_at <= self._clock()


class Upload:
    """A file that is being written.

    Args:
        shelf: where it goes.
        owner: the API key.
        file_id: its id.
        writer: takes its content.
        max_bytes: most bytes; None for no bound.
    """

    def __init__(self, shelf: FileShelf, owner: str, file_id: str, writer: ObjectWriter, max_bytes: int | None) -> None:
        self.num_bytes = 0
        self._shelf = shelf
        self._owner = owner
        self._file_id = file_id
        self._writer = writer
        self._max_bytes = max_bytes

    def write(self, data: bytes) -> None:
        """Add bytes.

        Raises:
            BatchRefusedError: the file becomes too large.
        """
        self.num_bytes += len(data)
        if self._max_bytes is not None and self.num_bytes > self._max_bytes:
            raise BatchRefusedError(
                RefusalKind.TOO_LARGE, f"The file is larger than {self._max_bytes} bytes; split it", param="file",
                code="file_too_large",
            )  # fmt: skip
        self._writer.write(data)

    def keep(self, filename: str, purpose: Purpose, expires_after_s: float | None = None) -> FileRecord:
        """Make the file appear.

        Args:
            filename: what its owner calls it.
            purpose: what it is for.
            expires_after_s: how long it is kept; None for as long as the server keeps files.
        """
        self._writer.commit()
        return self._shelf.keep(self._owner, self._file_id, filename, purpose, self.num_bytes, expires_after_s)

    def abort(self) -> None:
        """Drop what has been written."""
        self._writer.abort()


def _records(owner: str) -> str:
    return f"files/{folder_of(owner)}"


def _record(owner: str, file_id: str) -> str:
    return f"{_records(owner)}/{file_id}"


def _content(file_id: str) -> str:
    return f"{_CONTENT}/{file_id}"
