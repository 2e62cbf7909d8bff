"""Faults F1 to F11: each a function that does the damage to a fleet of its own and says what came of it.

Emulated engines make text that depends on prompt and position alone, so that a stream which has moved can be told from
one that was left alone, letter by letter.
"""

import asyncio
import os
import random
import signal
import time

from chaos.fleet import (
    Fleet,
    Outcome,
    Place,
    controller_stopped,
    emulated,
    every_replica_works,
    num_serving,
    proxy_pids,
    running,
)
from chaos.streams import Clients, Story, percentile

PROMPTS = [f"{word} number {i}" for i, word in enumerate(("alpha", "beta", "gamma", "delta") * 4)]


async def undisturbed(clients: Clients, num_tokens: int) -> dict[str, str]:
    """What each prompt's text is."""
    stories = await asyncio.gather(*(clients.ask(prompt, num_tokens) for prompt in PROMPTS))
    assert all(story.is_complete for story in stories), "the fleet does not work before the fault"
    return {story.prompt: story.text for story in stories}


def summary(stories: list[Story], texts: dict[str, str] | None = None) -> tuple[str, bool]:
    """How many streams came whole and how long they paused; whether all did."""
    whole = [story for story in stories if story.is_complete]
    same = [story for story in whole if texts is None or story.text == texts[story.prompt]]
    pauses = [story.longest_pause_s for story in whole]
    text = f"{len(whole)} of {len(stories)} streams whole"
    if texts is not None:
        text += f", {len(same)} with the same text"
    text += f"; longest pause p50 {percentile(pauses, 0.5):.2f} s, p99 {percentile(pauses, 0.99):.2f} s"
    return text, len(same) == len(stories)


async def kill_replicas(fleet: Fleet, clients: Clients, num_kills: int) -> None:
    """SIGKILL one, wait until as many serve again with another one in its place, and so on."""
    for _ in range(num_kills):
        await asyncio.sleep(1)
        before = await fleet.all_serving(clients)
        fleet.hurt_one(signal.SIGKILL)
        await fleet.wait_until_replaced(clients, before)


async def f1_kill_replicas(place: Place, num_kills: int = 20, num_clients: int = 64) -> Outcome:
    """SIGKILL one of four replicas with 64 streams open, again and again."""
    async with running(place, "f1", emulated(4)) as (fleet, clients):
        texts = await undisturbed(clients, 200)
        is_over = False
        asking = asyncio.create_task(clients.keep_asking(PROMPTS, 200, num_clients, lambda: is_over))
        await kill_replicas(fleet, clients, num_kills)
        is_over = True
        stories = await asking
        text, is_whole = summary(stories, texts)
        p99 = percentile([story.longest_pause_s for story in stories], 0.99)
        return Outcome(f"{num_kills} kills: {text}", is_whole, p99 < 3)


async def f1_kill_demo(front_end: str) -> Outcome:
    """The same once with the demo model: greedy text is identical."""
    args = emulated(2, engine_kind="torch", device="cpu", engine={"max_batch_size": 16, "num_pages": 2048})
    args["replicas"]["torch_threads"] = 1
    async with running(front_end, "f1demo", args) as (fleet, clients):
        prompt = "Count from 1 to 150."
        expected = (await clients.ask(prompt, 1000, chat=True)).text
        asking = [asyncio.create_task(clients.ask(prompt, 1000, chat=True)) for _ in range(8)]
        await asyncio.sleep(0.7)
        fleet.hurt_one(signal.SIGKILL)
        stories = list(await asyncio.gather(*asking))
        text, is_whole = summary(stories, {prompt: expected})
        moved = (await clients.get("/rayline/stats"))["router"]["num_resumes"]
        return Outcome(f"{text}; {moved} moved", is_whole, moved > 0, expected.endswith("149 150"))


