"""The documents tell the truth: generated pages are current, examples load, commands and links exist."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from deployments.cli import app
from deployments.cli.config_reference import reference
from deployments.config import AppConfig

ROOT = Path(__file__).parents[2]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
IDS = [str(path.relative_to(ROOT)) for path in DOCS]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


def test_configuration_page_is_what_the_code_makes():
    assert (ROOT / "docs" / "configuration.md").read_text() == reference(), (
        "run: python -m deployments.cli.config_reference > docs/configuration.md"
    )


def build_site(folder: Path, site: Path) -> "subprocess.CompletedProcess[str]":
    """As `make docs` does, where --strict makes of every warning that is printed an error."""
    command = [Path(sys.executable).parent / "mkdocs", "build", "--strict", "--site-dir", site]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_site_builds_without_a_warning(tmp_path: Path):
    result = build_site(ROOT, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "configuration" / "index.html").is_file()


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("index.md", "[outside](../README.md)", "contains a link '../README.md'"),
        ("index.md", "[nowhere](api.md#no-such-heading)", "does not contain an anchor"),
        ("alone.md", "In no navigation.", 'not included in the "nav" configuration'),
    ],
    ids=["outside", "anchor", "navigation"],
)
def test_site_does_not_build_with_a_warning(tmp_path: Path, name: str, text: str, complaint: str):
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    with (tmp_path / "docs" / name).open("a") as page:
        page.write(f"\n{text}\n")
    result = build_site(tmp_path, tmp_path / "site")
    assert result.returncode == 1
    assert complaint in result.stderr


@pytest.mark.parametrize("path", DOCS, ids=IDS)
def test_links_lead_somewhere(path: Path):
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text())
    local = [target for target in targets if "://" not in target and not target.startswith("mailto:")]
    assert [target for target in local if not (path.parent / target).exists()] == []


@pytest.mark.parametrize("path", DOCS, ids=IDS)
def test_examples_of_configuration_load(path: Path):
    for block in blocks(path, "yaml"):
        content = yaml.safe_load(block)
        if isinstance(content, dict) and set(content) == {"args"}:
            AppConfig.model_validate(content["args"])


@pytest.mark.parametrize("path", DOCS, ids=IDS)
def test_commands_exist(path: Path):
    """Targets of make, commands and options of rayline, modules that are run."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = get_command(app).commands
    for block in blocks(path, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = [word for word in shlex.split(line, comments=True) if not re.fullmatch(r"[A-Z_]+=.*", word)]
            if not words:
                continue
            program, arguments = Path(words[0]).name, words[1:]
            if program == "make":
                assert arguments[0] in targets, line
            elif program == "rayline":
                command = commands[arguments[0]]
                if hasattr(command, "commands"):
                    command = command.commands[arguments[1]]
                options = {name for parameter in command.params for name in parameter.opts}
                assert {word for word in arguments if word.startswith("--")} <= options | {"--help"}, line
            elif program == "python" and arguments[0] == "-m":
                assert (ROOT / (arguments[1].replace(".", "/") + ".py")).is_file() or (
                    ROOT / arguments[1].replace(".", "/")
                ).is_dir(), line
    for module in re.findall(r"`python -m ([\w.]+)", path.read_text()):
        place = ROOT / module.replace(".", "/")
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), module
    for target in re.findall(r"`make ([a-z-]+)", path.read_text()):
        assert target in targets, target
