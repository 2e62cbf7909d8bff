"""An engine's state in the terms of the autoscaling policy, which itself may import nothing from this project."""

from deployments.fleet.autoscaling import ReplicaUse, Targets
from deployments.model_config import AutoscalingConfig
from llm.serving.schemas import EngineStats


def replica_use(stats: EngineStats, queued_tokens: int) -> ReplicaUse:
    """How busy a replica is, including what routers hold back for it."""
    return ReplicaUse(
        waiting_tokens=stats.num_waiting_tokens + queued_tokens,
        row_use=(stats.num_running + stats.num_waiting) / max(stats.max_rows, 1),
        pool_use=stats.num_used_pages / max(stats.num_pages, 1),
    )


def targets_of(autoscaling: AutoscalingConfig) -> Targets:
    """The most that the configuration wants a replica to carry."""
    return Targets(
        waiting_tokens=autoscaling.target_waiting_tokens,
        row_use=autoscaling.target_row_use,
        pool_use=autoscaling.target_pool_use,
    )
