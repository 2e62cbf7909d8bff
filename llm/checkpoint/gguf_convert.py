"""Writing a GGUF file as a Hugging Face checkpoint in safetensors."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from llm.checkpoint.gguf_directory import as_json, write_texts
from llm.checkpoint.gguf_file import GGUFFile
from llm.checkpoint.gguf_weights import GGUFWeights
from llm.errors import CheckpointError

_MAX_SHARD_BYTES = 4 << 30


def convert(path: str | Path, directory: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a GGUF file as a Hugging Face checkpoint, its weights unpacked to `dtype` in safetensors.

    Raises:
        CheckpointError: what is wrong with the file, or the directory holds something.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise CheckpointError(f"{directory} is not empty; name a directory that is not there yet")
    with GGUFFile(path) as file:
        write_texts(file, directory, dtype=str(dtype).removeprefix("torch."))
    with GGUFWeights(path) as weights:
        names_by_shard = list(_shards(weights, dtype.itemsize))
        weight_map: dict[str, str] = {}
        for number, names in enumerate(names_by_shard, 1):
            single = len(names_by_shard) == 1
            name = "model.safetensors" if single else f"model-{number:05}-of-{len(names_by_shard):05}.safetensors"
            tensors = {tensor: weights.get_tensor(tensor).to(dtype) for tensor in names}
            save_file(tensors, directory / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(names, name)
    if len(names_by_shard) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(as_json(index), encoding="utf-8")


def _shards(weights: GGUFWeights, itemsize: int) -> Iterator[list[str]]:
    """Names of the tensors of each file, which holds a few gigabytes at most, or one tensor."""
    names: list[str] = []
    num_bytes = 0
    for name in weights.keys():  # noqa: SIM118 - not a dictionary
        size = torch.Size(weights.get_slice(name).get_shape()).numel() * itemsize
        if names and num_bytes + size > _MAX_SHARD_BYTES:
            yield names
            names, num_bytes = [], 0
        names.append(name)
        num_bytes += size
    yield names
