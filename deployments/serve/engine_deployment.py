"""`ServeEngineReplica`: the engine replica as Ray Serve starts it, asks for statistics and checks."""

from ray import serve

from deployments.config import AppConfig
from deployments.fleet.autoscaling import STATS_POOL_USE, STATS_ROW_USE, STATS_WAITING_TOKENS
from deployments.fleet.engine_use import replica_use
from deployments.observe.engine_metrics import EngineMetrics
from deployments.replica.engine_replica import EngineReplica


class ServeEngineReplica(EngineReplica):
    """An `EngineReplica` under the id that Ray Serve gave it, with metrics in Ray's own export.

    Args:
        config: the application's configuration.
    """

    def __init__(self, config: AppConfig) -> None:
        super().__init__(config, serve.get_replica_context().replica_id.unique_id)
        self._metrics = EngineMetrics(self.info.model, self.replica_id)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What the autoscaling policy decides by; Ray Serve asks twice a second."""
        use = replica_use(self.latest_stats, self.queued_tokens)
        return {
            STATS_WAITING_TOKENS: use.waiting_tokens,
            STATS_ROW_USE: use.row_use,
            STATS_POOL_USE: use.pool_use,
        }

    def check_health(self) -> None:
        """See `EngineReplica`; also brings the metrics up to date.

        Raises:
            EngineError: the engine broke down, or hangs in a step.
        """
        self._metrics.update(self.latest_stats)
        super().check_health()
