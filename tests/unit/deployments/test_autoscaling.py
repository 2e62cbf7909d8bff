"""How many replicas a load asks for."""

import pytest
from pydantic import ValidationError

from deployments.config import AppConfig
from deployments.fleet.autoscaling import EnginePolicy, ReplicaUse, Targets, desired_replicas

TARGETS = Targets(waiting_tokens=10_000, row_use=0.8, pool_use=0.9)


@pytest.mark.parametrize(
    ("uses", "number", "reason"),
    [
        ([], 0, "nothing runs"),
        ([ReplicaUse(0, 0, 0)] * 3, 0, "nothing runs"),
        ([ReplicaUse(0, 0.01, 0.001)], 1, "rows"),
        ([ReplicaUse(0, 0.8, 0.5)] * 2, 2, "rows"),
        ([ReplicaUse(0, 0.81, 0.5)] * 2, 3, "rows"),
        ([ReplicaUse(0, 4.0, 0.5)], 5, "rows of 4.0 replicas"),
        ([ReplicaUse(35_000, 0.5, 0.5)], 4, "35,000 tokens wait"),
        ([ReplicaUse(0, 0.2, 1.0)] * 4, 5, "slot pools of 4.0 replicas"),
    ],
)
def test_the_scarcest_thing_decides(uses, number, reason):
    wanted, why = desired_replicas(uses, TARGETS)
    assert wanted == number
    assert reason in why


class Context:
    def __init__(self, requests: float, **metrics: dict[str, float]) -> None:
        self.running_replicas = ["a", "b"]
        self.total_num_requests = requests
        self.aggregated_metrics = metrics


def test_statistics_of_replicas_that_are_gone_do_not_count():
    policy = EnginePolicy(waiting_tokens=10_000, row_use=0.8, pool_use=0.9)
    context = Context(9, row_use={"a": 0.4, "b": 0.4, "gone": 5.0}, waiting_tokens={"a": 5}, pool_use={})
    assert policy(context) == (1, {})


def test_a_call_that_waits_asks_for_one():
    policy = EnginePolicy(waiting_tokens=10_000, row_use=0.8, pool_use=0.9)
    assert policy(Context(0)) == (0, {})
    assert policy(Context(3)) == (1, {})


@pytest.mark.parametrize("bounds", [{"max_replicas": 0}, {"min_replicas": 3, "max_replicas": 2}, {}, {"max": 3}])
def test_bad_bounds_are_refused(bounds):
    with pytest.raises(ValidationError):
        AppConfig.model_validate({"replicas": {"autoscaling": bounds}})
