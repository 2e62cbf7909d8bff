"""The weights of a GGUF file, as those of a Hugging Face checkpoint.

Names of tensors are llama.cpp's (gguf-py/gguf/constants.py). Its converter (convert_hf_to_gguf.py) changes some weights
on their way into a file; here they are changed back.
"""

from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch

from llm.checkpoint.gguf_file import GGUFFile
from llm.checkpoint.gguf_model import ROPE_FACTORS, find_architecture, of_all_layers

_OUTSIDE_LAYERS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


class _Header(NamedTuple):
    """Shape and type of a tensor, as safetensors gives them."""

    shape: tuple[int, ...]

    def get_shape(self) -> tuple[int, ...]:
        return self.shape

    def get_dtype(self) -> str:
        return "F32"  # once it is unpacked


class GGUFWeights:
    """The weights of a GGUF file under the names, and in the order of rows, that transformers has for them.

    It is read as what `safetensors.safe_open` gives is. `get_tensor` may be called by several threads.

    Raises:
        CheckpointError: see `GGUFFile`; or the architecture is not supported.
    """

    def __init__(self, path: str | Path) -> None:
        self._file = GGUFFile(path)
        self._architecture = find_architecture(self._file)
        names = {name: self._their_name(name) for name in self._file.tensors if name != ROPE_FACTORS}
        self._our_names = {theirs: ours for ours, theirs in names.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def keys(self) -> list[str]:
        """Names of all tensors; one that no name is known for keeps its own."""
        return list(self._our_names)

    def get_slice(self, name: str) -> _Header:
        """Shape and type of a tensor."""
        return _Header(self._file.tensors[self._our_names[name]].shape)

    def get_tensor(self, name: str) -> torch.Tensor:
        """A tensor, unpacked to float32."""
        ours = self._our_names[name]
        numbers = self._file.read(ours)
        if self._architecture.norm_offset and "norm." in ours:
            numbers -= self._architecture.norm_offset
        if self._architecture.has_paired_rows and (".attn_q." in ours or ".attn_k." in ours):
            numbers = _unpaired(numbers, self._num_heads(is_query=".attn_q." in ours))
        return torch.from_numpy(numbers)

    def _num_heads(self, *, is_query: bool) -> int:
        """Of queries, or of keys."""
        prefix = f"{self._file.metadata['general.architecture']}.attention.head_count"
        num_heads = self._file.metadata[prefix]
        found: int = of_all_layers(num_heads if is_query else self._file.metadata.get(f"{prefix}_kv", num_heads))
        return found

    def _their_name(self, name: str) -> str:
        module, _, leaf = name.rpartition(".")
        if module in _OUTSIDE_LAYERS:
            return f"{_OUTSIDE_LAYERS[module]}.{leaf}"
        block, _, rest = module.partition(".")
        index, _, inside = rest.partition(".")
        if block != "blk" or inside not in self._architecture.layer_names:
            return name
        return f"model.layers.{index}.{self._architecture.layer_names[inside]}.{leaf}"


def _unpaired(rows: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """Rows in transformers' order, of rows in which those that turn together are neighbours."""
    pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)
