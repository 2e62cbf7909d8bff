"""Where a checkpoint's files are: a directory, or a repository of the Hugging Face Hub."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from llm.errors import CheckpointError

_FILES = ("*.safetensors", "*.json", "*.jinja")
_FILES_LEFT_OUT = ("original/*", "onnx/*", "consolidated*.safetensors")
_TIMEOUT_S = 5
"""For the Hub to answer at all; files have more."""


def resolve_model_path(model: str) -> Path:
    """Directory of a checkpoint: `model` itself, or a download of the Hub repository of that name (or its cache).

    Raises:
        CheckpointError: neither is there; one line with the fix.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{model} is a file; give the directory that holds config.json and the weights")
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise CheckpointError(f"{model}: no such directory; give a checkpoint's directory or a Hub id such as org/name")
    return _download(model)


def _download(model: str) -> Path:
    """The Hub's repository of this name, from the cache if the Hub does not answer within a few seconds."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    files: dict[str, Any] = {"allow_patterns": list(_FILES), "ignore_patterns": list(_FILES_LEFT_OUT)}
    try:
        # snapshot_download by itself waits for the Hub without an end.
        revision = HfApi().model_info(model, timeout=_TIMEOUT_S).sha
        return Path(snapshot_download(model, revision=revision, **files))
    except GatedRepoError as error:
        raise CheckpointError(f"{model} is gated on the Hub: accept its terms there, then set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{model} is no directory here, and the Hub has no model of that name; a private one needs HF_TOKEN"
        ) from error
    except Exception as error:  # the Hub client's errors share no base with those of its transport
        with suppress(LocalEntryNotFoundError):
            return Path(snapshot_download(model, local_files_only=True, **files))
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{model} is no directory here, was not downloaded before, and cannot be had from the Hub now: check the "
            f"name and the network ({type(error).__name__}: {reason})"
        ) from error
