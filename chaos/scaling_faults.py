"""F24: a fleet that is scaled to zero, and a burst that finds it so."""

import asyncio
import time

from chaos.faults import PROMPTS
from chaos.fleet import Fleet, Outcome, emulated
from chaos.streams import Clients, percentile

_KEEP_ALIVE_S = 10
"""Streams that wait longer than this must have been kept alive by comments."""


async def f24_scaled_to_zero(front_end: str, start_s: float = 65, no_replica_timeout_s: float = 60) -> Outcome:
    """No replica runs, and one takes longer to start than requests wait for none: a burst is answered whole."""
    args = emulated(
        1,
        admission={"no_replica_timeout_s": no_replica_timeout_s},
        emulation={"tokens_per_s": 50.0, "max_seq_len": 4096, "start_s": start_s},
    )
    args["replicas"]["autoscaling"] = {"min_replicas": 0, "max_replicas": 1, "initial_replicas": 0}
    fleet = Fleet(front_end, "f24")
    await asyncio.to_thread(fleet.deploy, args)
    try:
        async with Clients(fleet.url) as clients:
            await asyncio.sleep(2)
            num_woken = len(fleet.replica_pids())
            started = time.monotonic()
            stories = await asyncio.gather(*(clients.ask(prompt, 20) for prompt in PROMPTS * 2))
    finally:
        await asyncio.to_thread(fleet.delete, wait=False)
    whole = [story for story in stories if story.is_complete]
    waits = [story.arrivals[0] - started for story in whole]
    kept = [story for story in whole if story.num_comments > 0]
    figure = (
        f"{len(whole)} of {len(stories)} streams whole, first text after {percentile(waits, 0.5):.1f} s with a start "
        f"of {start_s:g} s, {len(kept)} kept alive by comments; {num_woken} replicas before anybody asked"
    )
    must_keep = len(stories) if start_s > _KEEP_ALIVE_S + 5 else 0
    return Outcome(figure, len(whole) == len(stories), num_woken == 0, len(kept) >= must_keep)
