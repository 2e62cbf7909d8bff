"""F16, F17, F19 and F20: faults of the token channel and of the routers at its other end.

F16 needs a fleet behind HAProxy; the others need two sockets and an engine loop.
"""

import asyncio
import contextlib
import gc
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from itertools import pairwise

from chaos.faults import PROMPTS, summary, undisturbed
from chaos.fleet import Outcome, emulated, running
from chaos.streams import Clients, percentile
from deployments.channel.listener import TokenListener
from deployments.channel.messages import ChannelAddress, Report, TokenItem
from deployments.channel.sender import TokenSender
from deployments.model_config import EmulationConfig
from deployments.replica.emulated_engine import EmulatedEngine
from deployments.replica.engine_loop import EngineLoop
from llm.config import EngineConfig
from llm.serving.schemas import GenerationRequest

_STEP_S = 0.02


async def f16_router_killed(front_end: str, num_streams: int = 64) -> Outcome:
    """SIGKILL one of two routers behind HAProxy: the other's clients are unharmed, engines stop for the dead one."""
    args = emulated(2)
    args["router"]["num_replicas"] = 2
    async with running(front_end, "f16", args) as (fleet, clients):
        texts = await undisturbed(clients, 600)
        asking = [asyncio.create_task(clients.ask(PROMPTS[i % len(PROMPTS)], 600)) for i in range(num_streams)]
        await asyncio.sleep(2)
        os.kill(fleet.router_pids()[0], signal.SIGKILL)
        free_s = await fleet.wait_for(
            clients,
            lambda stats: (
                sum(replica["num_running"] for replica in stats["replicas"].values())
                <= sum(not task.done() for task in asking)
                < num_streams
            ),
            30,
            "nothing is generated for the dead router",
        )
        num_open = sum(not task.done() for task in asking)
        stories = list(await asyncio.gather(*asking))
        cut = [story for story in stories if not story.is_complete]
        others = [story for story in stories if story.is_complete]
        text, is_whole = summary(others, texts)
        async with Clients(fleet.url) as returning:
            again = list(await asyncio.gather(*(returning.ask(story.prompt, 600) for story in cut)))
        answer, is_back = summary(again, texts)
        await fleet.wait_until_idle(clients)
        figure = (
            f"{len(cut)} of {num_streams} streams were the dead router's, nothing was generated for them after "
            f"{free_s:.1f} s; the other's: {text}; asked again: {answer}"
        )
        return Outcome(figure, is_whole, is_back, 0 < len(cut) < num_streams, num_open > 0, free_s < 5)


async def f16_router_stopped(front_end: str, num_streams: int = 64, seconds: float = 6) -> Outcome:
    """SIGSTOP one of two routers behind HAProxy, SIGCONT after 6 s: all streams whole, and it serves as before."""
    args = emulated(2)
    args["router"]["num_replicas"] = 2
    async with running(front_end, "f16-stopped", args) as (fleet, clients):
        texts = await undisturbed(clients, 600)
        asking = [asyncio.create_task(clients.ask(PROMPTS[i % len(PROMPTS)], 600)) for i in range(num_streams)]
        await asyncio.sleep(2)
        stopped = fleet.router_pids()[0]
        os.kill(stopped, signal.SIGSTOP)
        try:
            began = time.monotonic()
            free_s = await fleet.wait_for(
                clients,
                lambda stats: sum(replica["num_running"] for replica in stats["replicas"].values()) < num_streams,
                seconds,
                "nothing is generated for the stopped router",
                answer_timeout_s=0.5,
            )
            await asyncio.sleep(began + seconds - time.monotonic())
        finally:
            os.kill(stopped, signal.SIGCONT)
        stories = list(await asyncio.gather(*asking))
        paused = [story for story in stories if story.longest_pause_s > seconds - 1]
        others = [story for story in stories if story not in paused]
        text, is_whole = summary(stories, texts)
        most_s = max(story.longest_pause_s for story in others)
        again = list(await asyncio.gather(*(clients.ask(prompt, 100) for prompt in PROMPTS * 4)))
        answer, is_back = summary(again)
        await fleet.wait_until_idle(clients)
        is_same = stopped in fleet.router_pids()
        figure = (
            f"one stopped for {seconds:g} s, with {len(paused)} streams: nothing was generated for them after "
            f"{free_s:.1f} s; {text}; longest pause of the other's {most_s:.2f} s; asked afterwards: {answer}"
        )
        return Outcome(figure, is_whole, is_back, is_same, 0 < len(paused) < num_streams, most_s < 1)


