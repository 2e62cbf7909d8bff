"""`Pace`: lines begin as fast as there is idle capacity for them, and not while other requests wait."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from deployments.batches.calls import Capacity

TICK_S = 0.05
"""How often the capacity is looked at; replicas report ten times a second."""
_SHARE = 0.5
"""Share of the idle capacity that is taken at a time: other routers see the same, and reports are a moment old."""


@dataclass(slots=True)
class _Budget:
    """What may still begin before the capacity is looked at again."""

    num_lines: int
    num_tokens: float


@dataclass(slots=True, eq=False)
class _Turn:
    """A line that waits."""

    model: str | None
    num_tokens: int
    begins: "asyncio.Future[None]"


class Pace:
    """Lets lines begin. One object serves all batches of a router; each has one line waiting at a time, so they take
    turns.

    Args:
        capacity: knows what is idle.
        max_row_use: share of the replicas' rows up to which lines fill them.
        max_open: most lines at once.
        clock: seconds; monotonic.
    """

    def __init__(
        self, capacity: Capacity, max_row_use: float, max_open: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.num_open = 0
        self._capacity = capacity
        self._max_row_use = max_row_use
        self._max_open = max_open
        self._clock = clock
        self._budgets: dict[str | None, _Budget] = {}
        self._looked_at = -math.inf
        self._waiting: deque[_Turn] = deque()
        self._ticker: asyncio.Task[None] | None = None

    async def begin(self, model: str | None, num_tokens: int) -> None:
        """Wait until a line may begin; it must `end` later.

        Args:
            model: the model that it names.
            num_tokens: length of its prompt, roughly.
        """
        turn = _Turn(model, num_tokens, asyncio.get_running_loop().create_future())
        self._waiting.append(turn)
        self._serve()
        if self._ticker is None and not turn.begins.done():
            self._ticker = asyncio.get_running_loop().create_task(self._tick())
        try:
            await turn.begins
        except asyncio.CancelledError:
            if turn in self._waiting:
                self._waiting.remove(turn)
            else:
                self.end()
            raise

    def end(self) -> None:
        """A line has ended, in whatever way."""
        self.num_open -= 1

    async def _tick(self) -> None:
        while self._waiting:
            await asyncio.sleep(TICK_S)
            self._serve()
        self._ticker = None

    def _serve(self) -> None:
        """Let those lines begin for which there is room now."""
        if self._clock() - self._looked_at >= TICK_S:
            self._budgets.clear()
            self._looked_at = self._clock()
        passed_over: list[_Turn] = []
        while self._waiting and self.num_open < self._max_open:
            turn = self._waiting.popleft()
            budget = self._budget(turn.model)
            if budget.num_lines < 1 or budget.num_tokens <= 0:
                passed_over.append(turn)
                continue
            budget.num_lines -= 1
            budget.num_tokens -= turn.num_tokens
            self.num_open += 1
            turn.begins.set_result(None)
        self._waiting.extendleft(reversed(passed_over))

    def _budget(self, model: str | None) -> _Budget:
        if model not in self._budgets:
            spare = self._capacity.spare(model, self._max_row_use)
            self._budgets[model] = _Budget(math.ceil(spare.num_lines * _SHARE), spare.num_prompt_tokens)
        return self._budgets[model]
