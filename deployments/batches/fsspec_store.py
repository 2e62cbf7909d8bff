"""A `Store` behind fsspec: object storage such as S3, or this process' memory."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from errno import EIO
from typing import Any

import fsspec

from deployments.batches.store import ByteRange
from llm.errors import ConfigError

_creating = threading.Lock()
"""fsspec's memory looks whether a name exists and then uses it, which another thread may do meanwhile."""


class FsspecStore:
    """A `Store` behind fsspec. The file system must put whole objects at once, as object storage does.

    Args:
        url: such as `s3://bucket/folder`. Credentials and addresses come from the environment, as fsspec documents.

    Raises:
        ConfigError: no installed package serves this kind of URL.
    """

    def __init__(self, url: str) -> None:
        try:
            # Listings must be those of this moment: other routers write too.
            self._files, root = fsspec.core.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"batches.store: {url}: {error}") from None
        self._root = root.rstrip("/")

    def read(self, name: str) -> bytes:
        """See `Store.read`."""
        with _plain_errors():
            return bytes(self._files.cat_file(self._path(name)))

    def read_ranges(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        """See `Store.read_ranges`."""
        paths = [self._path(one.name) for one in ranges]
        with _plain_errors():
            found = self._files.cat_ranges(
                paths, [one.start for one in ranges], [one.end for one in ranges], on_error="raise"
            )
        return [bytes(data) for data in found]

    def write(self, name: str, data: bytes) -> None:
        """See `Store.write`."""
        with _plain_errors():
            self._files.pipe_file(self._path(name), data)

    def create(self, name: str, data: bytes) -> bool:
        """See `Store.create`."""
        with _creating:
            try:
                with _plain_errors():
                    self._files.pipe_file(self._path(name), data, mode="create")
            except FileExistsError:
                return False
        return True

    def writer(self, name: str) -> "FsspecWriter":
        """See `Store.writer`."""
        with _plain_errors():
            return FsspecWriter(self._files, self._path(name))

    def names(self, folder: str) -> list[str]:
        """See `Store.names`."""
        self._files.invalidate_cache()
        try:
            with _plain_errors():
                found = self._files.ls(self._path(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(name for name in (path.rstrip("/").rpartition("/")[2] for path in found) if name)

    def delete(self, name: str) -> None:
        """See `Store.delete`."""
        with suppress(FileNotFoundError), _plain_errors():
            self._files.rm_file(self._path(name))

    def drop_leftovers(self, min_age_s: float) -> None:
        """See `Store.drop_leftovers`: object storage removes unfinished uploads by a rule of the bucket."""

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


class FsspecWriter:
    """See `ObjectWriter`.

    Args:
        files: the file system.
        path: where the object goes.
    """

    def __init__(self, files: Any, path: str) -> None:
        self._file = files.open(path, "wb", autocommit=False)

    def write(self, data: bytes) -> None:
        """See `ObjectWriter.write`."""
        with _plain_errors():
            self._file.write(data)

    def commit(self) -> None:
        """See `ObjectWriter.commit`."""
        with _plain_errors():
            self._file.close()
            self._file.commit()

    def abort(self) -> None:
        """See `ObjectWriter.abort`."""
        if not self._file.closed:
            with suppress(OSError), _plain_errors():
                self._file.discard()


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Raise what the storage's own package raises as an `OSError`, which says that the store is away."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # the edge to packages whose errors have no class in common
        raise OSError(EIO, f"{type(error).__name__} of the store") from error
