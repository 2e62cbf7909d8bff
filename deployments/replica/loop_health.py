"""`LoopHealth`: the state of an engine loop, for health checks and routers."""

from dataclasses import dataclass

from deployments.channel.messages import Condition, Machine


@dataclass(slots=True)
class LoopHealth:
    """The state that health checks and routers read. Only the loop writes it."""

    failure: str | None = None
    """Why the engine will never step again."""
    has_shut_down: bool = False
    """Whether `failure` is set because the replica was asked to end."""
    num_failed_steps: int = 0
    """Consecutive failed steps up to now."""
    busy_since: float | None = None
    """When the step that now runs began, by the monotonic clock."""

    def condition(self, fingerprint: str, machine: Machine | None) -> Condition:
        """The condition as routers are told of it.

        Args:
            fingerprint: of the model version.
            machine: where the replica runs; None for not known.
        """
        return Condition(fingerprint, self.num_failed_steps, self.failure, self.has_shut_down, machine)
