"""What a model's replicas could take on without keeping other requests waiting, as one router sees it."""

import math

from deployments.batches.calls import Spare
from deployments.router.directory import ModelDirectory
from deployments.router.router import Router

_MAX_POOL_USE = 0.8
"""A replica whose slot pool is fuller than this would soon have to preempt requests."""
_NOTHING = Spare(0, 0.0)
_ONE_LINE = Spare(1, math.inf)


class IdleCapacity:
    """`Capacity` of the replicas of a router process.

    Args:
        directory: the models.
    """

    def __init__(self, directory: ModelDirectory) -> None:
        self._directory = directory

    def spare(self, model: str | None, max_row_use: float) -> Spare:
        """See `Capacity.spare`. A name that stands for no model may be known to the API, or is refused there."""
        directory = self._directory
        name = model or directory.names[0]
        routers = directory.find(name) or directory.with_adapter(name) or directory.routers
        if any(_is_busy(router) for router in routers):
            return _NOTHING
        found = [_spare(router, max_row_use) for router in routers]
        return Spare(sum(spare.num_lines for spare in found), sum(spare.num_prompt_tokens for spare in found))


def _is_busy(router: Router) -> bool:
    """Whether requests wait already, or none is taken any more."""
    return router.is_shutting_down or router.is_engine_wanted


def _spare(router: Router, max_row_use: float) -> Spare:
    if not router.fleet.replica_ids or router.info is None:
        return _ONE_LINE if router.can_answer else _NOTHING  # its arrival starts a replica
    return _of_replicas(router, router.info.max_step_tokens, max_row_use)


def _of_replicas(router: Router, max_step_tokens: int, max_row_use: float) -> Spare:
    """Rows up to the share that batches may use, and one engine step's worth of prompts, of each replica."""
    num_lines, num_tokens = 0, 0
    for replica_id in router.fleet.replica_ids:
        load, stats = router.fleet.load(replica_id), router.stats_of(replica_id)
        if stats is None or stats.num_used_pages > _MAX_POOL_USE * stats.num_pages:
            continue
        num_rows = max(1, math.floor(load.max_rows * max_row_use)) - load.num_rows
        num_prefill_tokens = max_step_tokens - load.num_prefill_tokens
        if num_rows > 0 and num_prefill_tokens > 0:
            num_lines += num_rows
            num_tokens += num_prefill_tokens
    return Spare(num_lines, num_tokens)
