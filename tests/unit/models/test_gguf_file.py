"""GGUF files: what the package's own reader finds in them, and one line for everything that can be wrong."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import write_gguf
from hypothesis import given, strategies as st

from llm.checkpoint.gguf_file import GGUFFile
from llm.errors import CheckpointError

METADATA = {
    "general.name": "Größe ▁",
    "general.alignment": 64,
    "test.truth": True,
    "test.number": 3.5,
    "test.numbers": [1, 2, 3],
    "test.texts": ["a", "", "ü"],
}
TYPES = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0"]


def small_tensors() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "token_embd.weight": generator.standard_normal((6, 512), np.float32),
        "output_norm.weight": generator.standard_normal(5, np.float32),
        "blk.0.ffn_gate_exps.weight": generator.standard_normal((2, 3, 256), np.float32),
    }


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    return write_gguf(path, "llama", METADATA, small_tensors(), quantization=gguf.GGMLQuantizationType.Q4_1)


def refusal(path: Path) -> str:
    """The message with which opening fails: one line that names the file."""
    with pytest.raises(CheckpointError) as info:
        GGUFFile(path)
    message = str(info.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_metadata_is_what_the_package_reads(file):
    theirs = {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items()}
    with GGUFFile(file) as ours:
        assert ours.metadata == {key: value for key, value in theirs.items() if not key.startswith("GGUF.")}


@pytest.mark.parametrize("name", TYPES)
def test_tensors_are_what_the_package_unpacks(tmp_path, name):
    quantization = gguf.GGMLQuantizationType[name]
    path = write_gguf(tmp_path / "x.gguf", "llama", METADATA, small_tensors(), quantization=quantization)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    with GGUFFile(path) as ours:
        assert ours.tensors.keys() == theirs.keys()
        for key, tensor in theirs.items():
            found = ours.read(key)
            np.testing.assert_array_equal(found, gguf.dequantize(tensor.data, tensor.tensor_type))
            assert found.shape == tuple(reversed(tensor.shape.tolist()))
            assert found.flags.writeable


def test_numbers_outlive_the_file(file):
    with GGUFFile(file) as opened:
        norm = opened.read("output_norm.weight")
    np.testing.assert_array_equal(norm, small_tensors()["output_norm.weight"])


@given(st.data())
def test_a_file_cut_anywhere_is_refused(file, tmp_path_factory, data):
    content = file.read_bytes()
    # The writer pads the last tensor, and nobody misses what is behind it.
    cut = tmp_path_factory.mktemp("cut") / "cut.gguf"
    cut.write_bytes(content[: data.draw(st.integers(0, len(content) - 64))])
    refusal(cut)


@given(st.data())
def test_a_damaged_header_is_refused_in_one_line_or_read(file, tmp_path_factory, data):
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 700))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "damaged.gguf"
    path.write_bytes(content)
    try:
        opened = GGUFFile(path)
    except CheckpointError:
        refusal(path)
        return
    with opened:
        for name in opened.tensors:
            opened.read(name)


@pytest.mark.parametrize("size", [0, 33, 1 << 40, (1 << 64) - 1])
def test_a_shape_that_cannot_be_is_refused(file, tmp_path, size):
    content = file.read_bytes()
    place = content.index(b"token_embd.weight") + len("token_embd.weight") + 4
    path = tmp_path / "x.gguf"
    path.write_bytes(content[:place] + struct.pack("<Q", size) + content[place + 8 :])
    assert "token_embd.weight" in refusal(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    assert "is not a GGUF file" in refusal(path)
    assert "cannot be read" in refusal(tmp_path / "missing.gguf")


@pytest.mark.parametrize(("version", "what"), [(1, "version 1 of the format"), (3 << 24, "a big-endian file")])
def test_other_versions_are_refused(file, tmp_path, version, what):
    content = bytearray(file.read_bytes())
    content[4:8] = struct.pack("<I", version)
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    assert f"{what} is not supported" in refusal(path)


def test_a_part_of_a_model_is_refused(file, tmp_path):
    """Whether the name says it or the metadata."""
    part = tmp_path / "x-00001-of-00003.gguf"
    part.write_bytes(file.read_bytes())
    assert "one of 3 parts" in refusal(part)
    renamed = write_gguf(tmp_path / "renamed.gguf", "llama", {"split.count": 2}, small_tensors())
    assert "one of 2 parts" in refusal(renamed)


def test_a_type_that_nobody_can_unpack_is_refused(file, tmp_path):
    content = file.read_bytes()
    # Behind a tensor's name come the number of its dimensions, these, and its type.
    place = content.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 2 * 8
    for code in (9, 24, 28, 999):
        path = tmp_path / "x.gguf"
        path.write_bytes(content[:place] + struct.pack("<I", code) + content[place + 4 :])
        assert f"token_embd.weight has a type that cannot be unpacked (ggml's number {code})" in refusal(path)


def test_the_missing_package_is_named(file, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    assert "pip install 'rayline[gguf]'" in refusal(file)
