"""How many engine replicas there should be. The decision is a function of plain numbers; Serve's controller calls it.

Serve ships this module to its controller by value, so it imports no other module of this project.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

STATS_WAITING_TOKENS, STATS_ROW_USE, STATS_POOL_USE = "waiting_tokens", "row_use", "pool_use"
"""Keys of what `EngineReplica.record_autoscaling_stats` returns."""


@dataclass(frozen=True)
class ReplicaUse:
    """How busy one replica is.

    Attributes:
        waiting_tokens: tokens still to prefill, including those that a router holds back and told this replica about.
        row_use: requests it has, divided by the rows it has; more than 1 if some wait for a row.
        pool_use: share of its slot pool in use.
    """

    waiting_tokens: float
    row_use: float
    pool_use: float


@dataclass(frozen=True)
class Targets:
    """The most that a replica should carry on average."""

    waiting_tokens: float
    row_use: float
    pool_use: float


def desired_replicas(replicas: Iterable[ReplicaUse], targets: Targets) -> tuple[int, str]:
    """Number of replicas that would carry the present load within the targets, and why; 0 if there is no load."""
    uses = list(replicas)
    waiting_tokens = sum(use.waiting_tokens for use in uses)
    rows, pool = sum(use.row_use for use in uses), sum(use.pool_use for use in uses)
    wants = [
        (math.ceil(waiting_tokens / targets.waiting_tokens), f"{waiting_tokens:,.0f} tokens wait to be prefilled"),
        (math.ceil(rows / targets.row_use - 1e-9), f"requests fill the rows of {rows:.1f} replicas"),
        (math.ceil(pool / targets.pool_use - 1e-9), f"sequences fill the slot pools of {pool:.1f} replicas"),
    ]
    number, reason = max(wants, key=lambda want: want[0])
    return number, reason if number else "nothing runs"


class EnginePolicy:
    """Serve's autoscaling policy for the engine replicas; bounds and delays are Serve's own.

    Args:
        targets: the fields of `Targets`.
    """

    def __init__(self, **targets: float) -> None:
        self._targets = Targets(**targets)

    def __call__(self, ctx: Any) -> tuple[float, dict[str, Any]]:
        """Number of replicas wanted in a `ray.serve.config.AutoscalingContext`, and no state to remember."""
        metrics: Mapping[str, Mapping[Any, float]] = ctx.aggregated_metrics or {}
        running = set(ctx.running_replicas)
        names = STATS_WAITING_TOKENS, STATS_ROW_USE, STATS_POOL_USE
        uses = [ReplicaUse(*(metrics.get(name, {}).get(replica, 0.0) for name in names)) for replica in running]
        number, _ = desired_replicas(uses, self._targets)
        if not number and ctx.total_num_requests > 0:
            number = 1  # a call waits in Serve, or runs on a replica that has sent no statistics yet
        return number, {}