async def f17_frame_lost(_: str, num_streams: int = 64, num_tokens: int = 400) -> Outcome:
    """One frame of the token channel in fifty is lost: short pauses, nothing missing, nothing twice."""
    router = _LossyRouter()
    async with _engine_loop(num_streams) as loop:
        requests = [_request(num_tokens, i) for i in range(num_streams)]
        calls = [loop.generate(request, i, router.listener.address) for i, request in enumerate(requests)]
        replies = await asyncio.gather(*calls)
        await asyncio.sleep(0.5)
    router.listener.close()
    same = sum(router.tokens.get(i) == reply.token_ids for i, reply in enumerate(replies))
    pauses = router.longest_pauses_s()
    figure = (
        f"{router.num_lost} of {router.num_frames} frames lost: {same} of {num_streams} streams whole by the channel "
        f"alone; longest pause p50 {percentile(pauses, 0.5):.2f} s, at most {max(pauses):.2f} s"
    )
    return Outcome(figure, same == num_streams, router.num_lost > 0, max(pauses) < 1)


async def f19_router_stuck(
    _: str, seconds: float = 30, num_streams: int = 128, logprobs: Sequence[int | None] = (None, 5)
) -> Outcome:
    """A router does not read its channel: steps of others keep their pace, memory is bounded, and it catches up."""
    figures, checks = [], []
    for num_logprobs in logprobs:
        gc.collect()
        gc.disable()  # a collection of all that the suite has loaded would count as a step's sending
        try:
            figure, is_ok = await _stick(seconds, num_streams, num_logprobs)
        finally:
            gc.enable()
        figures.append(f"{'with' if num_logprobs else 'without'} log-probabilities {figure}")
        checks.append(is_ok)
    return Outcome(f"{num_streams} streams of a stuck router: " + "; ".join(figures), *checks)


async def f20_strangers(_: str, seconds: float = 5) -> Outcome:
    """Strangers send frames of 4 MiB to the channel's port: refused unread, and the event loop is never late."""
    router = _Router()
    async with _engine_loop(8) as loop:
        calls = [loop.generate(_request(int(seconds / _STEP_S), i), i, router.listener.address) for i in range(8)]
        asking = asyncio.gather(*calls)
        before_s = await _lateness(asyncio.sleep(1))
        memory = _peak_mb()
        strangers = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "chaos.strangers", router.listener.address.endpoint, f"{seconds:g}",
            stdout=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        during_s = await _lateness(strangers.wait())
        replies = await asking
        await asyncio.sleep(0.5)
    num_refused = router.listener.counters.num_refused
    router.listener.close()
    grown_mb = _peak_mb() - memory
    same = sum(router.tokens.get(i) == reply.token_ids for i, reply in enumerate(replies))
    figure = (
        f"{num_refused} connections refused; event loop late by {1000 * during_s:.0f} ms at most "
        f"({1000 * before_s:.0f} ms before); {grown_mb:.0f} MB more memory; {same} of 8 streams whole"
    )
    return Outcome(figure, num_refused > 100, during_s < 0.05, grown_mb < 64, same == 8)


async def _stick(seconds: float, num_streams: int, logprobs: int | None) -> tuple[str, bool]:
    """One router stuck for some seconds beside one that is not, on one engine."""
    stuck, well = _RouterOnAThread(), _Router()
    sender = _TimedSender("replica")
    num_tokens = int((seconds + 4) / _STEP_S)
    async with _engine_loop(num_streams + 8, sender) as loop:
        calls = [loop.generate(_request(num_tokens, i, logprobs), i, stuck.address) for i in range(num_streams)]
        calls += [loop.generate(_request(num_tokens, i, logprobs), i, well.listener.address) for i in range(8)]
        asking = asyncio.gather(*calls)
        await asyncio.sleep(2)
        before_s, memory = sender.mean_flush_s(), _peak_mb()
        with stuck.blocked():
            await asyncio.sleep(seconds)
        during_s, grown_mb = sender.mean_flush_s(), _peak_mb() - memory
        replies = await asking
        after_s = sender.mean_flush_s()
        await asyncio.sleep(0.5)
    num_routers = sender.num_routers_at_most
    well.listener.close()
    router = stuck.close()
    pauses = well.longest_pauses_s()
    same = sum(well.tokens.get(i) == reply.token_ids for i, reply in enumerate(replies[num_streams:]))
    num_wrong = sum(
        reply.token_ids[: len(router.tokens[i])] != router.tokens[i] for i, reply in enumerate(replies[:-8])
    )
    slower = (max(during_s, after_s) - before_s) / _STEP_S
    figure = (
        f"a step's sending takes {1e3 * before_s:.2f} ms before, {1e3 * during_s:.2f} in {seconds:g} s stuck, "
        f"{1e3 * after_s:.2f} after ({slower:+.1%} of a step of 20 ms), {grown_mb:.0f} MB more memory, "
        f"{same} of 8 other streams whole, longest pause {max(pauses):.2f} s"
    )
    return figure, slower < 0.05 and grown_mb < 256 and same == 8 and num_wrong == 0 and num_routers == 2 and max(
        pauses
    ) < 1