async def f1_kill_on_gpus(front_end: str) -> Outcome:
    """SIGKILL one of two replicas on GPUs with 64 streams of the demo model open, again and again: the same text."""
    return await _kill_on_gpus(front_end, deterministic=True)


async def f1_kill_in_bfloat16(front_end: str) -> Outcome:
    """The same without `deterministic`: steps of other rows round differently, so only answers must be equal."""
    return await _kill_on_gpus(front_end, deterministic=False)


async def _kill_on_gpus(front_end: str, *, deterministic: bool) -> Outcome:
    engine = {"max_batch_size": 64, "num_pages": 8192, "deterministic": deterministic}
    args = emulated(2, engine_kind="torch", device="cuda", engine=engine)
    args["replicas"]["num_gpus"] = 1
    prompts = [f"Count from 1 to {n}." for n in (110, 120, 130, 140, 150)]
    async with running(front_end, "f1gpu", args) as (fleet, clients):
        texts = {prompt: (await clients.ask(prompt, 1000, chat=True)).text for prompt in prompts}
        is_over = False
        asking = asyncio.create_task(clients.keep_asking(prompts, 1000, 64, lambda: is_over, chat=True))
        await kill_replicas(fleet, clients, num_kills=3)
        is_over = True
        stories = await asking
        moved = (await clients.get("/rayline/stats"))["router"]["num_resumes"]
        text, is_same = summary(stories, texts)
        is_whole = all(story.is_complete for story in stories)
        num_wrong = sum(not story.text.endswith(_last_number(story.prompt)) for story in stories)
        is_right = all(text.endswith(_last_number(prompt)) for prompt, text in texts.items())
        figure = f"3 kills: {text}; {num_wrong} that do not end as asked; {moved} moved"
        return Outcome(figure, is_whole, is_same or not deterministic, num_wrong == 0, moved > 0, is_right)


def _last_number(prompt: str) -> str:
    return prompt.split()[-1].rstrip(".")


async def f2_nobody_left(front_end: str) -> Outcome:
    """The only replica dies with failover off, and another one with failover on and nobody to go to.

    Serve's controller stands still meanwhile: else it may have begun a replacement by the time that the router asks,
    and requests rightly wait for one that is starting.
    """
    async with (
        running(front_end, "f2off", emulated(1, router={"num_cpus": 0.1, "max_resumes": 0})) as without,
        running(front_end, "f2on", emulated(1, admission={"no_replica_timeout_s": 0.5})) as with_failover,
    ):
        outcomes = []
        for failover, (fleet, clients) in (("off", without), ("on", with_failover)):
            outcomes.append(await _kill_the_only_one(failover, fleet, clients))
    return Outcome("; ".join(outcome.figure for outcome in outcomes), *(outcome.is_ok for outcome in outcomes))


async def _kill_the_only_one(failover: str, fleet: Fleet, clients: Clients) -> Outcome:
    asking = [asyncio.create_task(clients.ask(prompt, 3800)) for prompt in PROMPTS]
    await fleet.wait_for(clients, lambda stats: stats["router"]["num_live"] == len(PROMPTS), 60, "all are live")
    await asyncio.sleep(0.5)
    with controller_stopped():
        killed_at = time.monotonic()
        fleet.hurt_one(signal.SIGKILL)
        stories = await asyncio.gather(*asking)
    told = [story for story in stories if story.error in ("engine_error", "no_replica")]
    slowest = max(story.ended_at for story in stories) - killed_at
    figure = f"failover {failover}: {len(told)} of {len(stories)} told by an error event in {slowest:.2f} s"
    return Outcome(figure, len(told) == len(stories), slowest < 5)


