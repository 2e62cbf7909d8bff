"""What a router shows people about a model's fleet at this moment; the fleet page draws it."""

from typing import Any

from deployments.channel.messages import EngineInfo
from deployments.fleet.autoscaling import ReplicaUse, desired_replicas
from deployments.fleet.engine_use import replica_use, targets_of
from deployments.fleet.watch import FleetWatch
from deployments.model_config import ServedModelConfig
from deployments.router.dispatcher import Dispatcher
from deployments.router.model_state import ModelState

_ENGINE_FIELDS = ("device", "dtype", "backend", "max_seq_len", "num_slots", "num_gpus")


class FleetView:
    """Puts into words and plain values what a router knows.

    Args:
        key: the name that only this model has.
        config: the model's settings.
        watch: its view of the replicas.
        dispatcher: holds the router's waiting requests.
    """

    def __init__(self, key: str, config: ServedModelConfig, watch: FleetWatch, dispatcher: Dispatcher) -> None:
        self._key = key
        self._config = config
        self._watch = watch
        self._dispatcher = dispatcher

    def event(self, replicas: dict[str, Any], info: EngineInfo | None, state: ModelState) -> dict[str, Any]:
        """The model and its replicas.

        Args:
            replicas: `FleetWatch.snapshot`.
            info: what the engines are; None until one has reported it.
            state: whether the model answers.
        """
        bounds = self._config.replicas
        return {
            "name": self._key,
            "aliases": list(self._config.aliases),
            "state": state,
            "engine": None if info is None else {name: getattr(info, name) for name in _ENGINE_FIELDS},
            "wanted": (bounds.fewest_replicas, bounds.most_replicas),
            "scaling": self._scaling(),
            "replicas": replicas,
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
