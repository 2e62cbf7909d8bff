"""Every command in the documents is run: here against the running server, or by the test that is named here."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from live_server import ROOT, Server

DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BIN = Path(sys.executable).parent

RUN_ELSEWHERE = {
    "make serve": "tests/integration/test_front_ends.py::test_it_answers_behind_haproxy",
    "make test": ".ci/run",
    "make bench-scaling": "tests/integration/test_scaling_benchmark.py::test_all_parts_run_with_emulated_engines",
    ".venv/bin/python -m benchmarks.over_http": "tests/integration/test_over_http.py::test_a_server_is_measured",
    "rayline serve": "tests/integration/test_command_line.py::test_serve_chat_status",
    "rayline check ~/": "tests/unit/deployments/test_check.py::test_a_model_is_checked_without_a_file",
    "rayline chat": "tests/integration/test_command_line.py::test_serve_chat_status",
    "rayline status": "tests/integration/test_command_line.py::test_serve_chat_status",
    "rayline pull": "tests/unit/models/test_packaged_models.py::test_a_packaged_model_is_put_together_of_its_packages",
    "python -m benchmarks.number_formats": (
        "tests/unit/real_models/test_number_formats.py::test_a_format_is_measured_beside_float32"
    ),
    "python -m benchmarks.engine ": (
        "tests/unit/test_engine_benchmark.py::test_every_row_is_measured_and_set_beside_the_peers"
    ),
    "sudo ": "tests/unit/test_deploy.py::test_systemd_takes_the_unit",
    "cd /opt/rayline": "tests/unit/test_deploy.py::test_systemd_takes_the_unit",
    'echo "RAYLINE_KEYS=': "tests/unit/test_deploy.py::test_systemd_takes_the_unit",
    "docker compose": "tests/unit/test_deploy.py::test_compose_files_are_what_the_specification_says",
    "docker build": "tests/unit/test_image.py::test_nothing_outside_the_image_is_imported",
    "docker run": "tests/unit/test_image.py::test_the_configuration_in_the_image_is_checked",
    "kubectl": "tests/unit/test_kuberay.py::test_a_cluster_takes_every_object",
    "pip install": "Makefile",
    "source .venv/bin/activate": "Makefile",
    "export RAYLINE_KEYS=": "tests/integration/test_front_ends.py::test_keys_are_asked_for",
}
"""Beginnings of commands, and what runs them; or, where they need a container daemon or root, what they are given."""


def commands() -> list[str]:
    """Each command line of the documents once, without what stands before the program's name."""
    found = {}
    for path in DOCS:
        for block in re.findall(r"^```bash\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = re.sub(r"\s+", " ", line).strip()
                if words and not words.startswith("#"):
                    found[words.replace(".venv/bin/rayline", "rayline").replace(".venv/bin/pip", "pip")] = None
    return list(found)


RUN_HERE = [line for line in commands() if not line.startswith(tuple(RUN_ELSEWHERE))]


def test_what_is_said_to_be_run_elsewhere_is_there():
    for place in RUN_ELSEWHERE.values():
        file, _, name = place.partition("::")
        assert f"def {name}(" in (ROOT / file).read_text() if name else (ROOT / file).is_file(), place


@pytest.fixture(scope="module")
def folder(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where commands are run, with the files that they name."""
    folder = tmp_path_factory.mktemp("commands")
    rows = [{"timestamp": 50 * i, "input_length": 20, "output_length": 4, "hash_ids": [i]} for i in range(10)]
    (folder / "conversation_trace.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "serve_config.yaml").write_text((ROOT / "serve_config.yaml").read_text())
    row = {"part": "throughput", "engine": "emulated", "replicas": 1, "output_tokens_per_s": 10}
    (folder / "scaling.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "results").mkdir()
    run(
        f"rayline bench run --url {server.url}/v1 --model demo --token-ids 97-122 --num-requests 4 --concurrency 2 "
        "--output-tokens 4 --input-tokens 8 --out results/r.json",
        folder,
    )
    for name in ("ours", "theirs"):
        shutil.copytree(folder / "results", folder / name)
    return folder


def run(line: str, folder: Path) -> str:
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def small(line: str, server: Server) -> str:
    """The command against our server, with less work."""
    line = line.replace("http://127.0.0.1:8000", server.url).replace("--url …", f"--url {server.url}/v1")
    line = re.sub(r"--num-requests \d+", "--num-requests 4", re.sub(r"--duration-s \d+", "--duration-s 1", line))
    line = line.replace("--input-tokens 100-1024 --output-tokens 128", "--input-tokens 8-16 --output-tokens 4")
    line = line.replace("--model NAME", "--model demo --token-ids 97-122").replace(".venv/bin/python", "python")
    line = line.replace("--rates 1,2,4,8,16", "--rates 2,4")
    if "--rate" in line:
        line += " --input-tokens 8 --output-tokens 4"
    return line


@pytest.mark.parametrize("line", RUN_HERE, ids=[" ".join(shlex.split(line, comments=True)[:4]) for line in RUN_HERE])
def test_command(server: Server, folder: Path, line: str):
    printed = run(small(line, server), folder)
    if "/chat/completions" in line:
        assert json.loads(printed)["choices"][0]["message"]["content"] == "42"
