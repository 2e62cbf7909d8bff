"""`LoopHealth`: how an engine loop is, for health checks and routers."""

from dataclasses import dataclass

from deployments.channel.messages import Condition, Machine


@dataclass(slots=True)
class LoopHealth:
    """What a health check and the routers look at. The loop writes, others read."""

    failure: str | None = None
    """Why the engine will never step again."""
    has_shut_down: bool = False
    """Whether that is because the replica was asked to end."""
    num_failed_steps: int = 0
    """Steps that failed one after the other, up to now."""
    busy_since: float | None = None
    """When the step that now runs began, by the monotonic clock."""

    def condition(self, fingerprint: str, machine: Machine | None) -> Condition:
        """What routers are told.

        Args:
            fingerprint: of the model version.
            machine: where the replica runs; None for not known.
        """
        return Condition(fingerprint, self.num_failed_steps, self.failure, self.has_shut_down, machine)
