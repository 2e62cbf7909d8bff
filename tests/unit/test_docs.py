"""The documents tell the truth: generated pages are current, examples load, commands and links exist."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from deployments.accounts_config import KeyLimits, Role
from deployments.cli import app, command_reference, config_reference
from deployments.config import AppConfig
from deployments.router.keys import find_keys, parse_keys
from deployments.serve.config_file import BUILDER, read_config_file
from deployments.serve.front_end import FrontEnd
from llm.errors import ConfigError

ROOT = Path(__file__).parents[2]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
IDS = [str(path.relative_to(ROOT)) for path in DOCS]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    ("page", "module"),
    [("configuration.md", config_reference), ("command-line.md", command_reference)],
    ids=["configuration", "command-line"],
)
def test_generated_page_is_what_the_code_makes(page: str, module: Any):
    assert (ROOT / "docs" / page).read_text() == module.reference(), f"run: python -m {module.__name__} > docs/{page}"


def test_every_command_is_in_the_reference():
    """With the options that its help shows, and each only once."""
    text = command_reference.reference()
    commands = dict(get_command(app).commands)
    commands |= {f"bench {name}": command for name, command in commands.pop("bench").commands.items()}
    sections = dict(re.findall(r"^## rayline ([\w ]+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    assert sections.keys() == commands.keys()
    for name, command in commands.items():
        options = [option for parameter in command.params for option in parameter.opts if option.startswith("--")]
        rows = re.findall(r"^\| `(--[\w-]+)`", sections[name], re.MULTILINE)
        assert rows == options, name


def test_readme_fits_a_screen_and_a_half():
    """The rest belongs on a page of its own."""
    assert len((ROOT / "README.md").read_text().split()) <= 900


def test_figures_of_the_readme_are_those_of_the_performance_page():
    """So that a new measurement cannot leave the old one behind in either."""
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if re.match(r"\| .*\d", line)]
    assert rows
    assert [row for row in rows if row not in (ROOT / "docs" / "performance.md").read_text().splitlines()] == []


@pytest.mark.parametrize("page", ["README.md", "docs/performance.md"])
def test_times_as_fast_is_what_its_row_says(page: str):
    """Above 1 where Rayline is faster: more tokens a second, or less time."""
    tables = re.findall(r"(?:^\|.*\n)+", (ROOT / page).read_text(), re.MULTILINE)
    tables = [table for table in tables if "| times as fast |" in table]
    assert tables
    for table in tables:
        is_time = False
        for row in table.splitlines()[2:]:
            name, *cells = [cell.strip() for cell in row.strip("|").split("|")]
            is_time = bool(re.search(r", m?s( ¹)?$", name)) or (is_time and "tokens/s" not in name)
            for ours, theirs, ratio in (cells[i : i + 3] for i in range(0, len(cells), 3)):
                if ratio:
                    rate = float(ours.replace(",", "")) / float(theirs.replace(",", ""))
                    assert abs((1 / rate if is_time else rate) - float(ratio)) < 0.0051, row


def source_texts() -> list[str]:
    """Every text that the code holds, with … for each value that is put into one."""
    texts = []
    for path in [*(ROOT / "llm").rglob("*.py"), *(ROOT / "deployments").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                texts.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                )
    return texts


def test_errors_of_the_troubleshooting_page_are_those_of_the_code():
    """The texts that people will look for, and the codes of the API."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    texts = source_texts()
    messages = re.findall(r"^\| `([^`]+)`", page, re.MULTILINE)
    assert len(messages) > 30
    assert [message for message in messages if not any(message in text for text in texts)] == []
    codes = re.findall(r"^\| \d{3}[^,]*, `(\w+)`", page, re.MULTILINE)
    assert codes
    assert set(codes) <= set(texts)


def test_environment_page_has_every_variable_of_the_code():
    variable = re.compile(r"(RAYLINE|RAY|SERVE|HF|TRITON|XDG|CUDA|KUBERAY|MALLOC)_[A-Z_]+")
    names = {text for text in source_texts() if variable.fullmatch(text)}
    assert "RAYLINE_CACHE" in names
    page = (ROOT / "docs" / "environment.md").read_text()
    assert sorted(name for name in names if f"`{name}" not in page) == []


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


def check_example(block: str) -> bool:
    """Load an example of configuration as a server would, whole or in part; returns whether it is one."""
    content = yaml.safe_load(block)
    if isinstance(content, list):
        parse_keys(Path("keys.yaml"), block.encode(), KeyLimits())
        return True
    if "applications" in content:
        ours = [app["args"] for app in content["applications"] if app.get("import_path") == BUILDER]
        for args in ours:
            AppConfig.model_validate(args)
        FrontEnd.of_options(content.get("http_options") or {})
        return bool(ours)
    if content.keys() <= AppConfig.model_fields.keys():
        content = {"args": content}
    if "args" in content:
        AppConfig.model_validate(content["args"])
    return "args" in content


@pytest.mark.parametrize("path", DOCS, ids=IDS)
def test_examples_of_configuration_load(path: Path):
    """Whole files, arguments of an application, some of its settings, and files of API keys."""
    for block in blocks(path, "yaml"):
        assert check_example(block) or "logging_config" in block, block


def test_the_platform_page_begins_with_a_whole_platform(tmp_path: Path):
    """Its configuration and its keys file fit together, as `rayline check` would find."""
    config, keys, *_ = blocks(ROOT / "docs" / "platform.md", "yaml")
    (tmp_path / "keys.yaml").write_text(keys)
    file = tmp_path / "serve_config.yaml"
    file.write_text(config.replace("/etc/rayline/keys.yaml", str(tmp_path / "keys.yaml")))
    app = read_config_file(file).apps["rayline"]
    assert len(app.models) == 2
    assert any(model.adapters and model.adapter_folder and model.adapter_roots for model in app.models)
    assert app.batches.is_on
    assert {key.role for key in find_keys(app).keys} == {Role.ADMIN, Role.USER}
    named = {name for key in find_keys(app).keys for name in key.models}
    assert named <= {
        name for model in app.models for name in (*model.names, *(adapter.name for adapter in model.adapters))
    }
    file.write_text(file.read_text().replace("accounts:", "acounts:"))
    with pytest.raises(ConfigError, match="acounts"):
        read_config_file(file)


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
