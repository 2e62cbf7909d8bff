"""A GGUF file: its metadata, the list of its tensors, and each tensor's numbers.

The layout is ggml's, described in docs/gguf.md of its repository. The package `gguf` knows the types of tensors and how
their numbers are packed. The header is read here, because that package's reader makes several arrays for each item of a
list and takes twenty seconds for a vocabulary of 262,144 tokens.
"""

import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from llm.errors import CheckpointError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
_NUMBERS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"
}  # fmt: skip
"""NumPy's name for each type of number that metadata may hold, by its code."""
_PART_NAME = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_DOWNLOAD = "download it again"


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """Where a tensor is in a file, and how it is packed.

    Attributes:
        shape: as PyTorch has it: the last dimension is the one whose numbers lie side by side.
        type_name: ggml's name of its type, such as "Q4_K".
        offset, num_bytes: its place in the file.
    """

    shape: tuple[int, ...]
    type_name: str
    offset: int
    num_bytes: int


class GGUFFile:
    """A GGUF file that is mapped into memory. Close it, or use it as a context manager.

    Attributes:
        path: of the file.
        metadata: values by key: numbers, truths, strings, or lists of one of these.
        tensors: by name.

    Raises:
        CheckpointError: the file cannot be read, is cut short, is one part of several, or holds a tensor of a type that
            cannot be unpacked; or the package `gguf` is missing. One line with the file and the fix.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._gguf = _import_gguf(self.path)
        try:
            with self.path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise CheckpointError(f"{self.path} cannot be read ({error}); {_DOWNLOAD}") from error
        try:
            self.metadata, self.tensors = self._read_header()
        except (struct.error, UnicodeDecodeError, _DamageError) as error:
            self.close()
            raise CheckpointError(f"{self.path} is damaged or cut short ({error}); {_DOWNLOAD}") from error
        except CheckpointError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the mapping back."""
        self._data.close()

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """The numbers of a tensor, unpacked into an array that is the caller's own."""
        tensor = self.tensors[name]
        packed_type = self._gguf.GGMLQuantizationType[tensor.type_name]
        # A copy of the bytes, since nothing may point into a mapping when it is closed.
        packed = np.frombuffer(self._data[tensor.offset : tensor.offset + tensor.num_bytes], np.uint8)
        numbers: npt.NDArray[np.float32] = self._gguf.dequantize(packed.reshape(*tensor.shape[:-1], -1), packed_type)
        return (numbers if numbers.flags.writeable else numbers.copy()).reshape(tensor.shape)

    def _read_header(self) -> tuple[dict[str, Any], dict[str, PackedTensor]]:
        cursor = _Cursor(self._data)
        if self._data[: len(_MAGIC)] != _MAGIC:
            raise CheckpointError(f"{self.path} is not a GGUF file; {_DOWNLOAD}")
        cursor.position = len(_MAGIC)
        version = cursor.number("<u4")
        if version not in _VERSIONS:
            kind = "a big-endian file" if version & 0xFFFF == 0 else f"version {version} of the format"
            raise CheckpointError(f"{self.path}: {kind} is not supported; convert the model again with current tools")
        num_tensors, num_values = cursor.number("<u8"), cursor.number("<u8")
        metadata = {}
        for _ in range(num_values):
            key = cursor.string()
            metadata[key] = cursor.value(cursor.number("<u4"))
        self._refuse_part(metadata)
        found = [self._read_tensor(cursor) for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise _DamageError(f"general.alignment is {alignment!r}")
        start = math.ceil(cursor.position / alignment) * alignment
        tensors = {}
        for name, tensor in found:
            placed = PackedTensor(tensor.shape, tensor.type_name, start + tensor.offset, tensor.num_bytes)
            if placed.offset + placed.num_bytes > len(self._data):
                raise _DamageError(f"{name} ends past the end of the file")
            tensors[name] = placed
        return metadata, tensors

    def _read_tensor(self, cursor: "_Cursor") -> tuple[str, PackedTensor]:
        """One entry of the list of tensors; its offset counts from the beginning of all tensors' data."""
        name = cursor.string()
        num_dimensions = cursor.number("<u4")
        shape = tuple(cursor.number("<u8") for _ in range(num_dimensions))[::-1]
        code = cursor.number("<u4")
        offset = cursor.number("<u8")
        try:
            packed_type = self._gguf.GGMLQuantizationType(code)
            block_len, block_bytes = self._gguf.GGML_QUANT_SIZES[packed_type]
            self._gguf.dequantize(np.zeros((1, block_bytes), np.uint8), packed_type)
        except (ValueError, KeyError, NotImplementedError) as error:
            raise CheckpointError(
                f"{self.path}: {name} has a type that cannot be unpacked (ggml's number {code}); use another "
                "quantization of the model, or a newer package gguf"
            ) from error
        if not shape or 0 in shape or shape[-1] % block_len:
            raise _DamageError(f"{name} has shape {shape}, which blocks of {block_len} do not fill")
        return name, PackedTensor(shape, packed_type.name, offset, math.prod(shape) // block_len * block_bytes)

    def _refuse_part(self, metadata: dict[str, Any]) -> None:
        """Refuse a model that is spread over several files."""
        match = _PART_NAME.search(self.path.name)
        num_parts = metadata.get("split.count") or (int(match[2]) if match else 1)
        if num_parts != 1:
            raise CheckpointError(
                f"{self.path} is one of {num_parts} parts of a model; join them with llama.cpp's "
                "llama-gguf-split --merge"
            )


class _DamageError(Exception):
    """The file says something that cannot be."""


class _Cursor:
    """Reads values one behind the other.

    Attributes:
        position: of the next byte.

    Raises:
        struct.error, _DamageError: by all methods, where the data ends before the value does.
    """

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.position = 0

    def number(self, kind: str) -> Any:
        """A number of one of NumPy's types."""
        return self._numbers(kind, 1)[0]

    def string(self) -> str:
        """Text behind its length in bytes."""
        (length,) = struct.unpack_from("<Q", self._data, self.position)
        start = self.position + 8
        self._advance(8 + length)
        return self._data[start : self.position].decode()

    def value(self, kind: int) -> Any:
        """A value of metadata of this type."""
        if kind == _STRING:
            return self.string()
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind != _ARRAY:
            raise _DamageError(f"metadata has a value of the unknown type {kind}")
        item_kind, length = self.number("<u4"), self.number("<u8")
        if item_kind in _NUMBERS:
            return self._numbers(_NUMBERS[item_kind], length)
        if item_kind != _STRING:
            raise _DamageError(f"metadata has a list of the type {item_kind}")
        return [self.string() for _ in range(length)]

    def _numbers(self, kind: str, count: int) -> list[Any]:
        start = self.position
        self._advance(np.dtype(kind).itemsize * count)
        numbers: list[Any] = np.frombuffer(self._data[start : self.position], kind).tolist()
        return numbers

    def _advance(self, num_bytes: int) -> None:
        if self.position + num_bytes > len(self._data):
            raise _DamageError(f"it ends after {len(self._data):,} bytes, in the middle of its header")
        self.position += num_bytes


def _import_gguf(path: Path) -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(f"{path}: GGUF files need the package gguf: pip install 'rayline[gguf]'") from error
    return gguf