class _Router:
    """A router's end of the channel that writes down each stream's tokens."""

    def __init__(self, listener: type[TokenListener] = TokenListener) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.arrivals: dict[int, list[float]] = {}
        self.listener = listener("127.0.0.1", 0, on_items=self._take, on_report=self._take_report)

    def longest_pauses_s(self) -> list[float]:
        """Each stream's longest time between two arrivals."""
        return [max(later - earlier for earlier, later in pairwise(at)) for at in self.arrivals.values()]

    def _take(self, _: str, items: list[TokenItem]) -> None:
        now = time.monotonic()
        for item in items:
            tokens = self.tokens.setdefault(item.stream_id, [])
            assert item.offset == len(tokens), "a token is missing or comes twice"
            tokens += item.token_ids
            self.arrivals.setdefault(item.stream_id, []).append(now)

    def _take_report(self, _: Report) -> None:
        pass


class _LossyListener(TokenListener):
    """Does not see one frame in fifty."""

    num_frames = 0

    def _take(self, peer: bytes, data: bytes) -> None:
        self.num_frames += 1
        if self.num_frames % 50:
            super()._take(peer, data)


class _LossyRouter(_Router):
    """A router to which one frame in fifty does not come."""

    def __init__(self) -> None:
        super().__init__(_LossyListener)

    @property
    def num_frames(self) -> int:
        """Frames that were sent to it."""
        assert isinstance(self.listener, _LossyListener), "made so"
        return self.listener.num_frames

    @property
    def num_lost(self) -> int:
        """Frames that it did not see."""
        return self.num_frames // 50


class _RouterOnAThread:
    """A router with a thread of its own, which can be made to stand still."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._router = asyncio.run_coroutine_threadsafe(self._make(), self._loop).result()

    @property
    def address(self) -> ChannelAddress:
        """Where it listens."""
        return self._router.listener.address

    @contextlib.contextmanager
    def blocked(self) -> Iterator[None]:
        """Its event loop stands still."""
        is_over = threading.Event()
        self._loop.call_soon_threadsafe(is_over.wait)
        yield
        is_over.set()

    def close(self) -> _Router:
        """End it; returns what it has got."""
        self._loop.call_soon_threadsafe(self._router.listener.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        return self._router

    async def _make(self) -> _Router:
        return _Router()


class _TimedSender(TokenSender):
    """Measures what sending costs the engine's thread, by the processor time of that thread."""

    def __init__(self, replica_id: str) -> None:
        super().__init__(replica_id)
        self.num_routers_at_most = 0
        self._times: list[float] = []

    def flush(self) -> None:
        """See `TokenSender`."""
        started = time.thread_time()
        super().flush()
        self._times.append(time.thread_time() - started)
        self.num_routers_at_most = max(self.num_routers_at_most, self.num_routers)

    def mean_flush_s(self) -> float:
        """Mean since this was last asked."""
        times, self._times = self._times, []
        return sum(times) / len(times)


@contextlib.asynccontextmanager
async def _engine_loop(num_rows: int, sender: TokenSender | None = None) -> AsyncIterator[EngineLoop]:
    """An emulated engine with 50 tokens a second and stream, running."""
    engine = EmulatedEngine(
        EngineConfig(max_batch_size=num_rows, num_pages=num_rows * 256),
        EmulationConfig(tokens_per_s=1 / _STEP_S, max_seq_len=4096),
    )
    loop = EngineLoop(engine, "replica", sender)
    loop.start()
    try:
        yield loop
    finally:
        await asyncio.to_thread(loop.stop)


def _request(num_tokens: int, index: int, logprobs: int | None = None) -> GenerationRequest:
    return GenerationRequest(
        prompt_token_ids=(1, 2, 3 + index), max_new_tokens=num_tokens, ignore_eos=True, logprobs=logprobs
    )


async def _lateness(until: Awaitable[object]) -> float:
    """How late the event loop wakes others up by its own work, at most, in seconds.

    It is the processor time of the loop's thread between two turns of a short sleep: what else a busy machine does is
    no fault of the loop's. What has been loaded is left out of garbage collections, as routers do.
    """
    gc.collect()
    gc.freeze()
    try:
        task, latest = asyncio.ensure_future(until), 0.0
        while not task.done():
            begun = time.thread_time()
            await asyncio.sleep(0.005)
            latest = max(latest, time.thread_time() - begun)
        return latest
    finally:
        gc.unfreeze()


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
