"""Which version of a model a checkpoint holds, without reading all of its weights."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from llm.checkpoint.weight_files import indexed_files
from llm.errors import LLMError

_SMALL_PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt", "additional_chat_templates/*.jinja", "1_Pooling/*.json")
_WEIGHT_PATTERNS = ("*.safetensors", "*.gguf")
_HEAD_BYTES = 64 << 10
_DIGEST_BYTES = 8
_NUM_SAMPLES, _SAMPLE_BYTES = 256, 4 << 10


def fingerprint(directories: Iterable[str | Path], settings: Iterable[str] = ()) -> str:
    """A digest of everything that decides what text a model makes.

    Configuration, tokenizer and template files are read in full. Of a file of weights the size, the beginning and 256
    evenly spaced samples of 4 KiB count, so that it takes milliseconds: any training changes most of them. Names and
    contents count, places and times do not, so copies of a checkpoint on different nodes have the same fingerprint.

    Args:
        directories: the checkpoint and, if there is one, its adapter.
        settings: what else decides, such as the number format.

    Returns:
        Hexadecimal digits of everything but the weights, a hyphen, and those of the weights; nothing behind the hyphen
        where the directories hold none.
    """
    text, weights = hashlib.blake2b(digest_size=_DIGEST_BYTES), hashlib.blake2b(digest_size=_DIGEST_BYTES)
    has_weights = False
    for setting in settings:
        _add(text, b"setting", setting.encode())
    for directory in map(Path, directories):
        _add(text, b"directory", b"")
        for path in _files(directory, _SMALL_PATTERNS):
            _add(text, path.name.encode(), path.read_bytes())
        for path in _weight_files(directory):
            _add_weights(weights, path)
            has_weights = True
    return f"{text.hexdigest()}-{weights.hexdigest() if has_weights else ''}"


def is_same_version(one: str, other: str) -> bool:
    """Whether two fingerprints may be of the same model: one of a process that has no weights matches any weights."""
    (text, _, weights), (other_text, _, other_weights) = one.partition("-"), other.partition("-")
    return text == other_text and (weights == other_weights or not weights or not other_weights)


def _files(directory: Path, patterns: Iterable[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in directory.glob(pattern) if path.is_file()})


def _weight_files(directory: Path) -> list[Path]:
    """The files of weights, with those in folders that an index names."""
    try:
        indexed = indexed_files(directory)
    except LLMError:  # whoever loads it says what is wrong
        indexed = {}
    return sorted({*_files(directory, _WEIGHT_PATTERNS), *(path for path in indexed if path.is_file())})


def _add(digest: "hashlib.blake2b", name: bytes, content: bytes) -> None:
    """Add a named piece; lengths keep neighbours apart."""
    for part in (name, content):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)


def _add_weights(digest: "hashlib.blake2b", path: Path) -> None:
    size = path.stat().st_size
    _add(digest, path.name.encode(), size.to_bytes(8, "little"))
    with path.open("rb") as file:
        digest.update(file.read(_HEAD_BYTES))
        for index in range(_NUM_SAMPLES if size > _HEAD_BYTES else 0):
            file.seek(_HEAD_BYTES + (size - _HEAD_BYTES) * index // _NUM_SAMPLES)
            digest.update(file.read(_SAMPLE_BYTES))
