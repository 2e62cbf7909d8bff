"""What deploy/ holds is well formed, and says only what exists."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from ray.serve.schema import ServeDeploySchema

from deployments.config import AppConfig

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = list(yaml.safe_load_all((DEPLOY / "kuberay" / "rayservice.yaml").read_text()))


def test_every_alert_is_explained():
    rules = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"][0]["rules"]
    operations = (ROOT / "docs" / "operations.md").read_text()
    assert [rule["alert"] for rule in rules if f"| {rule['alert']} |" not in operations] == []


def of_kind(kind: str, documents: list[dict] = KUBERNETES) -> dict:
    (document,) = (document for document in documents if document["kind"] == kind)
    return document


CLUSTER = of_kind("RayService")["spec"]["rayClusterConfig"]
HEAD = CLUSTER["headGroupSpec"]
WORKERS = {group["groupName"]: group for group in CLUSTER["workerGroupSpecs"]}
GROUPS = {"head": HEAD, **WORKERS}
SERVE_CONFIG = yaml.safe_load(of_kind("RayService")["spec"]["serveConfigV2"])


def application() -> AppConfig:
    """The application inside the RayService, through Serve's own schema and through ours."""
    schema = ServeDeploySchema.model_validate(SERVE_CONFIG)
    (one,) = schema.applications
    assert one.import_path == "deployments.app:build_app"
    return AppConfig.model_validate(one.args)


def container(group: dict) -> dict:
    (one,) = group["template"]["spec"]["containers"]
    return one


def num_bytes(quantity: str) -> int:
    """Of a Kubernetes quantity of memory."""
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi)", quantity).groups()
    return int(number) << {"Mi": 20, "Gi": 30}[unit]


