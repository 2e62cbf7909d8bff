"""Opens the store that the configuration names."""

from pathlib import Path

from deployments.batches.fsspec_store import FsspecStore
from deployments.batches.local_store import LocalStore
from deployments.batches.store import Store
from llm.errors import ConfigError


def open_store(place: str) -> Store:
    """The store in a directory, or behind a URL of fsspec.

    Raises:
        ConfigError: the directory cannot be used, or no installed package serves this kind of URL; one line with the
            fix.
    """
    local = place.removeprefix("file://")
    if "://" in local:
        return FsspecStore(place)
    try:
        return LocalStore(Path(local).expanduser())
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(f"batches.store: {local} cannot be used: {reason}; name a directory to write in") from None
