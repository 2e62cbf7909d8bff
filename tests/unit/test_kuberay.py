"""The manifests of deploy/kuberay: a cluster takes them, and what they say of each other is true."""

import copy
import json
import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

import jsonschema
import pytest
import yaml
from kubernetes_schemas import check
from ray.scripts.scripts import drain_node
from ray.serve.schema import ServeDeploySchema

from deployments.config import AppConfig

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
FOLDER = DEPLOY / "kuberay"
FILES = {
    str(path.relative_to(FOLDER)): list(yaml.safe_load_all(path.read_text()))
    for path in sorted(FOLDER.rglob("*.yaml"))
    if path.name != "kustomization.yaml"
}
DOCUMENTS = [document for documents in FILES.values() for document in documents]


def of_kind(kind: str) -> dict:
    (document,) = (document for document in DOCUMENTS if document["kind"] == kind)
    return document


CLUSTER = of_kind("RayService")["spec"]["rayClusterConfig"]
HEAD = CLUSTER["headGroupSpec"]
WORKERS = {group["groupName"]: group for group in CLUSTER["workerGroupSpecs"]}
GROUPS = {"head": HEAD, **WORKERS}
SERVE_CONFIG = yaml.safe_load(of_kind("RayService")["spec"]["serveConfigV2"])
PODS = {
    **{name: group["template"] for name, group in GROUPS.items()},
    "redis": of_kind("StatefulSet")["spec"]["template"],
    "download": of_kind("Job")["spec"]["template"],
}


def application() -> AppConfig:
    """The application inside the RayService, through Serve's own schema and through ours."""
    schema = ServeDeploySchema.model_validate(SERVE_CONFIG)
    (one,) = schema.applications
    assert one.import_path == "deployments.app:build_app"
    return AppConfig.model_validate(one.args)


def container(template: dict) -> dict:
    (one,) = template["spec"]["containers"]
    return one


def num_bytes(quantity: str) -> int:
    """Of a Kubernetes quantity of memory."""
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi)", quantity).groups()
    return int(number) << {"Mi": 20, "Gi": 30}[unit]


@pytest.mark.parametrize("file", FILES)
def test_a_cluster_takes_every_object(file: str):
    for document in FILES[file]:
        check(document)


