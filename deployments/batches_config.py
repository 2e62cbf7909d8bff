"""Settings of files and batches; a part of `AppConfig`."""

from pathlib import Path

import fsspec
from pydantic import Field, field_validator

from llm.config import StrictModel

_DAY_S = 24 * 3600.0


class BatchesConfig(StrictModel):
    """Files and batches, `/v1/files` and `/v1/batches`: lines of a file that are answered like requests, in whatever
    capacity is idle."""

    store: str | None = None
    """Where files, batches and results are kept: a directory that all routers share, or a URL of fsspec such as
    `s3://bucket/folder`, whose package must be installed (`s3fs`). None to serve neither files nor batches.
    `memory://` is for trying it out: a single router keeps everything, until it ends."""
    max_file_bytes: int = Field(default=200 << 20, ge=1024)
    """Largest file; `limits.max_body_bytes` does not apply to uploads."""
    max_lines: int = Field(default=50_000, ge=1, le=1_000_000)
    """Most requests in one batch."""
    max_files_per_key: int = Field(default=1_000, ge=1)
    """Files that one API key may keep; results count."""
    max_batches_per_key: int = Field(default=100, ge=1)
    """Unfinished batches that one API key may have."""
    retention_s: float = Field(default=30 * _DAY_S, ge=60)
    """How long files are kept, unless a request asks for less, and batches after their completion window."""
    max_window_s: float = Field(default=7 * _DAY_S, ge=1)
    """Longest `completion_window` that a batch may ask for."""
    max_running: int = Field(default=4, ge=1, le=64)
    """Batches that one router runs at once."""
    max_concurrency: int = Field(default=256, ge=1, le=4096)
    """Lines that one router has open at once."""
    max_row_use: float = Field(default=0.75, gt=0, le=1)
    """Share of the replicas' rows (`engine.max_batch_size`) up to which batches fill them. What is above stays free for
    requests that do not wait; keep it below `target_row_use` of autoscaling, so that batches start no replicas."""
    lease_s: float = Field(default=10.0, ge=1)
    """A router that has not renewed its claim on a batch for this long has lost it to another router."""

    @field_validator("store")
    @classmethod
    def _check_store(cls, store: str | None) -> str | None:
        if store is not None and not store.removeprefix("file://").strip():
            raise ValueError("is empty; give a directory or a URL such as s3://bucket/folder, or leave it out")
        protocol, separator, _ = (store or "").removeprefix("file://").partition("://")
        if separator:
            try:
                fsspec.get_filesystem_class(protocol)
            except (ImportError, ValueError) as error:
                raise ValueError(f"{protocol}:// cannot be used here: {error}") from None
        return store

    @property
    def is_on(self) -> bool:
        """Whether files and batches are served."""
        return self.store is not None

    @property
    def is_shared(self) -> bool:
        """Whether several routers can use the store."""
        return self.store is None or not self.store.startswith("memory:")


def resolve_store(config: BatchesConfig) -> BatchesConfig:
    """The same settings with the store's directory made absolute: other processes have other working directories."""
    if config.store is None:
        return config
    place = config.store.removeprefix("file://")
    if "://" in place:
        return config
    return config.model_copy(update={"store": str(Path(place).expanduser().absolute())})
