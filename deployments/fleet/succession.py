"""`Succession`: whether an update has left a router behind."""

import math


class Succession:
    """Compares when replicas of the router's version and of other versions joined.

    Ray Serve starts replicas of the newest version only. Once the newest replica is of a version other than the
    router's, no more replicas of the router's version will join.
    """

    def __init__(self) -> None:
        self._own_at = self._other_at = -math.inf

    @property
    def is_over(self) -> bool:
        """Whether no more replicas of the router's version will join."""
        return self._other_at > self._own_at

    def begin(self, now: float) -> None:
        """Note that the router has its first list of replicas. They may be of the version before its own."""
        if self._own_at == -math.inf:
            self._own_at = now

    def note(self, joined_at: float, *, is_own: bool) -> None:
        """Note that a replica that Ray Serve has listed since `joined_at` has reported its version."""
        if is_own:
            self._own_at = max(self._own_at, joined_at)
        else:
            self._other_at = max(self._other_at, joined_at)
