"""F12: a long load with bad inputs and clients that leave; memory must not grow and nothing may restart.

python -m chaos.soak [--minutes 60]
"""

import argparse
import asyncio
import logging
import random
import sys
import time
from pathlib import Path

import aiohttp
from rich.console import Console

from chaos.faults import PROMPTS
from chaos.fleet import Fleet, cluster, emulated, running
from chaos.streams import Clients, percentile

_BAD_BODIES = (
    b"{", b"[]", b"", b'{"model": "demo"}', b'{"model": "demo", "prompt": ""}', b'{"model": "other", "prompt": "a"}',
    b'{"model": "demo", "prompt": "a", "max_tokens": -1}', b'{"model": "demo", "prompt": "a", "nonsense": 1}',
    b'{"model": "demo", "prompt": [9999999]}', b'{"model": "demo", "messages": []}', b"\xff\xfe",
)  # fmt: skip
_SAMPLE_INTERVAL_S = 10
_WARM_UP, _LAST_PART = 0.25, 0.67
"""Shares of the run before memory is looked at: for the verdict, and to see whether growth ends."""


async def soak(front_end: str, minutes: float) -> bool:
    """Run the load and print what came of it; whether nothing grew or restarted."""
    console = Console(stderr=True)
    args = emulated(2, tokens_per_s=200.0)
    async with running(front_end, "soak", args) as (fleet, clients):
        pids = {"replica": fleet.replica_pids(), "router": fleet.router_pids()}
        counts = dict.fromkeys(("whole", "left", "refused", "wrong"), 0)
        end = time.monotonic() + 60 * minutes
        tasks = [asyncio.create_task(_client(fleet, clients, index, end, counts)) for index in range(24)]
        samples: dict[int, list[tuple[float, float]]] = {pid: [] for group in pids.values() for pid in group}
        while time.monotonic() < end:
            await asyncio.sleep(_SAMPLE_INTERVAL_S)
            for pid, memory in samples.items():
                memory.append((time.monotonic(), _resident_mb(pid)))
            console.print(f"{(end - time.monotonic()) / 60:.1f} min left, {counts}", style="dim")
        await asyncio.gather(*tasks)
        await fleet.wait_until_idle(clients)
        is_same = fleet.replica_pids() == pids["replica"] and fleet.router_pids() == pids["router"]
    slopes, ends = {}, {}
    for name, group in pids.items():
        slopes[name] = max(_slope_mb_per_h(samples[pid], _WARM_UP) for pid in group)
        ends[name] = max(_slope_mb_per_h(samples[pid], _LAST_PART) for pid in group)
    is_ok = is_same and counts["wrong"] == 0 and all(slope < 1 for slope in slopes.values())
    growth = ", ".join(
        f"{name} {slope:+.2f} MB/h ({ends[name]:+.2f} in the last third)" for name, slope in slopes.items()
    )
    print(
        f"F12  {'ok    ' if is_ok else 'FAILED'} {minutes:g} min: {counts['whole']:,} streams whole, "
        f"{counts['left']:,} clients left, {counts['refused']:,} bad inputs refused, {counts['wrong']} answered wrongly"
        f"; growth {growth}; {'no restart' if is_same else 'RESTARTED'}"
    )
    return is_ok


async def _client(fleet: Fleet, clients: Clients, index: int, end: float, counts: dict[str, int]) -> None:
    draws = random.Random(index)
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < end:
            what = draws.random()
            if what < 0.01:
                body = draws.choice(_BAD_BODIES)
                headers = {"Content-Type": "application/json"}
                async with session.post(f"{fleet.url}/v1/completions", data=body, headers=headers) as response:
                    is_right = response.status in (400, 404) and "error" in await response.json()
                    counts["refused" if is_right else "wrong"] += 1
                continue
            num_tokens = draws.randint(5, 200)
            most = draws.randint(1, num_tokens) if what < 0.06 else None
            story = await clients.ask(draws.choice(PROMPTS) + " " * draws.randint(0, 50), num_tokens, most_pieces=most)
            counts["left" if most is not None else "whole" if story.is_complete else "wrong"] += 1


def _resident_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def _slope_mb_per_h(samples: list[tuple[float, float]], skipped: float) -> float:
    """Median of the slopes between all pairs of samples (Theil-Sen), which single jumps do not move.

    Args:
        skipped: share of the samples, at the beginning, that do not count.
    """
    kept = samples[int(skipped * len(samples)) :]
    slopes = [
        3600 * (later[1] - sooner[1]) / (later[0] - sooner[0])
        for i, sooner in enumerate(kept)
        for later in kept[i + 1 :]
    ]
    return percentile(slopes, 0.5)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m chaos.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    with cluster() as front_end:
        sys.exit(0 if asyncio.run(soak(front_end, options.minutes)) else 1)


if __name__ == "__main__":
    main()
