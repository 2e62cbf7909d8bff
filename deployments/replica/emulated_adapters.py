"""The adapters of an emulated engine, of which it reads nothing."""

import time
from collections import OrderedDict
from collections.abc import Callable, Collection


class EmulatedAdapters:
    """Pretends to load adapters one beside the other, and gives up the least recently used one for the next.

    Args:
        max_adapters: most adapters to hold; 0 for an engine without adapters.
        load_s: how long it takes to load one.
        clock: seconds; monotonic.
    """

    def __init__(self, max_adapters: int, load_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_adapters = max_adapters
        self._load_s = load_s
        self._clock = clock
        self._ready_at: OrderedDict[str, float] = OrderedDict()

    @property
    def digests(self) -> tuple[str, ...]:
        """The adapters that are loaded."""
        now = self._clock()
        return tuple(digest for digest, ready_at in self._ready_at.items() if ready_at <= now)

    def use(self, digest: str, in_use: Collection[str]) -> bool:
        """Whether a request with this adapter can run now; if it cannot, begin to load the adapter once there is room.

        Args:
            digest: of the adapter.
            in_use: adapters of running requests, which cannot be given up.
        """
        if digest not in self._ready_at:
            if len(self._ready_at) >= self.max_adapters and not self._give_up_one(in_use):
                return False
            self._ready_at[digest] = self._clock() + self._load_s
        self._ready_at.move_to_end(digest)
        return self._ready_at[digest] <= self._clock()

    def unload(self, digest: str, in_use: Collection[str]) -> bool:
        """Give up an adapter unless a request has it; False if it is not held."""
        is_held = digest in self._ready_at
        if is_held and digest not in in_use:
            del self._ready_at[digest]
        return is_held

    def _give_up_one(self, in_use: Collection[str]) -> bool:
        now = self._clock()
        idle = (digest for digest, ready_at in self._ready_at.items() if digest not in in_use and ready_at <= now)
        oldest = next(idle, None)
        if oldest is not None:
            del self._ready_at[oldest]
        return oldest is not None
