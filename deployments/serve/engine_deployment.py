"""`ServeEngineReplica`: the engine replica as Ray Serve starts it and asks for statistics."""

import gc
import sys

from ray import serve

from deployments.config import AppConfig
from deployments.fleet.autoscaling import STATS_POOL_USE, STATS_ROW_USE, STATS_WAITING_TOKENS
from deployments.fleet.engine_use import replica_use
from deployments.observe.terminal import show_warnings
from deployments.replica.engine_replica import EngineReplica

_SWITCH_INTERVAL_S = 0.0002
"""Between Python threads, instead of 5 ms. The engine's lets go of the interpreter in each of a step's many calls into
PyTorch, and while Serve's thread takes in a burst of requests it would wait so long each time to get it back."""


class ServeEngineReplica(EngineReplica):
    """An `EngineReplica` that owns its process, under the id that Ray Serve gave it.

    Args:
        config: the application's configuration.
    """

    def __init__(self, config: AppConfig) -> None:
        show_warnings()
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        super().__init__(config, serve.get_replica_context().replica_id.unique_id)
        # What has been made so far stays. A collection that went through all of it takes 180 ms: a gap in every stream.
        gc.collect()
        gc.freeze()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What the autoscaling policy decides by; Ray Serve asks twice a second."""
        use = replica_use(self.latest_stats, self.queued_tokens)
        return {
            STATS_WAITING_TOKENS: use.waiting_tokens,
            STATS_ROW_USE: use.row_use,
            STATS_POOL_USE: use.pool_use,
        }
