"""What Ray Serve is told of each deployment's version: it restarts those whose version has changed."""

from typing import Any

import pytest
from ray.serve import Application
from ray.serve._private.build_app import build_app as built
from ray.serve._private.config import DeploymentConfig
from ray.serve._private.deploy_utils import get_deploy_args

from deployments.app import build_app
from deployments.config import AppConfig

pytestmark = pytest.mark.usefixtures("no_cluster")


def entry(name: str, **changes: Any) -> dict[str, Any]:
    return {"model": "configs/demo", "served_model_name": name, "device": "cpu", "engine_kind": "emulated", **changes}


@pytest.fixture
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve's builder asks Ray which job it is part of; there is none."""

    class Context:
        def get_job_id(self) -> str:
            return "01"

    monkeypatch.setattr("ray.get_runtime_context", Context)


def versions(*models: dict[str, Any], code_version: str = "of the arguments", **settings: Any) -> dict[str, str]:
    """The version of each deployment, by its name, as the controller gets it."""
    application: Application = build_app(AppConfig.model_validate({"models": models, **settings}))
    found = {}
    for deployment in built(application, name="app").deployments:
        args = get_deploy_args(
            deployment.name,
            deployment._replica_config,
            deployment_config=deployment._deployment_config,
            version=code_version,
        )
        found[deployment.name] = DeploymentConfig.from_proto_bytes(args["deployment_config_proto_bytes"]).version
    return found


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    """Deployments that are in both, with another version."""
    return {name for name in before.keys() & after.keys() if before[name] != after[name]}


@pytest.mark.usefixtures("no_job")
def test_a_model_is_restarted_only_for_its_own_settings():
    before = versions(entry("a"), entry("b"), code_version="one")
    assert set(before) == {"Router", "EngineReplica-a", "EngineReplica-b"}
    assert before["Router"] == "one", "routers know all models"
    other = versions(entry("a"), entry("b", dtype="float32"), entry("c"), code_version="two")
    assert changed(before, other) == {"Router", "EngineReplica-b"}
    assert changed(before, versions(entry("b"), code_version="one")) == set(), "nor where another is removed"


@pytest.mark.usefixtures("no_job")
@pytest.mark.parametrize(
    "changes",
    [
        {"aliases": ["x"]},
        {"admission": {"max_queue_s": 5}},
        {"tool_parser": "hermes"},
        {"replicas": {"num_replicas": 3}},
        {"replicas": {"autoscaling": {"max_replicas": 3}}},
    ],
)
def test_what_concerns_only_routers_or_serve_restarts_no_replica(changes: dict[str, Any]):
    assert changed(versions(entry("a")), versions(entry("a", **changes))) == set()


@pytest.mark.usefixtures("no_job")
@pytest.mark.parametrize(
    "changes", [{"dtype": "float16"}, {"engine": {"max_batch_size": 7}}, {"replicas": {"stall_timeout_s": 5}}]
)
def test_what_concerns_engines_does(changes: dict[str, Any]):
    assert changed(versions(entry("a")), versions(entry("a", **changes))) == {"EngineReplica-a"}


@pytest.mark.usefixtures("no_job")
def test_stored_responses_survive_another_model():
    shared = {"router": {"num_replicas": 2}}
    before = versions(entry("a"), code_version="one", **shared)
    assert "ResponseStore" in before
    assert changed(before, versions(entry("a"), entry("b"), code_version="two", **shared)) == {"Router"}
