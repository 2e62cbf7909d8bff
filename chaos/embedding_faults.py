"""F22: an input to embed that hangs whatever runs it."""

import asyncio
import time

from chaos.faults import PROMPTS, summary, undisturbed
from chaos.fleet import Outcome, Place, emulated, running

POISON = 255
"""A token that no other prompt of these faults holds."""
_STALL_TIMEOUT_S = 2.0


async def f22_embedding_hangs(place: Place, num_streams: int = 24, num_tokens: int = 500) -> Outcome:
    """An embedding hangs its engine: the health check fails, the replica is replaced, the others' streams go on."""
    args = emulated(
        3,
        emulation={"tokens_per_s": 50.0, "max_seq_len": 4096, "poison_token_id": POISON, "poison": "hang"},
    )
    args["replicas"]["stall_timeout_s"] = _STALL_TIMEOUT_S
    args["router"] |= {"stall_timeout_s": _STALL_TIMEOUT_S, "silence_timeout_s": 0.5}
    async with running(place, "f22", args) as (fleet, clients):
        texts = await undisturbed(clients, num_tokens)
        vector = await clients.embed([[97, 98, 99]])
        before = set(fleet.replica_pids())
        asking = [asyncio.create_task(clients.ask(PROMPTS[i % len(PROMPTS)], num_tokens)) for i in range(num_streams)]
        await asyncio.sleep(1)
        started = time.monotonic()
        status, _ = await clients.embed([[97, POISON, 99]])
        answered_s = time.monotonic() - started
        stories = list(await asyncio.gather(*asking))
        text, is_whole = summary(stories, texts)
        while before <= set(fleet.replica_pids()) and time.monotonic() - started < 60:
            await asyncio.sleep(0.1)
        await fleet.wait_until_serving(clients, fleet.num_replicas)
        num_replaced = len(before - set(fleet.replica_pids()))
        again = await clients.embed([[97, 98, 99]])
        figure = (
            f"the input answered with HTTP {status} after {answered_s:.1f} s; {num_replaced} of {len(before)} replicas "
            f"replaced; {text}; the next embedding {'the same' if again == vector else 'NOT the same'} as before"
        )
        return Outcome(figure, is_whole, status >= 500, 1 <= num_replaced <= 2, vector[0] == 200, again == vector)
