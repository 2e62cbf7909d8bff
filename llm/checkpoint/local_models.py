"""Models that have been downloaded to this machine: those out of packages, and those of the Hub's cache."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm.checkpoint.packaged_models import PACKAGED_MODELS, find_packaged_model
from llm.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model that is here.

    Attributes:
        name: that `rayline serve` takes.
        path: where its files are.
        num_bytes: that they take.
        origin: where it came from, for people.
    """

    name: str
    path: Path
    num_bytes: int
    origin: str


def local_models() -> list[LocalModel]:
    """All of them, by name."""
    return sorted([*_out_of_packages(), *_of_the_hub()], key=lambda model: model.name.lower())


def remove_local_model(name: str) -> int:
    """Remove a model's files, all of its revisions; returns how many bytes that frees.

    Raises:
        CheckpointError: there is none of this name, or a file cannot be removed.
    """
    found = {model.name: model for model in local_models()}
    if name not in found:
        raise CheckpointError(
            f"{name} is not among the models that were downloaded: {', '.join(found) or 'there are none'}"
        )
    try:
        if name in PACKAGED_MODELS:
            found[name].path.unlink()
        else:
            cache = _hub_cache()
            revisions = [
                revision.commit_hash for repo in cache.repos if repo.repo_id == name for revision in repo.revisions
            ]
            cache.delete_revisions(*revisions).execute()
    except OSError as error:
        raise CheckpointError(f"{name} cannot be removed: {error}") from error
    return found[name].num_bytes


def _out_of_packages() -> Iterator[LocalModel]:
    for name in PACKAGED_MODELS:
        path = find_packaged_model(name)
        if path is not None:
            yield LocalModel(name, path, path.stat().st_size, "package")


def _of_the_hub() -> Iterator[LocalModel]:
    cache = _hub_cache()
    for repo in () if cache is None else cache.repos:
        if repo.repo_type == "model":
            yield LocalModel(repo.repo_id, Path(repo.repo_path), repo.size_on_disk, "Hub")


def _hub_cache() -> Any:
    """What huggingface_hub knows of its cache; None where there is none."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        return scan_cache_dir()
    except CacheNotFound:
        return None
