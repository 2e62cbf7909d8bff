"""`ServeEngineReplica`: the engine replica that Ray Serve starts and asks for statistics."""

import gc
import sys

from ray import serve

from deployments.fleet.autoscaling import STATS_POOL_USE, STATS_ROW_USE, STATS_WAITING_TOKENS
from deployments.fleet.engine_use import replica_use
from deployments.model_config import ServedModelConfig
from deployments.observe.terminal import show_warnings
from deployments.replica.engine_replica import EngineReplica

_SWITCH_INTERVAL_S = 0.0002
"""Switch interval between Python threads, instead of 5 ms. The engine's thread releases the interpreter in each of a
step's many calls into PyTorch. While Serve's thread takes in a burst of requests, the engine's would wait a whole
interval each time to get it back."""


class ServeEngineReplica(EngineReplica):
    """An `EngineReplica` in a process of its own, under the id that Ray Serve gave it.

    Args:
        config: the settings of the model.
    """

    def __init__(self, config: ServedModelConfig) -> None:
        show_warnings()
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        super().__init__(config, serve.get_replica_context().replica_id.unique_id)
        # All objects made so far stay. A collection that goes through them takes 180 ms: a gap in every stream.
        gc.collect()
        gc.freeze()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """The statistics that the autoscaling policy uses; Ray Serve asks twice a second."""
        use = replica_use(self.latest_stats, self.queued_tokens)
        return {
            STATS_WAITING_TOKENS: use.waiting_tokens,
            STATS_ROW_USE: use.row_use,
            STATS_POOL_USE: use.pool_use,
        }