async def f3_before_the_first_byte(place: Place) -> Outcome:
    """A replica dies while it computes prompts: no client sees an error."""
    args = emulated(2, emulation={"tokens_per_s": 50.0, "max_seq_len": 4096, "prefill_tokens_per_s": 100.0})
    async with running(place, "f3", args) as (fleet, clients):
        resumed = (await clients.get("/rayline/stats"))["router"]["num_resumes"]
        # The letters of each prompt take 0.4 s: long enough to be killed, and all of a replica's no stall.
        filler = "wait for it, " * max(1, int(0.4 * fleet.args["emulation"]["prefill_tokens_per_s"] / 13))
        asking = [asyncio.create_task(clients.ask(prompt + filler, 20)) for prompt in PROMPTS[:8]]
        await fleet.wait_for(clients, every_replica_works, 5, "each replica has some of them")
        num_begun = sum(1 for task in asking if task.done())
        fleet.hurt_one(signal.SIGKILL)
        stories = list(await asyncio.gather(*asking))
        text, is_whole = summary(stories)
        statuses = {story.status for story in stories}
        moved = (await clients.get("/rayline/stats"))["router"]["num_resumes"] - resumed
        await fleet.wait_until_serving(clients, fleet.num_replicas)
        return Outcome(
            f"{text}; {moved} begun anew; HTTP {statuses}", is_whole, statuses == {200}, moved > 0, num_begun == 0
        )


async def f5_hang(front_end: str) -> Outcome:
    """SIGSTOP one of four replicas: out of rotation, its streams elsewhere, Serve replaces it."""
    async with running(front_end, "f5", emulated(4)) as (fleet, clients):
        texts = await undisturbed(clients, 800)
        before = set(fleet.replica_pids())
        asking = [asyncio.create_task(clients.ask(PROMPTS[i % len(PROMPTS)], 800)) for i in range(32)]
        await asyncio.sleep(1)
        stopped = fleet.hurt_one(signal.SIGSTOP)
        try:
            out = await fleet.wait_for(clients, lambda stats: num_serving(stats) == 3, 30, "it is out of rotation")
            stories = list(await asyncio.gather(*asking))
            text, is_whole = summary(stories, texts)
            started = time.monotonic()
            while not set(fleet.replica_pids()) - before and time.monotonic() - started < 60:
                await asyncio.sleep(0.2)
            replaced = bool(set(fleet.replica_pids()) - before)
        finally:
            if stopped in fleet.replica_pids():
                os.kill(stopped, signal.SIGKILL)
        figure = f"out of rotation after {out:.1f} s; {text}; {'replaced' if replaced else 'NOT replaced'} by Serve"
        return Outcome(figure, is_whole, out < 30, replaced)


async def f6_update_and_scale(front_end: str) -> Outcome:
    """A rolling update, then four replicas to one and back, with 10 requests/s of streams of several seconds."""
    args = emulated(4)
    args["router"]["drain_after_s"] = 2
    async with running(front_end, "f6", args) as (fleet, clients):
        texts = await undisturbed(clients, 300)
        arriving = asyncio.create_task(clients.arrive(10, 40, PROMPTS, 300, seed=6))
        await asyncio.sleep(2)
        updated = {**args, "engine": {"max_batch_size": 65, "num_pages": 8192}}
        await asyncio.to_thread(fleet.deploy, updated)
        for num_replicas in (1, 4):
            scaled = {**updated, "replicas": {**args["replicas"], "num_replicas": num_replicas}}
            await asyncio.to_thread(fleet.deploy, scaled)
            await fleet.wait_until_serving(clients, num_replicas)
        stories = await arriving
        text, is_whole = summary(stories, texts)
        return Outcome(f"update, 4 → 1 → 4 replicas: {text}", is_whole)


