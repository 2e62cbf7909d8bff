"""F13, F14, F15 and F18: replicas that look well and are not, requests that fell what runs them, and updates."""

import asyncio
import contextlib
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chaos.faults import PROMPTS, summary, undisturbed
from chaos.fleet import ROOT, Fleet, Outcome, Place, emulated, running, serving_ids
from chaos.streams import Clients, Story, percentile

_NUM_TOKENS = 200
_POISON = "~"
_DEMO = ROOT / "configs" / "demo"


def _emulation(**changes: Any) -> dict[str, Any]:
    return {"tokens_per_s": 50.0, "max_seq_len": 4096, **changes}


def _break_one(fleet: Fleet, how: str) -> int:
    """Have the engine of one replica break from now on; returns its process."""
    pid = fleet.replica_pids()[0]
    directory = Path(fleet.args["emulation"]["fault_dir"])
    part = directory / f"{pid}.part"
    part.write_text(how)
    part.rename(directory / str(pid))
    return pid


def _states(stats: dict[str, Any]) -> dict[str, str]:
    return {replica_id: replica["state"] for replica_id, replica in stats["replicas"].items()}


async def _wait_until_out(fleet: Fleet, clients: Clients, before: set[str]) -> float:
    """Wait until one of these replicas is known to be broken; returns the seconds that it took."""
    return await fleet.wait_for(
        clients,
        lambda stats: any(_states(stats).get(i, "gone") in ("broken", "gone") for i in before),
        10,
        "it is out",
    )


async def _wait_until_replaced(fleet: Fleet, pid: int, num_replicas: int, timeout_s: float = 60) -> float:
    """Wait until a process is gone and there are as many replicas as before; returns the seconds that it took."""
    started = time.monotonic()
    while pid in (pids := fleet.replica_pids()) or len(pids) < num_replicas:
        if time.monotonic() - started > timeout_s:
            raise TimeoutError(f"the replica is replaced within {timeout_s:g} s")
        await asyncio.sleep(0.2)
    return time.monotonic() - started


def _num_errors(stories: list[Story]) -> int:
    return sum(story.status != 200 or story.error is not None for story in stories)


async def _break_under_load(place: Place, name: str, how: str, num_clients: int) -> Outcome:
    with tempfile.TemporaryDirectory() as directory:
        args = emulated(4, emulation=_emulation(fault_dir=directory))
        async with running(place, name, args) as (fleet, clients):
            texts = await undisturbed(clients, _NUM_TOKENS)
            is_over = False
            asking = asyncio.create_task(clients.keep_asking(PROMPTS, _NUM_TOKENS, num_clients, lambda: is_over))
            await asyncio.sleep(2)
            before = serving_ids(await clients.get("/rayline/stats"))
            resumed_before = (await clients.get("/rayline/stats"))["router"]["num_resumes"]
            pid = _break_one(fleet, how)
            out_s = await _wait_until_out(fleet, clients, before)
            resumed = (await clients.get("/rayline/stats"))["router"]["num_resumes"] - resumed_before
            replaced_s = await _wait_until_replaced(fleet, pid, fleet.num_replicas)
            await fleet.wait_until_serving(clients, fleet.num_replicas)
            is_over = True
            stories = await asking
            router = (await clients.get("/rayline/stats"))["router"]
            resumed_later = router["num_resumes"] - resumed_before - resumed
        text, is_whole = summary(stories, texts)
        p99 = percentile([story.longest_pause_s for story in stories], 0.99)
        figure = (
            f"out after {out_s:.2f} s, replaced after {replaced_s:.1f} s; {text}; {_num_errors(stories)} told of an "
            f"error; {resumed} resumed, {resumed_later} a second time"
        )
        return Outcome(figure, is_whole, out_s < 2, p99 < 3, resumed > 0, resumed_later == 0)


async def f13_steps_fail(place: Place, num_clients: int = 64) -> Outcome:
    """Every step of one of four replicas fails from now on, while it looks idle: no client is told."""
    return await _break_under_load(place, "f13", "fail", num_clients)


async def f14_engine_breaks(place: Place, num_clients: int = 64) -> Outcome:
    """The engine of one of four replicas breaks down: its streams go on elsewhere at the first attempt."""
    return await _break_under_load(place, "f14", "break", num_clients)


async def f15_poison_kills(front_end: str, num_streams: int = 32) -> Outcome:
    """A request that kills whatever runs it, beside others: two replicas die, then it alone is told."""
    return await _poison(front_end, "kill", num_streams)


async def f15_poison_hangs(front_end: str, num_streams: int = 32) -> Outcome:
    """The same with a request whose step never returns."""
    return await _poison(front_end, "hang", num_streams)


async def _poison(front_end: str, how: str, num_streams: int) -> Outcome:
    emulation = _emulation(poison_token_id=ord(_POISON), poison=how, poison_after=3)
    args = emulated(4, emulation=emulation)
    args["router"] |= {"silence_timeout_s": 0.5, "stall_timeout_s": 2}
    args["replicas"]["stall_timeout_s"] = 2
    num_tokens = 400 if how == "kill" else 800
    async with running(front_end, f"f15{how}", args) as (fleet, clients):
        texts = await undisturbed(clients, num_tokens)
        before = set(_states(await clients.get("/rayline/stats")))
        asking = [asyncio.create_task(clients.ask(PROMPTS[i % len(PROMPTS)], num_tokens)) for i in range(num_streams)]
        await asyncio.sleep(1)
        started = time.monotonic()
        poison = await clients.ask(_POISON, 50)
        told_s = time.monotonic() - started
        felled = set()

        def note_felled(stats: dict[str, Any]) -> bool:
            states = _states(stats)
            felled.update(i for i in before if states.get(i, "gone") in ("gone", "leaving", "stalled", "silent"))
            return all(task.done() for task in asking)

        await fleet.wait_for(clients, note_felled, 60, "the others are over")
        text, is_whole = summary(list(await asyncio.gather(*asking)), texts)
        await fleet.wait_until_serving(clients, 4, 90)
    figure = f"{how}: {len(felled)} replicas felled, told by {poison.error} after {told_s:.1f} s; others: {text}"
    return Outcome(figure, len(felled) == 2, poison.error == "engine_error", is_whole)