def pod_field(document: dict) -> None:
    document["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]["tolerationz"] = []


def security_type(document: dict) -> None:
    document["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["securityContext"]["runAsUser"] = "ray"


def start_parameter_type(document: dict) -> None:
    document["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0


def misspelled(document: dict) -> None:
    document["spec"]["selectors"] = {}


def percentage(document: dict) -> None:
    document["spec"]["minAvailable"] = ["50%"]


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("RayService", misspelled),
        ("RayService", pod_field),
        ("RayService", security_type),
        ("RayService", start_parameter_type),
        ("PodMonitor", misspelled),
        ("ScrapeConfig", misspelled),
        ("PrometheusRule", misspelled),
        ("StatefulSet", misspelled),
        ("PodDisruptionBudget", percentage),
    ],
)
def test_a_cluster_refuses_what_is_wrong(kind: str, fault):
    document = copy.deepcopy(next(document for document in DOCUMENTS if document["kind"] == kind))
    fault(document)
    with pytest.raises((ValueError, jsonschema.ValidationError)):
        check(document)


def test_the_kustomization_leaves_out_the_keys_and_what_needs_another_operator():
    listed = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["resources"]
    assert set(FILES) - set(listed) == {"secrets.yaml", *(name for name in FILES if name.startswith("monitoring/"))}
    assert set(listed) <= set(FILES)


def test_replicas_and_gpu_pods_agree():
    config, gpu = application(), WORKERS["gpu"]
    assert config.replicas.autoscaling.max_replicas == gpu["maxReplicas"]
    assert gpu["minReplicas"] <= config.replicas.autoscaling.min_replicas
    num_gpus = config.engine.tensor_parallel_size
    assert config.replicas.num_gpus == num_gpus, "else a cluster without GPU pods at the moment would have to guess"
    resources = container(gpu["template"])["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == num_gpus
    assert gpu["rayStartParams"]["num-gpus"] == str(num_gpus)
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
    assert "nvidia.com/gpu" not in container(routers["template"])["resources"]["limits"]
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
    resources = container(spec["template"])["resources"]
    assert {"cpu", "memory"} <= resources["limits"].keys() & resources["requests"].keys()
    assert spec["rayStartParams"]["num-cpus"] in ("0", resources["limits"]["cpu"])


@pytest.mark.parametrize("group", GROUPS)
def test_shared_memory_holds_rays_object_store(group: str):
    spec = GROUPS[group]
    mounts = {mount["mountPath"]: mount["name"] for mount in container(spec["template"])["volumeMounts"]}
    (shm,) = (volume for volume in spec["template"]["spec"]["volumes"] if volume["name"] == mounts["/dev/shm"])
    assert shm["emptyDir"]["medium"] == "Memory"
    store = int(spec["rayStartParams"]["object-store-memory"])
    assert store < num_bytes(shm["emptyDir"]["sizeLimit"])
    assert num_bytes(shm["emptyDir"]["sizeLimit"]) < num_bytes(
        container(spec["template"])["resources"]["limits"]["memory"]
    )


@pytest.mark.parametrize("group", GROUPS)
def test_probes_of_rays_pods_start_no_process(group: str):
    """The operator adds probes that call a shell and wget where a container has none."""
    one = container(GROUPS[group]["template"])
    for name in ("livenessProbe", "readinessProbe"):
        assert one[name].keys() & {"exec", "httpGet", "tcpSocket", "grpc"} == {"httpGet"}, name
    assert one["livenessProbe"]["httpGet"] == {"path": "/api/healthz", "port": 52365}
    port = SERVE_CONFIG["http_options"]["port"]
    assert {"containerPort": port, "name": "serve"} in one["ports"], "the operator makes the service of it"
    if group != "head":
        assert one["readinessProbe"]["httpGet"] == {"path": "/-/healthz", "port": port}, "ready while it serves"


def test_the_image_has_what_the_pods_call():
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    for group in GROUPS.values():
        text = json.dumps(container(group["template"]))
        for program in ("wget", "curl", "pgrep", "ps", "nc"):
            assert not re.search(rf"\b{program}\b", text) or program in dockerfile, program


def test_rays_ports_want_its_token():
    """The operator reaches the dashboard by the pod's address, and whoever reaches it may run code."""
    assert HEAD["rayStartParams"]["dashboard-host"] == "0.0.0.0"
    assert CLUSTER["authOptions"]["mode"] == "token"


@pytest.mark.parametrize("pod", PODS)
def test_no_pod_has_more_rights_than_it_needs(pod: str):
    spec = PODS[pod]["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container(PODS[pod])["securityContext"]["allowPrivilegeEscalation"] is False
    assert container(PODS[pod])["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    if pod != "redis":
        uid = re.search(r"useradd .*--uid (\d+) rayline", (DEPLOY / "Dockerfile").read_text())[1]
        assert spec["securityContext"]["runAsUser"] == int(uid), "the image's user owns what it needs"


@pytest.mark.parametrize("group", WORKERS)
def test_pods_of_a_group_are_spread_over_nodes_and_zones(group: str):
    template = WORKERS[group]["template"]
    constraints = template["spec"]["topologySpreadConstraints"]
    assert [one["topologyKey"] for one in constraints] == ["kubernetes.io/hostname", "topology.kubernetes.io/zone"]
    for one in constraints:
        assert one["labelSelector"]["matchLabels"] == template["metadata"]["labels"]
        assert one["whenUnsatisfiable"] == "ScheduleAnyway", "a cluster of one node can run it too"


def test_a_drain_of_nodes_leaves_a_router_and_an_engine():
    """Budgets of pods that an operator owns take `minAvailable` as a number, and nothing else."""
    labels = {name: group["template"]["metadata"]["labels"] for name, group in GROUPS.items()}
    budgets = {}
    for document in DOCUMENTS:
        if document["kind"] == "PodDisruptionBudget":
            spec = document["spec"]
            (group,) = (name for name, own in labels.items() if own == spec["selector"]["matchLabels"])
            assert spec.keys() == {"minAvailable", "selector"}
            budgets[group] = spec["minAvailable"]
    assert budgets.keys() == WORKERS.keys()
    assert budgets["router"] < WORKERS["router"]["minReplicas"], "else no node with a router could ever be drained"
    assert budgets["gpu"] == 1


@pytest.mark.parametrize("group", WORKERS)
def test_a_pod_that_goes_waits_for_its_streams(group: str):
    config, template = application(), WORKERS[group]["template"]
    command = " ".join(container(template)["lifecycle"]["preStop"]["exec"]["command"])
    deadline, longest = (
        int(re.search(pattern, command)[1]) for pattern in (r"deadline-remaining-seconds (\d+)", r"seq (\d+)")
    )
    drain = max(config.router.graceful_shutdown_timeout_s, config.replicas.graceful_shutdown_timeout_s)
    assert config.router.drain_after_s < drain < longest < deadline < template["spec"]["terminationGracePeriodSeconds"]


def test_a_pod_that_goes_waits_until_serve_has_moved_everything(tmp_path: Path):
    """The hook itself, with a folder in place of /proc and a program in place of Ray that notes what it is told."""
    (tmp_path / "42").mkdir()
    (tmp_path / "42" / "cmdline").write_text("ray::ServeReplica:rayline:Router")
    (tmp_path / "ray").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/said\n')
    (tmp_path / "ray").chmod(0o755)
    shell, option, script = container(WORKERS["gpu"]["template"])["lifecycle"]["preStop"]["exec"]["command"]
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    hook = subprocess.Popen([shell, option, script.replace("/proc/", f"{tmp_path}/")], env=environment)
    with pytest.raises(subprocess.TimeoutExpired):
        hook.wait(timeout=1.5)
    (tmp_path / "42" / "cmdline").unlink()
    assert hook.wait(timeout=30) == 0
    said = (tmp_path / "said").read_text()
    assert said.startswith("drain-node ")
    options = {option for parameter in drain_node.params for option in parameter.opts}
    assert set(re.findall(r"--[a-z-]+", said)) <= options


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="needs redis-server: apt-get install")
def test_redis_runs_as_it_is_told(tmp_path: Path):
    """It answers its own probe and refuses whoever lacks the password."""
    one = container(of_kind("StatefulSet")["spec"]["template"])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    environment = os.environ | {"REDIS_PASSWORD": "se cret'"}
    shell, option, script = one["command"]
    script = script.replace("/data", str(tmp_path)) + f" --bind 127.0.0.1 --port {port}"
    with subprocess.Popen([shell, option, script], env=environment, stdout=subprocess.DEVNULL) as server:
        try:
            *begin, probe = one["livenessProbe"]["exec"]["command"]
            probe = probe.replace("redis-cli", f"redis-cli -p {port}")
            deadline = time.monotonic() + 30
            while subprocess.run([*begin, probe], env=environment, capture_output=True).returncode:
                assert time.monotonic() < deadline, "it never answers"
            assert subprocess.run([*begin, probe], env=environment | {"REDIS_PASSWORD": "no"}).returncode == 1
            assert list(tmp_path.glob("appendonlydir/*.aof")), "what it is told is written down"
        finally:
            server.terminate()


def test_the_heads_state_outlives_redis():
    redis = of_kind("StatefulSet")["spec"]
    (claim,) = redis["volumeClaimTemplates"]
    one = container(redis["template"])
    assert {"name": claim["metadata"]["name"], "mountPath": "/data"} in one["volumeMounts"]
    assert "--appendonly yes --dir /data" in " ".join(one["command"])
    service = of_kind("Service")
    assert CLUSTER["gcsFaultToleranceOptions"]["redisAddress"].partition(":")[0] == service["metadata"]["name"]
    assert service["spec"]["selector"] == redis["selector"]["matchLabels"] == redis["template"]["metadata"]["labels"]


def test_models_lie_on_a_volume_that_all_pods_may_mount():
    """The job writes the model that the application names, into the volume that the other pods read."""
    claim, job = of_kind("PersistentVolumeClaim"), of_kind("Job")["spec"]["template"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for name, template in {"download": job, **{name: group["template"] for name, group in GROUPS.items()}}.items():
        (volume,) = (volume for volume in template["spec"]["volumes"] if "persistentVolumeClaim" in volume)
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        (mount,) = (mount for mount in container(template)["volumeMounts"] if mount["name"] == volume["name"])
        assert mount.get("readOnly", False) == (name != "download")
        assert application().model.startswith(mount["mountPath"] + "/")
    command = container(job)["command"]
    assert command[command.index("--local-dir") + 1] == application().model


def test_kubernetes_names_agree():
    """Secrets that one document uses are in another, and every client key reaches the application."""
    texts = [path.read_text() for path in FOLDER.rglob("*.yaml")]
    used = {key for text in texts for key in re.findall(r"^ +key: ([a-z-]+)$", text, re.MULTILINE)}
    assert used == set(of_kind("Secret")["stringData"])
    environment = {item["name"]: item for item in container(HEAD["template"])["env"]}
    keys = re.findall(r"\$\((\w+)\)", environment[application().api_keys_env]["value"])
    assert [environment[key]["valueFrom"]["secretKeyRef"]["key"] for key in keys] == ["client-keys", "metrics-key"]


def test_prometheus_on_kubernetes_scrapes_and_alerts_as_elsewhere():
    """One target for the whole deployment, by a key that it takes, as the job that the alerts ask for."""
    scrape, rules = of_kind("ScrapeConfig")["spec"], of_kind("PrometheusRule")["spec"]
    ours = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"][0]
    (static,) = scrape["staticConfigs"]
    (target,) = static["targets"]
    service, port = of_kind("RayService")["metadata"]["name"], SERVE_CONFIG["http_options"]["port"]
    assert re.fullmatch(rf"{service}-serve-svc\.[a-z-]+\.svc:{port}", target), "the service that KubeRay makes"
    assert static["labels"]["job"] == ours["job_name"]
    assert scrape["metricsPath"] == ours["metrics_path"]
    assert scrape["authorization"]["credentials"] == {"name": "rayline-secrets", "key": "metrics-key"}
    assert rules == yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())


def test_rays_own_metrics_are_scraped_from_every_pod():
    monitor = of_kind("PodMonitor")["spec"]
    (endpoint,) = monitor["podMetricsEndpoints"]
    (expression,) = monitor["selector"]["matchExpressions"]
    for group in GROUPS.values():
        labels = group["template"]["metadata"]["labels"]
        assert monitor["selector"]["matchLabels"].items() <= labels.items()
        assert labels[expression["key"]] in expression["values"]
        exported = int(group["rayStartParams"]["metrics-export-port"])
        assert {"containerPort": exported, "name": endpoint["port"]} in container(group["template"])["ports"]
    assert PODS["download"]["metadata"]["labels"][expression["key"]] not in expression["values"], "it exports nothing"
