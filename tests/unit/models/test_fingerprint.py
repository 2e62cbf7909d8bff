"""The fingerprint of a checkpoint changes with whatever changes the text, and with nothing else."""

import json
import shutil
from pathlib import Path

import pytest

from deployments.config import AppConfig
from deployments.fingerprint import fingerprint_of
from llm.checkpoint.fingerprint import fingerprint, is_same_version

DEMO = Path(__file__).parents[3] / "configs" / "demo"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return shutil.copytree(DEMO, tmp_path / "copy")


def test_a_copy_elsewhere_is_the_same_version(checkpoint: Path):
    assert fingerprint([checkpoint]) == fingerprint([DEMO])


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_small_files_count_in_full(checkpoint: Path, name: str):
    content = json.loads((checkpoint / name).read_text())
    (checkpoint / name).write_text(json.dumps({**content, "changed": True}))
    assert fingerprint([checkpoint]) != fingerprint([DEMO])


def test_a_template_of_its_own_file_counts(checkpoint: Path):
    (checkpoint / "chat_template.jinja").write_text("{{ messages }}")
    assert fingerprint([checkpoint]) != fingerprint([DEMO])


@pytest.mark.parametrize("name", ["additional_chat_templates/tool_use.jinja", "1_Pooling/config.json"])
def test_files_in_folders_that_are_read_count(checkpoint: Path, name: str):
    (checkpoint / name).parent.mkdir()
    (checkpoint / name).write_text("{}")
    assert fingerprint([checkpoint]) != fingerprint([DEMO])


def test_weights_in_a_folder_count(checkpoint: Path):
    (checkpoint / "weights").mkdir()
    shard = (checkpoint / "model.safetensors").rename(checkpoint / "weights" / "part.safetensors")
    index = {"weight_map": {"a": "weights/part.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    before = fingerprint([checkpoint])
    shard.write_bytes(b"others")
    assert not is_same_version(fingerprint([checkpoint]), before)


def test_trained_weights_count_though_their_size_stays(checkpoint: Path):
    """One percent of the bytes, wherever they are: half of a small adapter that was merged changes more."""
    path = checkpoint / "model.safetensors"
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    for index in range(middle, middle + len(data) // 100):
        data[index] ^= 0xFF
    path.write_bytes(data)
    assert not is_same_version(fingerprint([checkpoint]), fingerprint([DEMO]))


def test_a_process_without_the_weights_matches_any(checkpoint: Path):
    (checkpoint / "model.safetensors").unlink()
    alone = fingerprint([checkpoint])
    assert is_same_version(alone, fingerprint([DEMO]))
    (checkpoint / "config.json").write_text("{}")
    assert not is_same_version(fingerprint([checkpoint]), fingerprint([DEMO]))


def test_an_adapter_counts(checkpoint: Path):
    assert fingerprint([DEMO, checkpoint]) != fingerprint([DEMO])


@pytest.mark.parametrize(
    ("changes", "is_same"),
    [
        ({"served_model_name": "other"}, True),
        ({"engine": {"max_batch_size": 3}}, True),
        ({"admission": {"max_queue_s": 3}}, True),
        ({"dtype": "float16"}, False),
        ({"engine": {"quantization": "fp8"}}, False),
        ({"engine": {"kv_cache_dtype": "fp8"}}, False),
    ],
)
def test_settings_count_where_they_change_the_text(changes: dict, is_same: bool):
    one = fingerprint_of(AppConfig(model=str(DEMO)))
    other = fingerprint_of(AppConfig.model_validate({"model": str(DEMO), **changes}))
    assert is_same_version(one, other) is is_same