def test_replicas_and_gpu_pods_agree():
    config, gpu = application(), WORKERS["gpu"]
    assert config.replicas.autoscaling.max_replicas == gpu["maxReplicas"]
    assert gpu["minReplicas"] <= config.replicas.autoscaling.min_replicas
    assert config.replicas.num_gpus == 1, "else a cluster without GPU pods at the moment would have to guess"
    resources = container(gpu)["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == 1
    assert gpu["rayStartParams"]["num-gpus"] == "1"
    assert CLUSTER["enableInTreeAutoscaling"] is True


def test_only_replicas_fit_on_gpu_pods():
    """Routers need a resource that the router pods alone offer: a router on a GPU pod would keep it for ever."""
    config = application()
    (name,) = config.router.resources
    offers = {
        group: json.loads(json.loads(spec["rayStartParams"].get("resources", '"{}"'))) for group, spec in GROUPS.items()
    }
    assert [group for group, resources in offers.items() if name in resources] == ["router"]
    routers = WORKERS["router"]
    assert "nvidia.com/gpu" not in container(routers)["resources"]["limits"]
    assert routers["minReplicas"] * int(routers["rayStartParams"]["num-cpus"]) >= (
        config.router.num_replicas * config.router.num_cpus
    )
    surge = config.router.num_replicas * (1 + config.router.max_surge_percent / 100)
    assert routers["maxReplicas"] >= surge, "an update starts the new routers first"
    assert HEAD["rayStartParams"]["num-cpus"] == HEAD["rayStartParams"]["num-gpus"] == "0"


@pytest.mark.parametrize("group", GROUPS)
def test_ray_is_told_what_the_pod_has(group: str):
    """Without `num-cpus` and a limit Ray would count every core of the machine."""
    spec = GROUPS[group]
    resources = container(spec)["resources"]
    assert {"cpu", "memory"} <= resources["limits"].keys() & resources["requests"].keys()
    assert spec["rayStartParams"]["num-cpus"] in ("0", resources["limits"]["cpu"])


@pytest.mark.parametrize("group", GROUPS)
def test_shared_memory_holds_rays_object_store(group: str):
    spec = GROUPS[group]
    mounts = {mount["mountPath"]: mount["name"] for mount in container(spec)["volumeMounts"]}
    (shm,) = (volume for volume in spec["template"]["spec"]["volumes"] if volume["name"] == mounts["/dev/shm"])
    assert shm["emptyDir"]["medium"] == "Memory"
    store = int(spec["rayStartParams"]["object-store-memory"])
    assert store < num_bytes(shm["emptyDir"]["sizeLimit"])
    assert num_bytes(shm["emptyDir"]["sizeLimit"]) < num_bytes(container(spec)["resources"]["limits"]["memory"])


@pytest.mark.parametrize("group", GROUPS)
def test_probes_need_no_program_of_the_image(group: str):
    """KubeRay's own call `wget`, which the image lacks; it adds them where a container has none."""
    one = container(GROUPS[group])
    for name in ("livenessProbe", "readinessProbe"):
        assert one[name].keys() & {"exec", "httpGet", "tcpSocket", "grpc"} == {"httpGet"}, name
    assert one["livenessProbe"]["httpGet"] == {"path": "/api/healthz", "port": 52365}
    if group != "head":
        port = SERVE_CONFIG["http_options"]["port"]
        assert one["readinessProbe"]["httpGet"] == {"path": "/-/healthz", "port": port}, "ready while it serves"
        assert {"containerPort": port, "name": "serve"} in one["ports"]


def test_the_image_has_what_the_pods_call():
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    for group in GROUPS.values():
        text = json.dumps(container(group))
        for program in ("wget", "curl", "pgrep", "ps", "nc"):
            assert not re.search(rf"\b{program}\b", text) or program in dockerfile, program


def test_rays_ports_want_its_token():
    """The operator reaches the dashboard by the pod's address, and whoever reaches it may run code."""
    assert HEAD["rayStartParams"]["dashboard-host"] == "0.0.0.0"
    assert CLUSTER["authOptions"]["mode"] == "token"


@pytest.mark.parametrize("group", WORKERS)
def test_a_pod_that_goes_waits_for_its_streams(group: str):
    config, pod = application(), WORKERS[group]["template"]["spec"]
    command = " ".join(container(WORKERS[group])["lifecycle"]["preStop"]["exec"]["command"])
    deadline, longest = (
        int(re.search(pattern, command)[1]) for pattern in (r"deadline-remaining-seconds (\d+)", r"seq (\d+)")
    )
    drain = max(config.router.graceful_shutdown_timeout_s, config.replicas.graceful_shutdown_timeout_s)
    assert config.router.drain_after_s < drain < longest < deadline < pod["terminationGracePeriodSeconds"]


def test_the_heads_state_outlives_redis():
    redis = of_kind("StatefulSet")["spec"]
    (claim,) = redis["volumeClaimTemplates"]
    (one,) = redis["template"]["spec"]["containers"]
    assert {"name": claim["metadata"]["name"], "mountPath": "/data"} in one["volumeMounts"]
    assert "--appendonly yes --dir /data" in " ".join(one["command"])
    assert (
        CLUSTER["gcsFaultToleranceOptions"]["redisAddress"].partition(":")[0] == of_kind("Service")["metadata"]["name"]
    )


def test_kubernetes_names_agree():
    """Secrets that one document uses are in another, and every client key reaches the application."""
    texts = [(DEPLOY / "kuberay" / name).read_text() for name in ("rayservice.yaml", "monitoring.yaml")]
    secret = of_kind("Secret")
    used = {key for text in texts for key in re.findall(r"^ +key: ([a-z-]+)$", text, re.MULTILINE)}
    assert used == set(secret["stringData"])
    environment = {item["name"]: item for item in container(HEAD)["env"]}
    keys = re.findall(r"\$\((\w+)\)", environment[application().api_keys_env]["value"])
    assert [environment[key]["valueFrom"]["secretKeyRef"]["key"] for key in keys] == ["client-keys", "metrics-key"]


def test_prometheus_on_kubernetes_scrapes_and_alerts_as_elsewhere():
    """One target for the whole deployment, by a key that it takes, as the job that the alerts ask for."""
    monitoring = list(yaml.safe_load_all((DEPLOY / "kuberay" / "monitoring.yaml").read_text()))
    scrape, rules = of_kind("ScrapeConfig", monitoring)["spec"], of_kind("PrometheusRule", monitoring)["spec"]
    ours = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"][0]
    (static,) = scrape["staticConfigs"]
    (target,) = static["targets"]
    service, port = of_kind("RayService")["metadata"]["name"], SERVE_CONFIG["http_options"]["port"]
    assert re.fullmatch(rf"{service}-serve-svc\.[a-z-]+\.svc:{port}", target), "the service that KubeRay makes"
    assert static["labels"]["job"] == ours["job_name"]
    assert scrape["metricsPath"] == ours["metrics_path"]
    assert scrape["authorization"]["credentials"] == {"name": "rayline-secrets", "key": "metrics-key"}
    assert rules == yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())


def test_compose_mounts_what_is_there():
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    for service in compose["services"].values():
        for volume in service.get("volumes", []):
            assert (DEPLOY / volume.split(":")[0]).exists(), volume
    targets = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"][0]
    host, _, port = targets["static_configs"][0]["targets"][0].partition(":")
    assert host in compose["services"]
    assert len(targets["static_configs"][0]["targets"]) == 1, "any router answers for all of them"
    assert compose["services"][host]["ports"][0].endswith(f":{port}")
    provider = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/rayline.yml").read_text())["providers"][0]
    assert any(provider["options"]["path"] in volume for volume in compose["services"]["grafana"]["volumes"])


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
