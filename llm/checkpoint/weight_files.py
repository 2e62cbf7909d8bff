"""Which of a directory's files hold its weights."""

from collections.abc import Iterator
from pathlib import Path

from llm.checkpoint.gguf_directory import find_weights
from llm.checkpoint.json_files import read_json
from llm.errors import CheckpointError

DOWNLOAD = "download the checkpoint again"

Files = dict[Path, list[str] | None]
"""Files to read, each with the tensors to take from it: None for all of them."""

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_NOT_OUR_WEIGHTS = ("consolidated", "adapter_")
_PICKLES = ("*model*.bin", "*.pt", "*.pth")
_OTHER_FORMATS = ("consolidated*.safetensors", "*.h5", "*.msgpack", "*.onnx", "*.npz", "*.incomplete")


def candidate_files(directory: Path) -> Iterator[Files]:
    """Sets of files of which one should hold all weights, the likeliest first.

    transformers reads `model.safetensors` where there is one, whatever an index beside it lists; then come the files
    that the index lists; then all files, for an index that is older than they are. Files of adapters and of Mistral's
    own format never count. A directory that was made for a GGUF file has that one alone.

    Raises:
        CheckpointError, ConfigError: there are no files, or the index that would be next cannot be read.
    """
    gguf_path = find_weights(directory)
    if gguf_path is not None:
        yield {gguf_path: None}
        return
    given: list[Files] = []
    for find in (_single, indexed_files, _all):
        candidate = find(directory)
        if candidate and candidate not in given:
            given.append(candidate)
            yield candidate
    if not given:
        raise CheckpointError(_why_none(directory))


def _single(directory: Path) -> Files:
    path = directory / _SINGLE
    return {path: None} if path.is_file() else {}


def indexed_files(directory: Path) -> Files:
    """Files that a directory's index lists; none where it has no index.

    Raises:
        CheckpointError, ConfigError: the index cannot be read, or names files outside the directory.
    """
    path = directory / _INDEX
    if not path.exists():
        return {}
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{path} has no weight_map; {DOWNLOAD}")
    files: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or Path(file).is_absolute() or ".." in Path(file).parts:
            raise CheckpointError(f"{path} puts {name} in {file!r}, which is no file of this directory; {DOWNLOAD}")
        files.setdefault(file, []).append(name)
    return {directory / file: names for file, names in files.items()}


def _all(directory: Path) -> Files:
    paths = (path for path in sorted(directory.glob("*.safetensors")) if path.is_file())
    return {path: None for path in paths if not path.name.startswith(_NOT_OUR_WEIGHTS)}


def _why_none(directory: Path) -> str:
    if (directory / "adapter_config.json").exists():
        return (
            f"{directory} holds an adapter but no model; give the model that it was trained on, and this directory "
            "as lora"
        )
    for path in sorted(directory.glob("*.safetensors")):
        if path.is_symlink() and not path.exists():
            return f"{path} is a link to {path.readlink()}, which is not there; {DOWNLOAD}"
    for path in (path for pattern in _PICKLES for path in sorted(directory.glob(pattern))):
        return (
            f"{path} is a pickle, which can run code when loaded and is not read; convert the checkpoint to "
            "safetensors with transformers' save_pretrained"
        )
    for path in sorted(directory.glob("*.gguf")):
        return f"{directory} holds no .safetensors file; give the GGUF file itself: {path}"
    for path in (path for pattern in _OTHER_FORMATS for path in sorted(directory.glob(pattern))):
        return f"{directory} holds no .safetensors file, and {path.name} is of another format; get one in safetensors"
    return f"{directory} holds no .safetensors file; {DOWNLOAD}"
