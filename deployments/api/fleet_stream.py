"""What the fleet page is sent while it is open."""

import asyncio
import math
import time
from collections.abc import AsyncGenerator

from deployments.api.sse import event
from deployments.router.directory import ModelDirectory

_INTERVAL_S = 0.5
_HISTORY_INTERVAL_S = 2.0
"""The last 15 minutes are sent with the first event, then at this interval: they take 30 KB and a call to each
router."""


async def watch_fleet(directory: ModelDirectory) -> AsyncGenerator[bytes, None]:
    """The state of router and replicas twice a second, as server-sent events, until the router shuts down."""
    history_at = -math.inf
    while not directory.is_shutting_down:
        state, now = directory.fleet_event(), time.monotonic()
        if now - history_at >= _HISTORY_INTERVAL_S:
            history_at = now
            state["history"] = await directory.fleet_history()
        yield event(state)
        await asyncio.sleep(_INTERVAL_S)
