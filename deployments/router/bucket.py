"""A limit on a rate: `Bucket`."""

MINUTE_S = 60.0


class Bucket:
    """A token bucket (Turner 1986): what is taken out comes back evenly over a minute.

    Args:
        capacity: the most that it holds, which is what a minute allows.
        now: the time, in seconds.
    """

    def __init__(self, capacity: float, now: float) -> None:
        self.capacity = capacity
        self._level = capacity
        self._at = now

    def level(self, now: float) -> float:
        """What is in it; below zero after more was taken than it held."""
        self._level = min(self.capacity, self._level + (now - self._at) * self.capacity / MINUTE_S)
        self._at = now
        return self._level

    def take(self, amount: float, now: float) -> None:
        """Take out `amount`, into debt if need be; a negative amount is put back."""
        self._level = min(self.capacity, self.level(now) - amount)

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until it holds `amount`."""
        return max(0.0, amount - self.level(now)) * MINUTE_S / self.capacity

    def lower_to(self, level: float, now: float) -> None:
        """Hold no more than `level`."""
        self._level = min(self.level(now), level)

    def resize(self, capacity: float, now: float) -> None:
        """Allow another number per minute; what was used of the old one still counts."""
        self._level = capacity - (self.capacity - self.level(now))
        self.capacity = capacity
