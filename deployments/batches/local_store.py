"""A `Store` in a directory, which may be on a network file system that several nodes share."""

import os
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from deployments.batches.store import ByteRange

_UNFINISHED = ".unfinished"
_ATTEMPTS = 100


class LocalStore:
    """A `Store` in a directory. Everything is written under another name first, and then linked or renamed.

    Args:
        root: the directory; made if it does not exist, for this user only.

    Raises:
        OSError: it cannot be made or written.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._unfinished = root / _UNFINISHED
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._unfinished.mkdir(exist_ok=True, mode=0o700)

    def read(self, name: str) -> bytes:
        """See `Store.read`."""
        return (self._root / name).read_bytes()

    def read_ranges(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        """See `Store.read_ranges`."""
        return [self._read_range(one) for one in ranges]

    def _read_range(self, one: ByteRange) -> bytes:
        with (self._root / one.name).open("rb") as file:
            file.seek(one.start)
            return file.read(one.end - one.start)

    def write(self, name: str, data: bytes) -> None:
        """See `Store.write`."""
        writer = self.writer(name)
        writer.write(data)
        writer.commit()

    def create(self, name: str, data: bytes) -> bool:
        """See `Store.create`. A hard link fails if its name exists, on network file systems too."""
        writer = self.writer(name)
        writer.write(data)
        try:
            writer.move(os.link)
        except FileExistsError:
            return False
        finally:
            writer.abort()
        return True

    def writer(self, name: str) -> "LocalWriter":
        """See `Store.writer`."""
        return LocalWriter(self._unfinished, self._root / name)

    def names(self, folder: str) -> list[str]:
        """See `Store.names`."""
        try:
            return sorted(os.listdir(self._root / folder))
        except FileNotFoundError:
            return []

    def delete(self, name: str) -> None:
        """See `Store.delete`. Folders go with the last object in them."""
        place = self._root / name
        place.unlink(missing_ok=True)
        for folder in place.relative_to(self._root).parents:
            if folder == Path():
                return
            try:
                (self._root / folder).rmdir()
            except OSError:
                return

    def drop_leftovers(self, min_age_s: float) -> None:
        """See `Store.drop_leftovers`."""
        for leftover in list(self._unfinished.iterdir()):
            with suppress(FileNotFoundError):
                if time.time() - leftover.stat().st_mtime >= min_age_s:
                    leftover.unlink()


class LocalWriter:
    """See `ObjectWriter`.

    Args:
        folder: where the bytes are until `commit`.
        place: where they go.
    """

    def __init__(self, folder: Path, place: Path) -> None:
        self._place = place
        self._path = folder / secrets.token_hex(12)
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._file = os.fdopen(descriptor, "wb")

    def write(self, data: bytes) -> None:
        """See `ObjectWriter.write`."""
        self._file.write(data)

    def commit(self) -> None:
        """See `ObjectWriter.commit`."""
        self.move(os.replace)

    def move(self, how: Callable[[Path, Path], None]) -> None:
        """Write everything to the disk, and give it its name.

        Args:
            how: `os.replace` or `os.link`.
        """
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        for attempt in range(1, _ATTEMPTS + 1):
            with suppress(FileExistsError, FileNotFoundError):  # others make and remove the same folder meanwhile
                self._place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            try:
                how(self._path, self._place)
                break
            except FileNotFoundError:  # somebody has just removed the folder, because it was empty
                if attempt == _ATTEMPTS:
                    raise
        _sync_folder(self._place.parent)

    def abort(self) -> None:
        """See `ObjectWriter.abort`."""
        self._file.close()
        self._path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Write a folder's names to the disk, so that they outlast a loss of power."""
    with suppress(FileNotFoundError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
