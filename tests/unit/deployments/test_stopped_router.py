"""A router whose whole process stands still for a while, as under SIGSTOP or in a machine that is paused."""

import asyncio
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest
from channel_ends import Sink, wait_for
from in_process import ServiceFactory, emulated_config, eventually

from deployments.channel.link import LOST_AFTER_S
from deployments.channel.messages import ChannelAddress, FailureKind, GenerateCall, decode_reply, encode
from deployments.replica.engine_replica import EngineReplica
from llm.serving.schemas import GenerationRequest

pytestmark = pytest.mark.timeout(60)


def request(max_new_tokens: int) -> GenerationRequest:
    return GenerationRequest(prompt_token_ids=(1, 2, 3), max_new_tokens=max_new_tokens, ignore_eos=True)


async def test_a_router_does_not_take_its_own_absence_for_its_replicas_silence(make_service: ServiceFactory):
    """Else all its replicas would have failed at once, and no stream would have anywhere to go."""
    service = await make_service(
        emulated_config(emulation={"tokens_per_s": 100.0, "max_seq_len": 2048}), num_replicas=2
    )
    undisturbed = (await service.router.start([request(200)])).generations[0]
    await eventually(lambda: undisturbed.is_over)
    generation = (await service.router.start([request(200)])).generations[0]
    await eventually(lambda: len(generation.token_ids) > 20)
    watch = service.router._watch
    for absence_s in (20.0, 40.0):
        watch._clock = lambda absence_s=absence_s: time.monotonic() + absence_s
        watch._check()  # the first thing that a router does which goes on, before it reads what has come meanwhile
        assert set(service.router.fleet.replica_ids) == {"replica-0", "replica-1"}
    await eventually(lambda: generation.is_over)
    assert generation.token_ids == undisturbed.token_ids
    assert (generation.num_resumes, generation.error) == (0, None)


async def test_a_replica_that_falls_silent_is_still_found_out(make_service: ServiceFactory):
    """Also by a router that is itself late now and then, by less than it takes to be silent."""
    service = await make_service(emulated_config(router={"silence_timeout_s": 1.0}), num_replicas=2)
    service.client.replicas[0].stop()
    async with asyncio.timeout(30):
        while set(service.router.fleet.replica_ids) != {"replica-1"}:
            time.sleep(0.3)
            await asyncio.sleep(0.25)


def _listen(pipe: Connection) -> None:
    """A router's end of the channel in a process of its own: tells where it listens, and what has come."""

    async def serve() -> None:
        sink = Sink("replica-0")
        pipe.send(sink.listener.address)
        while True:
            if pipe.poll():
                pipe.recv()
                pipe.send(len(sink.reports))
            await asyncio.sleep(0.01)

    asyncio.run(serve())


@pytest.fixture
def stoppable_router() -> Iterator[tuple[int, ChannelAddress, Connection]]:
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_listen, args=(theirs,), daemon=True)
    process.start()
    try:
        yield process.pid, ours.recv(), ours
    finally:
        process.kill()
        process.join()


async def test_a_stopped_router_gets_its_streams_back_and_reports_again_once_it_goes_on(
    stoppable_router: tuple[int, ChannelAddress, Connection],
):
    """It counts as dead after a few seconds: nothing is generated for it, and its streams are handed back to it."""
    pid, address, pipe = stoppable_router

    def num_reports() -> int:
        pipe.send(None)
        return pipe.recv()

    replica = EngineReplica(emulated_config(emulation={"tokens_per_s": 50.0, "max_seq_len": 2048}), "replica-0")
    try:
        call = encode(GenerateCall.of(request(1500), 1, address))
        running = asyncio.ensure_future(replica.generate(call))
        await wait_for(lambda: replica._loop.latest_stats.num_running == 1)
        await wait_for(lambda: num_reports() > 0)
        os.kill(pid, signal.SIGSTOP)
        assert LOST_AFTER_S < await wait_for(running.done, timeout_s=20) < LOST_AFTER_S + 5
        reply = decode_reply(await running)
        assert reply.failure.kind is FailureKind.LEAVING, "the router goes on elsewhere, or here, behind these tokens"
        assert reply.token_ids
        await wait_for(lambda: replica._loop.latest_stats.num_running == 0)
        os.kill(pid, signal.SIGCONT)
        before = num_reports()
        rest = request(1500).model_copy(update={"output_token_ids": tuple(reply.token_ids), "request_id": "again"})
        again = asyncio.ensure_future(replica.generate(encode(GenerateCall.of(rest, 2, address))))
        await wait_for(lambda: num_reports() > before + 3)
        again.cancel()
    finally:
        replica.stop()
