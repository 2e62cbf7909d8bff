"""Where a checkpoint's files are: a directory, a GGUF file, or a repository of the Hugging Face Hub."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from llm.checkpoint.json_files import is_pointer, pointer_fault
from llm.checkpoint.packaged_models import PACKAGED_MODELS, find_packaged_model
from llm.errors import CheckpointError

_FILES = ("*.safetensors", "*.json", "*.jinja")
_FILES_LEFT_OUT = ("original/*", "onnx/*", "consolidated*.safetensors")
_GGUF_MAGIC = b"GGUF"
_TIMEOUT_S = 5
"""Time that the Hub has to answer at all; downloads of files may take longer."""


def resolve_model_path(model: str) -> Path:
    """Directory of a checkpoint: `model` itself, or a download of the Hub repository of that name (or its cache).

    A GGUF file, and a directory that holds nothing else, becomes a directory of the cache. The names of
    `PACKAGED_MODELS` stand for their files, once these are there.

    Raises:
        CheckpointError: none of these is there, or a GGUF file cannot be read; one line with the fix.
    """
    found = find_local_checkpoint(model)
    if found is not None:
        return found
    if Path(model).expanduser().exists():
        if is_pointer(Path(model).expanduser()):
            raise CheckpointError(pointer_fault(model))
        raise CheckpointError(
            f"{model} is a file, but not a GGUF file; give the directory that holds config.json and the weights"
        )
    if model in PACKAGED_MODELS:
        raise CheckpointError(f"{model} is not here yet; get it with: rayline pull {model}")
    if Path(model).is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise CheckpointError(
            f"{model}: no such directory; give a checkpoint's directory, a GGUF file or a Hub id such as org/name"
        )
    return _download(model)


def find_local_checkpoint(model: str) -> Path | None:
    """Directory of a checkpoint that is on this machine already; None if `model` names none.

    Raises:
        CheckpointError: a GGUF file cannot be read.
    """
    path = Path(model).expanduser()
    file = path if is_gguf(path) else _only_gguf(path) if path.is_dir() else find_packaged_model(model)
    if file is not None:
        from llm.checkpoint.gguf_directory import as_directory  # brings NumPy

        return as_directory(file)
    return path if path.is_dir() else None


def is_gguf(path: str | Path) -> bool:
    """Whether there is a file of this name that begins as GGUF files do, whatever its suffix."""
    try:
        with Path(path).open("rb") as file:
            return file.read(len(_GGUF_MAGIC)) == _GGUF_MAGIC
    except OSError:
        return False


def _only_gguf(directory: Path) -> Path | None:
    """The GGUF file of a directory without config.json; None if there is none.

    Raises:
        CheckpointError: there are several.
    """
    if (directory / "config.json").exists():
        return None
    every = sorted(directory.glob("*.gguf"))
    found = [path for path in every if "mmproj" not in path.name.lower()] or every  # a part that sees images
    if len(found) > 1 and all("-of-" in path.name for path in found):
        return found[0]  # which says that it is one of several parts
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:3])
        raise CheckpointError(f"{directory} holds several GGUF files ({names}); name one of them")
    return found[0] if found else None


def hub_origin(model: str, directory: Path) -> str | None:
    """Where another machine gets what `resolve_model_path` has downloaded for a Hub id: `org/name@revision`; None if it
    is not a download."""
    return f"{model}@{directory.name}" if directory.parent.name == "snapshots" else None


def fetch_origin(origin: str, files: Sequence[str]) -> Path:
    """Directory with these files of what `hub_origin` names, downloaded now or before.

    Raises:
        CheckpointError: it cannot be had; one line with the fix.
    """
    model, _, revision = origin.rpartition("@")
    return _download(model, revision, files)


def _download(model: str, revision: str | None = None, allowed: Sequence[str] = _FILES) -> Path:
    """Download a repository of the Hub, or find it in the cache if the Hub does not answer within a few seconds.

    Args:
        revision: the commit; None for the latest one.
        allowed: patterns of the files to download.

    Raises:
        CheckpointError: it cannot be had; one line with the fix.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    files: dict[str, Any] = {"allow_patterns": list(allowed), "ignore_patterns": list(_FILES_LEFT_OUT)}
    try:
        # snapshot_download by itself waits for the Hub without an end.
        revision = HfApi().model_info(model, revision=revision, timeout=_TIMEOUT_S).sha
        return Path(snapshot_download(model, revision=revision, **files))
    except GatedRepoError as error:
        raise CheckpointError(f"{model} is gated on the Hub: accept its terms there, then set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{model} is not a directory here, and the Hub has no model of that name; a private one needs HF_TOKEN"
        ) from error
    except Exception as error:  # the Hub client's errors share no base with those of its transport
        with suppress(LocalEntryNotFoundError):
            return Path(snapshot_download(model, revision=revision, local_files_only=True, **files))
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{model} is not a directory here, was not downloaded before, and cannot be downloaded from the Hub now: "
            f"check the name and the network ({type(error).__name__}: {reason})"
        ) from error
