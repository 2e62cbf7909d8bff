"""What deploy/ holds is well formed, and says only what exists."""

import json
import re
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from deployments.config import AppConfig
from deployments.observe.metrics import RouterMetrics

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = list(yaml.safe_load_all((DEPLOY / "kuberay" / "rayservice.yaml").read_text()))


class State:
    def snapshot(self) -> dict:
        router = dict.fromkeys(
            (
                "num_live",
                "num_waiting",
                "num_waiting_tokens",
                "num_requests",
                "num_refused",
                "num_resumes",
                "num_moves",
            ),
            0,
        )
        replica = dict.fromkeys(
            ("num_running", "num_waiting", "num_used_pages", "num_pages", "num_preemptions", "num_prompt_tokens",
             "num_generated_tokens", "num_cached_prompt_tokens", "num_waiting_tokens", "is_serving", "age_s"), 0,
        )  # fmt: skip
        return {"router": router, "replicas": {"a": replica}}


def exported_names() -> set[str]:
    """Names of all series, those included that appear with the first request."""
    text = RouterMetrics("demo", State()).text().decode()
    names = set(re.findall(r"^([a-z_:0-9]+)[ {]", text, re.MULTILINE))
    return (
        names
        | {f"{name}_total" for name in re.findall(r"# HELP (vllm:request_success)", text)}
        | {"vllm:request_success_total"}
    )


@pytest.mark.parametrize("path", ["grafana/dashboards/rayline.json", "prometheus/alerts.yml"])
def test_only_metrics_that_exist_are_asked_for(path: str):
    asked = set(re.findall(r"(?:vllm|rayline):[a-z_0-9]+", (DEPLOY / path).read_text()))
    assert asked
    assert asked - exported_names() == set()


def test_every_alert_is_explained():
    rules = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"][0]["rules"]
    operations = (ROOT / "docs" / "operations.md").read_text()
    assert [rule["alert"] for rule in rules if f"| {rule['alert']} |" not in operations] == []


def test_kuberays_serve_config_is_one_that_serve_and_we_take():
    """The text inside the RayService goes through Serve's own schema and through ours."""
    (service,) = (document for document in KUBERNETES if document["kind"] == "RayService")
    schema = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = schema.applications
    assert application.import_path == "deployments.app:build_app"
    config = AppConfig.model_validate(application.args)
    workers = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    assert config.replicas.autoscaling.max_replicas == workers["maxReplicas"]
    environment = [item["name"] for item in workers["template"]["spec"]["containers"][0]["env"]]
    assert config.api_keys_env in environment


def test_kubernetes_names_agree():
    """Secrets, services and ports that one document uses are in another."""
    text = (DEPLOY / "kuberay" / "rayservice.yaml").read_text()
    names = {(document["kind"], document["metadata"]["name"]) for document in KUBERNETES}
    assert ("Secret", "rayline-secrets") in names
    (secret,) = (document for document in KUBERNETES if document["kind"] == "Secret")
    assert set(re.findall(r"key: ([a-z-]+)\n", text)) == set(secret["stringData"])
    assert ("Service", re.search(r"redisAddress: (\w+):6379", text)[1]) in names
    (monitor,) = (document for document in KUBERNETES if document["kind"] == "PodMonitor")
    assert f"name: {monitor['spec']['podMetricsEndpoints'][0]['port']}" in text


def test_compose_mounts_what_is_there():
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    for service in compose["services"].values():
        for volume in service.get("volumes", []):
            assert (DEPLOY / volume.split(":")[0]).exists(), volume
    targets = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"][0]
    host, _, port = targets["static_configs"][0]["targets"][0].partition(":")
    assert host in compose["services"]
    assert compose["services"][host]["ports"][0].endswith(f":{port}")
    provider = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/rayline.yml").read_text())["providers"][0]
    assert any(provider["options"]["path"] in volume for volume in compose["services"]["grafana"]["volumes"])


def test_dockerfile_copies_what_the_package_needs():
    """Every path copied exists and is let through by .dockerignore."""
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {name for line in re.findall(r"^COPY (.+) \S+$", dockerfile, re.MULTILINE) for name in line.split()}
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)


def test_board_is_whole():
    board = json.loads((DEPLOY / "grafana" / "dashboards" / "rayline.json").read_text())
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
