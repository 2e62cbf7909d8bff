"""`Succession`: whether an update has left a router behind."""

import math


class Succession:
    """Compares when replicas of the router's version joined, and those of others.

    Ray Serve starts replicas of the newest version only. So once the one that joined last is of another version than
    the router, no more of the router's will come.
    """

    def __init__(self) -> None:
        self._own_at = self._other_at = -math.inf

    @property
    def is_over(self) -> bool:
        """Whether no more replicas of the router's version will come."""
        return self._other_at > self._own_at

    def begin(self, now: float) -> None:
        """The router has its first list of replicas. Those on it may be of the version before its own."""
        if self._own_at == -math.inf:
            self._own_at = now

    def note(self, joined_at: float, *, is_own: bool) -> None:
        """A replica that Ray Serve has listed since `joined_at` has told its version."""
        if is_own:
            self._own_at = max(self._own_at, joined_at)
        else:
            self._other_at = max(self._other_at, joined_at)
