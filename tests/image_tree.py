"""The container image without a container: the files that its Dockerfile copies, installed as it installs them."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """Each instruction of the Dockerfile and what follows it."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.partition(" ")[0], line.partition(" ")[2].strip()) for line in text.splitlines() if line.strip()]


def is_ignored(path: str) -> bool:
    """Whether .dockerignore keeps this path of the repository out of the build; the last pattern that fits decides."""
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().split():
        pattern = line.removeprefix("!").removeprefix("**/")
        parts = path.split("/")
        above = ["/".join(parts[: i + 1]) for i in range(len(parts))]
        if "**/" in line:
            fits = any(fnmatch(part, pattern) for part in parts)
        else:
            fits = any(fnmatch(part, pattern) for part in above)
        if fits:
            ignored = not line.startswith("!")
    return ignored


def tracked_files() -> list[str]:
    """Files of the repository: what git knows and what is new, without what it ignores."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [path for path in found if (ROOT / path).is_file() or (ROOT / path).is_symlink()]


def copy_tree(target: Path) -> None:
    """Make the image's working directory as the COPY instructions do.

    Raises:
        FileNotFoundError: an instruction copies what is not there or what .dockerignore leaves out.
    """
    allowed = [path for path in tracked_files() if not is_ignored(path)]
    for _, arguments in (pair for pair in instructions() if pair[0] == "COPY"):
        *sources, destination = shlex.split(arguments)
        for source in sources:
            files = [path for path in allowed if path == source or path.startswith(f"{source}/")]
            if not files:
                raise FileNotFoundError(f"COPY {arguments}: nothing of {source} is in the build")
            for path in files:
                # As Docker does: the content of a directory goes below the destination, a file into a directory.
                inside = path.removeprefix(f"{source}/") if path != source else path.rpartition("/")[2]
                place = target / destination / inside
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / path, place, follow_symlinks=False)


def install(tree: Path, environment: Path) -> Path:
    """Install the tree into a fresh environment by the Dockerfile's own command; returns the environment's `bin`.

    The packages that it depends on are those of this environment, so that no gigabytes are fetched; this repository,
    which is installed here too, is not among what can be imported.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    library = sysconfig.get_paths(vars={"base": str(environment), "platbase": str(environment)})["purelib"]
    # Only the directory: links in it to editable installs are not followed.
    Path(library, "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    (command,) = (
        words
        for name, words in instructions()
        if name == "RUN" and re.fullmatch(r"pip install --no-deps \.", words)
    )  # fmt: skip
    words = shlex.split(command.removeprefix("pip "))
    quiet = ["--quiet", "--no-build-isolation", "--disable-pip-version-check", "--ignore-installed"]
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", words[0], *quiet, *words[1:]], cwd=tree, env=clean_environment(), check=True)
    return environment / "bin"


def clean_environment() -> dict[str, str]:
    """This process's environment without what would lead back into the repository."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
