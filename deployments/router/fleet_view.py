"""What a router shows people about the fleet at this moment; the fleet page draws it."""

import time
from typing import Any

from deployments.channel.messages import EngineInfo
from deployments.config import AppConfig
from deployments.fleet.autoscaling import ReplicaUse, desired_replicas
from deployments.fleet.engine_use import replica_use, targets_of
from deployments.fleet.watch import FleetWatch
from deployments.router.dispatcher import Dispatcher

_ENGINE_FIELDS = ("device", "dtype", "backend", "max_seq_len", "num_slots", "num_gpus")


class FleetView:
    """Puts into words and plain values what a router knows.

    Args:
        config: the application's configuration.
        router_id: the router's name among all routers.
        watch: its view of the replicas.
        dispatcher: holds the router's waiting requests.
    """

    def __init__(self, config: AppConfig, router_id: str, watch: FleetWatch, dispatcher: Dispatcher) -> None:
        self._config = config
        self._router_id = router_id
        self._watch = watch
        self._dispatcher = dispatcher

    def event(self, state: dict[str, Any], info: EngineInfo | None) -> dict[str, Any]:
        """The router, the replicas of each model, and what happened recently.

        Args:
            state: `Router.snapshot`.
            info: what the engines are; None until one has reported it.
        """
        replicas = self._config.replicas
        return {
            "at": time.time(),
            "router_id": self._router_id,
            "router": state["router"],
            "models": [
                {
                    "name": self._config.model_name,
                    "engine": None if info is None else {name: getattr(info, name) for name in _ENGINE_FIELDS},
                    "wanted": (replicas.fewest_replicas, replicas.most_replicas),
                    "scaling": self._scaling(),
                    "replicas": state["replicas"],
                }
            ],
            "events": self._watch.record.events.items(),
            "departures": self._watch.record.departures(),
        }

    def _scaling(self) -> str | None:
        """What autoscaling wants and why, computed from the replicas' statistics as Serve's controller does."""
        autoscaling = self._config.replicas.autoscaling
        if autoscaling is None:
            return None
        uses = [replica_use(stats, 0) for stats in self._watch.running_stats()]
        uses.append(ReplicaUse(self._dispatcher.num_waiting_tokens, 0, 0))
        number, reason = desired_replicas(uses, targets_of(autoscaling))
        replicas = "1 replica" if number == 1 else f"{number} replicas"
        bounds = f"{autoscaling.min_replicas} to {autoscaling.max_replicas}"
        return f"The load asks for {replicas} ({reason}); {bounds} may run."
