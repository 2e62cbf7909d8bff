"""A GGUF file as the directory of a Hugging Face checkpoint, which is what everything else reads."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

from llm.checkpoint.cache import cache_directory
from llm.checkpoint.gguf_file import GGUFFile
from llm.checkpoint.gguf_model import POOLINGS, decimal, make_config
from llm.checkpoint.gguf_tokenizer import find_end_ids, make_tokenizer
from llm.errors import CheckpointError

_LINK_NAME = "rayline-weights.gguf"  # which no directory of others has
_EDITION = b"2"
"""To be changed whenever other files are made of the same file."""
_SAMPLING = {
    "temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "penalty_repeat": "repetition_penalty"
}  # fmt: skip


def as_directory(path: str | Path) -> Path:
    """A directory of the cache with configuration, tokenizer and templates of a GGUF file, and a link to it.

    It is made once for each state of a file. Whoever is first makes it; others that try at the same time find it.

    Raises:
        CheckpointError: what is wrong with the file, in one line.
    """
    path = Path(path).expanduser().absolute()
    state = path.stat()
    digest = blake2b(digest_size=8)
    for part in (_EDITION, os.fsencode(path), str(state.st_size).encode(), str(state.st_mtime_ns).encode()):
        digest.update(part + b"\0")
    directory = cache_directory("gguf") / f"{path.stem}-{digest.hexdigest()}"
    if directory.is_dir():
        return directory
    scratch = Path(tempfile.mkdtemp(prefix=".making-", dir=directory.parent))
    try:
        with GGUFFile(path) as file:
            write_texts(file, scratch)
        (scratch / _LINK_NAME).symlink_to(path)
        scratch.chmod(0o755)
        scratch.rename(directory)
    except OSError as error:
        if not directory.is_dir():  # or another process has made it meanwhile
            raise CheckpointError(f"{directory} cannot be written: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return directory


def find_weights(directory: Path) -> Path | None:
    """The GGUF file that a directory was made for; None if it is another kind of directory."""
    link = directory / _LINK_NAME
    return link.readlink() if link.is_symlink() else None


def write_texts(file: GGUFFile, directory: Path, **config: Any) -> None:
    """Write everything but the weights.

    Args:
        config: keys of config.json that the file does not know.
    """
    for name, text in _texts(file, config).items():
        place = directory / name
        place.parent.mkdir(exist_ok=True)
        place.write_text(text, encoding="utf-8")


def _texts(file: GGUFFile, config: dict[str, Any]) -> dict[str, str]:
    """Contents of files by their names."""
    try:
        model_config = make_config(file) | config
        definition, tokenizer_config = make_tokenizer(file)
        return {
            "config.json": as_json(model_config),
            "generation_config.json": as_json(_generation_config(file)),
            "tokenizer_config.json": as_json(tokenizer_config),
            "tokenizer.json": definition,
            **dict(_templates(file)),
            **_pooling(file),
        }
    except Exception as error:
        if type(error) not in (Exception, ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise  # the library of tokenizers raises bare Exceptions
        raise CheckpointError(
            f"{file.path} holds a value that cannot be used ({error}); convert the model again"
        ) from error


def _generation_config(file: GGUFFile) -> dict[str, Any]:
    sampling = {
        theirs: decimal(value) if isinstance(value, float) else value
        for ours, theirs in _SAMPLING.items()
        if (value := file.metadata.get(f"general.sampling.{ours}")) is not None
    }
    ids = {"bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"), "eos_token_id": find_end_ids(file)}
    return sampling | {key: value for key, value in ids.items() if value is not None}


def _templates(file: GGUFFile) -> Iterator[tuple[str, str]]:
    """Chat templates, each with the file that it belongs in."""
    default = file.metadata.get("tokenizer.chat_template")
    if isinstance(default, str):
        yield "chat_template.jinja", default
    for name in file.metadata.get("tokenizer.chat_templates") or ():
        template = file.metadata.get(f"tokenizer.chat_template.{name}")
        if isinstance(template, str) and isinstance(name, str) and name.isidentifier():
            yield f"additional_chat_templates/{name}.jinja", template


def _pooling(file: GGUFFile) -> dict[str, str]:
    """How a model for vectors makes them, as sentence-transformers would say it; nothing for other models."""
    kind = file.metadata.get(f"{file.metadata['general.architecture']}.pooling_type")
    return {"1_Pooling/config.json": as_json({"pooling_mode": POOLINGS[kind]})} if kind in POOLINGS else {}


def as_json(content: dict[str, Any]) -> str:
    """JSON for people to read."""
    return json.dumps(content, indent=2) + "\n"