async def f7_disconnects(place: Place, num_streams: int = 1000) -> Outcome:
    """Clients leave at random tokens; everything that was theirs is free at once."""
    draws = random.Random(7)
    waits = []
    async with running(place, "f7", emulated(2, tokens_per_s=100.0)) as (fleet, clients):
        for _ in range(-(-num_streams // 50)):
            asking = [clients.ask(draws.choice(PROMPTS), 3000, most_pieces=draws.randint(1, 100)) for _ in range(50)]
            await asyncio.gather(*asking)
            waits.append(await fleet.wait_until_idle(clients))
        figure = (
            f"{50 * len(waits)} clients left in groups of 50: all aborted and every page free "
            f"p50 {percentile(waits, 0.5):.2f} s, p99 {percentile(waits, 0.99):.2f} s after a group's last"
        )
        return Outcome(figure, percentile(waits, 0.99) < 1)


async def f8_overload(front_end: str, seconds: float = 45) -> Outcome:
    """Three times the requests that it can carry: what is carried stays, the rest is told when to come back."""
    args = emulated(
        1,
        tokens_per_s=50.0,
        engine={"max_batch_size": 8, "num_pages": 4096},
        admission={"max_queue_s": 3, "max_queue_tokens": 20_000},
    )
    async with running(front_end, "f8", args) as (_, clients):
        until = time.monotonic() + 12
        calm = await clients.keep_asking(PROMPTS, 50, 10, lambda: time.monotonic() > until)
        peak = len(calm) / (max(story.ended_at for story in calm) - min(story.started_at for story in calm))
        is_over = asyncio.Event()
        gets = asyncio.create_task(clients.time_gets("/v1/models", is_over))
        stories = await clients.arrive(3 * peak, seconds, PROMPTS, 50, seed=8)
        is_over.set()
        get_ms = 1000 * percentile(await gets, 0.99)
        whole = [story for story in stories if story.is_complete]
        refused = [story for story in stories if story.status == 429]
        goodput = len(whole) / (max(story.ended_at for story in whole) - min(story.started_at for story in stories))
        refusal_ms = 1000 * percentile([story.ended_at - story.started_at for story in refused], 0.99)
        most_ms = max(100, 3 * get_ms)  # a busy machine is slow with everything
        others = len(stories) - len(whole) - len(refused)
        figure = (
            f"peak {peak:.1f} answers/s, {goodput:.1f} ({goodput / peak:.0%}) at {3 * peak:.1f} requests/s for "
            f"{seconds:.0f} s; {len(refused)} refused, p99 in {refusal_ms:.0f} ms (the models' list in {get_ms:.0f}); "
            f"{others} ended otherwise"
        )
        has_retry = all(story.retry_after and int(story.retry_after) >= 1 for story in refused)
        return Outcome(figure, goodput >= 0.9 * peak, others == 0, has_retry, bool(refused), refusal_ms < most_ms)


async def f11_control_plane(front_end: str) -> Outcome:
    """Serve's controller is killed, then its HTTP proxy."""
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    async with running(front_end, "f11", emulated(2)) as (fleet, clients):
        texts = await undisturbed(clients, 300)
        asking = [asyncio.create_task(clients.ask(PROMPTS[i % len(PROMPTS)], 300)) for i in range(32)]
        await asyncio.sleep(1)
        ray.kill(ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE), no_restart=False)
        during = [asyncio.create_task(clients.ask(prompt, 300)) for prompt in PROMPTS]
        text, is_whole = summary(list(await asyncio.gather(*asking, *during)), texts)
        await fleet.wait_until_serving(clients, 2)
        lost = [asyncio.create_task(clients.ask(prompt, 300)) for prompt in PROMPTS]
        await asyncio.sleep(1)
        for pid in proxy_pids():
            os.kill(pid, signal.SIGKILL)
        cut = await asyncio.gather(*lost)
        back = await fleet.wait_until_idle(clients, 60)
        async with Clients(fleet.url) as others:
            after = await asyncio.gather(*(others.ask(prompt, 300) for prompt in PROMPTS))
        is_back = all(story.text == texts[story.prompt] for story in after)
        figure = (
            f"controller: {text}; proxy: its {sum(not s.is_complete for s in cut)} connections cut, serving again and "
            f"every page free after {back:.1f} s"
        )
        return Outcome(figure, is_whole, is_back)