async def f13_on_a_gpu(front_end: str) -> Outcome:
    """One of two replicas that share a GPU meets a device-side assert: every CUDA call of it fails from then on."""
    return await _lose_device(front_end, "cuda")


async def f13_demo(front_end: str) -> Outcome:
    """The same with the demo model on the CPU, where the steps fail one after the other."""
    return await _lose_device(front_end, "cpu")


async def _lose_device(front_end: str, device: str) -> Outcome:
    prompts = [f"Count from 1 to {n}." for n in (110, 120, 130, 140, 150)]
    engine = {"max_batch_size": 32, "num_pages": 4096}
    with tempfile.TemporaryDirectory() as directory:
        args = emulated(2, engine_kind="torch", device=device, engine=engine, emulation={"fault_dir": directory})
        args["replicas"] |= {"num_gpus": 0.4 if device == "cuda" else 0, "torch_threads": 1}
        async with running(front_end, f"f13{device}", args) as (fleet, clients):
            is_over = False
            asking = asyncio.create_task(clients.keep_asking(prompts, 1000, 8, lambda: is_over, chat=True))
            await asyncio.sleep(2)
            before = serving_ids(await clients.get("/rayline/stats"))
            pid = _break_one(fleet, "")
            out_s = await _wait_until_out(fleet, clients, before)
            replaced_s = await _wait_until_replaced(fleet, pid, 2, 120)
            await fleet.wait_until_serving(clients, 2, 120)
            is_over = True
            stories = await asking
    text, is_whole = summary(stories)
    num_wrong = sum(not story.text.endswith(story.prompt.split()[-1].rstrip(".")) for story in stories)
    figure = f"{device}: out after {out_s:.2f} s, replaced after {replaced_s:.1f} s; {text}; {num_wrong} end wrongly"
    return Outcome(figure, is_whole, num_wrong == 0)


@contextlib.contextmanager
def _two_versions() -> Iterator[tuple[Path, Path]]:
    """The demo checkpoint, and the same with another chat template."""
    with tempfile.TemporaryDirectory() as directory:
        versions = Path(directory) / "old", Path(directory) / "new"
        for version in versions:
            version.mkdir()
            for path in _DEMO.iterdir():
                (version / path.name).symlink_to(path)
        settings = versions[1] / "tokenizer_config.json"
        content = json.loads(settings.read_text())
        content["chat_template"] = "{{ 'new ' }}" + content["chat_template"]
        settings.unlink()
        settings.write_text(json.dumps(content))
        yield versions


async def f18_update_of_the_model(front_end: str, rate: float = 8, num_replicas: int = 2) -> Outcome:
    """A rolling update to another model version under load: every answer is one version's, from first to last token.

    Two replicas are the hardest case: Ray Serve takes the last old one away as soon as the first new one runs.
    """
    with _two_versions() as (old, new):
        args = emulated(num_replicas, model=str(old), served_model_name="demo")
        args["router"]["drain_after_s"] = 2
        async with running(front_end, "f18", args) as (fleet, clients):
            old_texts = await undisturbed(clients, _NUM_TOKENS)
            is_over = False
            arriving = asyncio.create_task(_keep_arriving(clients, rate, lambda: is_over))
            await asyncio.sleep(2)
            started = time.monotonic()
            await asyncio.to_thread(fleet.deploy, {**args, "model": str(new)})
            await fleet.wait_until_serving(clients, num_replicas)
            update_s = time.monotonic() - started
            await asyncio.sleep(2)
            is_over = True
            stories = await arriving
            new_texts = await undisturbed(clients, _NUM_TOKENS)
    is_new_text = all(new_texts[prompt] != old_texts[prompt] for prompt in PROMPTS)
    num_old = sum(story.text == old_texts[story.prompt] for story in stories)
    num_new = sum(story.text == new_texts[story.prompt] for story in stories)
    pauses = [story.longest_pause_s for story in stories]
    firsts = [story.arrivals[0] - story.started_at for story in stories if story.arrivals]
    cut = Counter(story.error for story in stories if not story.is_complete)
    figure = (
        f"{num_replicas} replicas updated in {update_s:.0f} s: {num_old} answers of the old version, {num_new} of the "
        f"new, {len(stories) - num_old - num_new} of neither or not whole, of {len(stories)}; longest pause p99 "
        f"{percentile(pauses, 0.99):.2f} s, first token p99 {percentile(firsts, 0.99):.2f} s"
        + "".join(f"; {number} ended with {error}" for error, number in cut.items())
    )
    return Outcome(figure, num_old + num_new == len(stories), num_old > 0, num_new > 0, is_new_text)


async def _keep_arriving(clients: Clients, rate: float, is_over: Any) -> list[Story]:
    """Requests at a steady rate until it is over; all are read whole."""
    asking = []
    while not is_over():
        asking.append(asyncio.create_task(clients.ask(PROMPTS[len(asking) % len(PROMPTS)], _NUM_TOKENS)))
        await asyncio.sleep(1 / rate)
    return list(await asyncio.gather(*asking))
