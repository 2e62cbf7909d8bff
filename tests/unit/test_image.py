"""The container image holds what it needs: its files alone, installed into a fresh environment, are a `rayline`."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from image_tree import DOCKERFILE, ROOT, clean_environment, copy_tree, install, instructions, is_ignored, tracked_files

from deployments.api.send_timeout import PROXY_VARIABLES
from deployments.bench.command import app as bench
from deployments.serve.haproxy import BINARY_VARIABLE

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The working directory, read-only as in the image for its user, and the environment's `bin`."""
    place = tmp_path_factory.mktemp("image")
    tree = place / "app"
    copy_tree(tree)
    return tree, install(tree, place / "environment")


def rayline(
    image: tuple[Path, Path], *arguments: str, directory: Path | None = None, **environment: str
) -> "subprocess.CompletedProcess[str]":
    tree, bin_directory = image
    return subprocess.run(
        [bin_directory / "rayline", *arguments], cwd=directory or tree, env=clean_environment() | environment,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_nothing_outside_the_image_is_imported(image: tuple[Path, Path], tmp_path: Path):
    _, bin_directory = image
    code = "import deployments.app, deployments.cli, llm; print(deployments.__file__, llm.__file__)"
    done = subprocess.run(
        [bin_directory / "python", "-c", code], cwd=tmp_path, env=clean_environment(), capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert all(path.startswith(str(bin_directory.parent)) for path in done.stdout.split())


def test_every_command_shows_its_help(image: tuple[Path, Path]):
    done = rayline(image, "--help")
    assert done.returncode == 0, done.stderr
    for command in ("serve", "chat", "check", "doctor", "status", "bench"):
        assert command in done.stdout
    for subcommand in (command.name or command.callback.__name__ for command in bench.registered_commands):
        assert rayline(image, "bench", subcommand, "--help").returncode == 0, subcommand


def test_the_configuration_in_the_image_is_checked(image: tuple[Path, Path]):
    done = rayline(image, "check")
    assert done.returncode == 0, done.stderr
    assert "model demo" in done.stdout


def test_what_comes_with_the_package_is_found_from_anywhere(image: tuple[Path, Path], tmp_path: Path):
    done = rayline(image, "check", directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "model demo" in done.stdout
    (package,) = image[1].parent.glob("lib/python*/site-packages/deployments")
    for name in ("configs/emulated.yaml", "configs/demo/model.safetensors", "api/pages/chat.html", "py.typed"):
        assert (package / name).is_file()
    pages = package / "api" / "pages"
    assert _files(pages / "static") == _files(ROOT / "deployments" / "api" / "pages" / "static"), "what the pages load"


def _files(directory: Path) -> set[str]:
    return {file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file()}


def test_another_package_llm_is_refused(image: tuple[Path, Path], tmp_path: Path):
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "__init__.py").write_text("")
    done = rayline(image, "--help", directory=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert f"{tmp_path}/llm is another one: install Rayline into an environment without it" in done.stderr


def test_proxies_in_the_image_cut_off_clients_that_take_nothing(image: tuple[Path, Path], tmp_path: Path):
    """Also where something else than `rayline serve` starts Ray, as on Kubernetes."""
    tree, bin_directory = image
    variables = dict(words.split("=", 1) for name, words in instructions() if name == "ENV" and "RAY_SERVE" in words)
    (program,) = (words.split() for name, words in instructions() if name == "RUN" and "haproxy" in words)
    assert program[0] == "python"
    made = subprocess.run(
        [bin_directory / "python", *program[1:-1], tmp_path], cwd=tree, env=clean_environment(), capture_output=True,
        text=True, timeout=120, check=True,
    ).stdout.strip()  # fmt: skip
    assert made == f"{BINARY_VARIABLE}={tmp_path / 'haproxy'}"
    assert variables == {**PROXY_VARIABLES, BINARY_VARIABLE: f"{program[-1]}/haproxy"}


def test_the_image_leaves_out_what_it_does_not_need():
    kept = [path for path in tracked_files() if not is_ignored(path)]
    assert kept
    assert {path.partition("/")[0] for path in kept}.isdisjoint({"tests", "benchmarks", "docs", "chaos", ".git"})
    assert is_ignored("llm/__pycache__/config.cpython-312.pyc")


def test_a_change_of_the_code_installs_no_dependency_anew():
    """The code is copied after PyTorch and after everything else in the lock; each package is checked by its hash."""
    found = instructions()
    locked = next(i for i, (_, words) in enumerate(found) if "--requirement requirements.lock" in words)
    torch = next(i for i, (_, words) in enumerate(found) if '"torch>=' in words)
    code = [i for i, (name, words) in enumerate(found) if name == "COPY" and words != "requirements.lock ./"]
    assert torch < locked < min(code)
    pinned = re.findall(
        r"^[a-z][^ ]*==[^\\]*\\\n( +--hash=)?", (DOCKERFILE.parents[1] / "requirements.lock").read_text(), re.M
    )
    assert pinned
    assert all(pinned)


def test_the_image_runs_as_a_user_and_is_probed_by_a_program_that_it_has():
    found = dict(instructions())
    assert found["USER"] not in ("root", "0")
    probe, *_, url = found["HEALTHCHECK"].partition("CMD ")[2].split()
    assert url.endswith(":8000/ready"), "healthy while requests are answered"
    installed = " ".join(words for name, words in instructions() if name == "RUN" and words.startswith("apt-get"))
    assert f" {probe} " in installed
    kuberay = (DOCKERFILE.parent / "kuberay" / "rayservice.yaml").read_text()
    assert "curl " not in kuberay or " curl " in installed
    assert os.path.isabs(found["WORKDIR"])
