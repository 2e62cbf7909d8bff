"""GPUs of a replica: a cluster that has none at this moment must not become one that serves on CPUs unasked."""

import pytest
from ray.serve import Application

from deployments.app import build_app
from deployments.config import AppConfig
from deployments.serve.cluster import gpus_a_replica, may_nodes_join


@pytest.mark.parametrize(
    ("changes", "num_gpus", "may_join", "expected"),
    [
        ({}, 4, False, 1),
        ({}, 0, True, 1),  # scaled to zero, or its GPU node has not joined yet
        ({}, 0, False, 0),
        ({"device": "cuda"}, 0, False, 1),
        ({"device": "cuda:0"}, 0, True, 1),
        ({"device": "cpu"}, 4, True, 0),
        ({"engine_kind": "emulated"}, 4, True, 0),
        ({"replicas": {"num_gpus": 0}}, 4, True, 0),
        ({"replicas": {"num_gpus": 1}}, 0, False, 1),
        ({"replicas": {"num_gpus": 0.5}, "device": "cuda"}, 0, False, 0.5),
        ({"engine": {"tensor_parallel_size": 4}}, 8, False, 4),
        ({"engine": {"tensor_parallel_size": 4}}, 0, True, 4),
        ({"engine": {"tensor_parallel_size": 4}, "device": "cpu"}, 8, True, 0),
        ({"engine": {"tensor_parallel_size": 4}, "replicas": {"num_gpus": 0}}, 8, True, 0),
    ],
)
def test_a_replica_asks_for_a_gpu_where_one_may_come(changes: dict, num_gpus: float, may_join: bool, expected: float):
    assert gpus_a_replica(AppConfig.model_validate(changes), num_gpus, may_join) == expected


@pytest.mark.parametrize(("may_join", "fix"), [(True, "replicas.num_gpus: 0"), (False, "replicas.num_gpus: 1")])
def test_without_a_gpu_one_line_says_what_happens_and_how_to_change_it(serve_log, may_join: bool, fix: str):
    gpus_a_replica(AppConfig(), 0, may_join)
    (line,) = (record.getMessage() for record in serve_log)
    assert fix in line
    assert "\n" not in line


@pytest.mark.parametrize("name", ["KUBERAY_GEN_RAY_START_CMD", "RAY_CLUSTER_NAME", "RAY_NODE_TYPE_NAME"])
def test_nodes_may_join_under_kuberay_and_rays_autoscaler(monkeypatch, tmp_path, name: str):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(name, raising=False)
    assert not may_nodes_join()
    monkeypatch.setenv(name, "something")
    assert may_nodes_join()


def test_nodes_may_join_where_rays_launcher_made_the_head(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not may_nodes_join()
    (tmp_path / "ray_bootstrap_config.yaml").write_text("max_workers: 4\n")
    assert may_nodes_join()


@pytest.mark.usefixtures("no_cluster")
def test_the_application_asks_ray_for_it(monkeypatch, tmp_path):
    """On a cluster without GPUs to which some may come, the deployment itself waits for one."""
    monkeypatch.setenv("RAY_CLUSTER_NAME", "rayline")
    (tmp_path / "keys.yaml").write_text("- {name: team, key: sk-one}\n")
    config = AppConfig.model_validate(
        {
            "api_keys_file": str(tmp_path / "keys.yaml"),
            "router": {"num_replicas": 2, "resources": {"rayline_router": 0.001}},
        }
    )
    router = build_app(config)._bound_deployment
    (engines,) = (application._bound_deployment for application in router.init_args[2].values())
    shared = [arg._bound_deployment for arg in router.init_args if isinstance(arg, Application)]
    assert [deployment.name for deployment in (engines, *shared)] == ["EngineReplica", "Accountant", "ResponseStore"]
    assert engines.ray_actor_options["num_gpus"] == 1
    assert router.ray_actor_options["num_gpus"] == 0
    assert router.ray_actor_options["resources"] == {"rayline_router": 0.001}
    assert "resources" not in engines.ray_actor_options
    for deployment in shared:
        assert deployment.ray_actor_options["num_gpus"] == 0
        assert deployment.ray_actor_options["resources"] == {"rayline_router": 0.0001}, "it runs where routers do"
