"""F25: a process that holds a part of a replica's model dies, or hangs."""

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path

from chaos.faults import summary
from chaos.fleet import Fleet, Outcome, emulated, every_replica_works, running, serving_ids
from chaos.streams import Clients

_RANK = "llm.serving.rank_process"
PROMPTS = [f"Count from 1 to {n}." for n in (40, 45, 50, 55)]
_NUM_TOKENS = 400
_GPU_FREED_S = 30
"""Until a killed process is gone that has memory on a GPU, which is freed first."""


def rank_pids(fleet: Fleet) -> list[int]:
    """Processes of its replicas' models, but for the replicas themselves."""
    replicas = fleet.replica_pids()
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):  # it may end meanwhile
            parent = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
            if parent in replicas and _RANK in (directory / "cmdline").read_text():
                found.append(int(directory.name))
    return found


async def f25_rank_killed(
    front_end: str, num_clients: int = 8, *, texts: dict[str, str] | None = None, waits_for_another: bool = True
) -> Outcome:
    """SIGKILL one of a replica's two processes under load: the other goes with it, and its streams go on elsewhere."""
    return await _lose_rank(front_end, "f25kill", signal.SIGKILL, 5, num_clients, texts, waits_for_another)


async def f25_rank_stopped(front_end: str, num_clients: int = 8) -> Outcome:
    """SIGSTOP one of them: the other waits in a sum that never ends."""
    return await _lose_rank(front_end, "f25stop", signal.SIGSTOP, 30, num_clients, None, True)


async def f25_on_gpus(front_end: str) -> Outcome:
    """SIGKILL one of the two processes of the only replica, which has both GPUs: its streams wait for another one."""
    return await _lose_rank(front_end, "f25gpu", signal.SIGKILL, 5, 16, None, True, num_replicas=1, device="cuda")


async def _undisturbed(clients: Clients) -> dict[str, str]:
    """What each prompt's answer is."""
    stories = await asyncio.gather(*(clients.ask(prompt, _NUM_TOKENS, chat=True) for prompt in PROMPTS))
    return {story.prompt: story.text for story in stories}


def _args(num_replicas: int, device: str) -> dict[str, object]:
    engine = {"max_batch_size": 16, "num_pages": 2048, "tensor_parallel_size": 2}
    args = emulated(num_replicas, engine_kind="torch", device=device, engine=engine)
    args["replicas"] |= {"torch_threads": 1}
    return args


async def _lose_rank(
    front_end: str,
    name: str,
    how: signal.Signals,
    most_s: float,
    num_clients: int,
    texts: dict[str, str] | None,
    waits_for_another: bool,
    *,
    num_replicas: int = 2,
    device: str = "cpu",
) -> Outcome:
    """Hurt a rank of one of the replicas.

    Args:
        most_s: until the replica must be out.
        num_clients: that keep asking meanwhile.
        texts: what answers must be; None for what they are before.
        waits_for_another: whether to wait until Serve has replaced the replica, and see that nothing is left of it.
    """
    async with running(front_end, name, _args(num_replicas, device)) as (fleet, clients):
        texts = texts or await _undisturbed(clients)
        before, ranks = serving_ids(await clients.get("/rayline/stats")), rank_pids(fleet)
        replicas = fleet.replica_pids()
        is_over = False
        asking = asyncio.create_task(clients.keep_asking(PROMPTS, _NUM_TOKENS, num_clients, lambda: is_over, chat=True))
        await fleet.wait_for(clients, every_replica_works, 10, "each replica has some of them")
        os.kill(ranks[0], how)
        out_s = await fleet.wait_for(
            clients, lambda stats: len(before & serving_ids(stats)) == num_replicas - 1, most_s + 10, "a replica is out"
        )
        gone_s = await _wait_until_gone(ranks[0], most_s if device == "cpu" else _GPU_FREED_S)
        replaced = ""
        if waits_for_another:
            replaced = f", another replica after {await _wait_until_replaced(fleet, clients, before, replicas):.0f} s"
        is_over = True
        stories = await asking
        moved = (await clients.get("/rayline/stats"))["router"]["num_resumes"]
        is_clean = not waits_for_another or len(rank_pids(fleet)) == len(ranks)
    text, is_same = summary(stories, texts)
    figure = (
        f"{how.name}: out after {out_s:.2f} s, its process gone {gone_s:.2f} s later{replaced}; {text}; {moved} moved"
    )
    return Outcome(figure, len(ranks) == num_replicas, is_same, out_s < most_s, moved > 0, is_clean)


async def _wait_until_gone(pid: int, timeout_s: float) -> float:
    """Wait until a process is no more; returns the seconds that it took."""
    started = time.monotonic()
    while Path(f"/proc/{pid}").exists():
        if time.monotonic() - started > timeout_s:
            raise TimeoutError(f"process {pid} is gone within {timeout_s:g} s")
        await asyncio.sleep(0.05)
    return time.monotonic() - started


async def _wait_until_replaced(fleet: Fleet, clients: Clients, before: set[str], replicas: list[int]) -> float:
    """Wait until as many replicas serve again, and the process of one of those of before is gone."""
    seconds = await fleet.wait_until_replaced(clients, before, 120)
    started = time.monotonic()
    while set(replicas) <= set(fleet.replica_pids()):
        if time.monotonic() - started > 60:
            raise TimeoutError("the replica's own process is gone within 60 s")
        await asyncio.sleep(0.1)
    return seconds + time.monotonic() - started
