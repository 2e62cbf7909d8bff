"""What deploy/ holds for one machine is well formed, and says only what exists; for Kubernetes: test_kuberay.py."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def test_every_alert_is_explained():
    rules = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"][0]["rules"]
    operations = (ROOT / "docs" / "operations.md").read_text()
    assert [rule["alert"] for rule in rules if f"| {rule['alert']} |" not in operations] == []


COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]


@pytest.mark.parametrize("files", [["compose.yaml"], ["compose.yaml", "compose.gpu.yaml"]], ids=["cpu", "gpu"])
def test_compose_files_are_what_the_specification_says(files: list[str]):
    command = ["check-jsonschema", "--builtin-schema", "vendor.compose-spec", *files]
    done = subprocess.run(
        [Path(sys.executable).parent / command[0], *command[1:]],
        cwd=DEPLOY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_gpu_file_lies_over_a_service_that_is_there():
    assert yaml.safe_load((DEPLOY / "compose.gpu.yaml").read_text())["services"].keys() <= SERVICES.keys()


@pytest.mark.parametrize("service", SERVICES)
def test_services_come_back_and_their_volumes_exist(service: str):
    content = SERVICES[service]
    assert content["restart"] == "unless-stopped"
    for volume in content["volumes"]:
        source = volume.split(":")[0]
        assert (DEPLOY / source).exists() if source.startswith(".") else source in COMPOSE["volumes"], volume
    for port in content.get("ports", []):
        assert port.startswith("127.0.0.1:"), "nothing here asks for a key"
    assert set(content.get("depends_on", [])) <= SERVICES.keys()


def test_the_server_keeps_its_models_and_gets_time_to_stop():
    server = SERVICES["rayline"]
    (place,) = (volume.split(":")[1] for volume in server["volumes"] if volume.startswith("models:"))
    assert f"--group=rayline {place}" in (DEPLOY / "Dockerfile").read_text(), "a new volume belongs to its user"
    for variable in ("HF_HOME", "RAYLINE_CACHE", "TRITON_CACHE_DIR"):
        assert server["environment"][variable].startswith(f"{place}/")
    assert int(server["stop_grace_period"].removesuffix("s")) > 5, "what `rayline serve` takes at most"


def test_prometheus_of_compose_finds_server_and_alertmanager():
    prometheus = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    (scrape,) = prometheus["scrape_configs"][0]["static_configs"]
    (manager,) = prometheus["alerting"]["alertmanagers"][0]["static_configs"]
    assert len(scrape["targets"]) == 1, "any router answers for all of them"
    for target in (*scrape["targets"], *manager["targets"]):
        host, _, port = target.partition(":")
        assert SERVICES[host]["ports"][0].endswith(f":{port}")
    provider = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/rayline.yml").read_text())["providers"][0]
    assert any(provider["options"]["path"] in volume for volume in SERVICES["grafana"]["volumes"])


def tool(*command: str | Path) -> "subprocess.CompletedProcess[str]":
    """What a program of Prometheus or systemd says of a file.

    Raises:
        AssertionError: it finds fault with the file.
    """
    done = subprocess.run(command, cwd=DEPLOY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def needs(program: str, package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"needs {package}: apt-get install")


@needs("promtool", "prometheus")
def test_prometheus_takes_its_configuration():
    assert "rules found" in tool("promtool", "check", "config", "prometheus/prometheus.yml").stdout


@needs("amtool", "prometheus-alertmanager")
@pytest.mark.parametrize(("severity", "receiver"), [("page", "pager"), ("ticket", "tickets")])
def test_alertmanager_takes_its_configuration_and_knows_whom_to_wake(severity: str, receiver: str):
    file = "alertmanager/alertmanager.yml"
    tool("amtool", "check-config", file)
    labels = f"severity={severity}"
    assert tool("amtool", "config", "routes", "test", f"--config.file={file}", labels).stdout.strip() == receiver


def test_every_severity_has_a_route():
    rules = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"][0]["rules"]
    assert {rule["labels"]["severity"] for rule in rules} == {"page", "ticket"}


@needs("systemd-analyze", "systemd")
def test_systemd_takes_the_unit(tmp_path: Path):
    unit = (DEPLOY / "systemd" / "rayline.service").read_text()
    program = re.search(r"^ExecStart=(\S+) serve --config \S+$", unit, re.MULTILINE)[1]
    assert program.endswith("/.venv/bin/rayline")
    (tmp_path / "rayline.service").write_text(unit.replace(program, str(Path(sys.executable).parent / "rayline")))
    assert tool("systemd-analyze", "verify", "--man=no", tmp_path / "rayline.service").stderr == "", "it also warns"


def test_the_unit_gives_the_server_time_and_places_to_write():
    unit = (DEPLOY / "systemd" / "rayline.service").read_text()
    values = dict(re.findall(r"^(\w+)=(.*)$", unit, re.MULTILINE))
    assert int(values["TimeoutStopSec"]) > 5, "what `rayline serve` takes at most"
    written = [f"/var/lib/{values['StateDirectory']}", f"/var/cache/{values['CacheDirectory']}"]
    places = re.findall(r"^Environment=\w+=(.*)$", unit, re.MULTILINE)
    assert places
    assert [place for place in places if not place.startswith(tuple(written))] == [], "all else is read-only"


def test_board_is_whole():
    board = json.loads((DEPLOY / "grafana" / "dashboards" / "rayline.json").read_text())
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24


def test_the_lock_has_what_the_packages_need():
    """`make lock` writes it. PyTorch is not in it: which build is right depends on the machine."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = dict(re.findall(r"^([a-z0-9.-]+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    wanted = [
        *project["dependencies"],
        *(line for name in ("otel", "gguf") for line in project["optional-dependencies"][name]),
    ]
    for requirement in map(Requirement, wanted):
        if requirement.name == "torch":
            assert "torch" not in locked
            continue
        assert locked[requirement.name] in requirement.specifier, f"{requirement}: run make lock"
