"""Routers that die, move or lose a frame, with whole routers and engine replicas in one process."""

import asyncio
import itertools

import pytest
from channel_ends import STATS, Sink, wait_for
from in_process import ServiceFactory, emulated_config

from deployments.channel.listener import TokenListener
from deployments.channel.messages import Condition, Failure, FailureKind, GenerateCall, decode_reply, encode
from deployments.channel.sender import TokenSender
from deployments.replica.engine_replica import EngineReplica
from llm.scheduling.slot_pool import ContentChanges
from llm.serving.schemas import FinishReason, GenerationRequest

pytestmark = pytest.mark.timeout(60)


def request(max_new_tokens: int, **fields: object) -> GenerationRequest:
    return GenerationRequest.model_validate(
        {"prompt_token_ids": (1, 2, 3), "max_new_tokens": max_new_tokens, "ignore_eos": True, **fields}
    )


class AnySink(Sink):
    """A router's end for replicas of any name."""

    def take(self, replica_id: str, items: list) -> None:
        self.items += items


async def test_last_words_leave_before_the_connection_closes():
    """A replica that ends reports why and closes at once: here before the connection stands, which is the worst case.
    Sent and dropped, they would be what the router of a replica that crashed hears: nothing."""
    sink = Sink()
    sender = TokenSender("replica")
    sender.attach(sink.listener.address)
    farewell = Condition("v1", failure="the replica is shutting down", has_shut_down=True)
    sender.report(STATS, ContentChanges(), [], farewell)
    sender.close()
    await wait_for(lambda: sink.reports)
    assert sink.reports[0].condition == farewell
    sink.listener.close()


@pytest.mark.parametrize("logprobs", [None, 1])
@pytest.mark.parametrize("lost", [(30,), (30, 31, 60)])
async def test_a_lost_frame_costs_a_stream_less_than_a_second(
    make_service: ServiceFactory, monkeypatch, logprobs, lost
):
    """Fault F17: everything comes, in its order and once, without waiting for the call's reply."""
    service = await make_service(emulated_config(emulation={"tokens_per_s": 100.0, "max_seq_len": 2048}))
    undisturbed = (await service.router.start([request(200, logprobs=logprobs)])).generations[0]
    await wait_for(lambda: undisturbed.is_over)
    take, num_frames = TokenListener._take, 0

    def lossy(self: TokenListener, peer: bytes, data: bytes) -> None:
        nonlocal num_frames
        num_frames += 1
        if num_frames not in lost:
            take(self, peer, data)

    monkeypatch.setattr(TokenListener, "_take", lossy)
    group = await service.router.start([request(200, logprobs=logprobs)])
    generation, arrivals = group.generations[0], []
    while not generation.is_over:
        await group.news()
        arrivals.append((asyncio.get_running_loop().time(), len(generation.token_ids)))
    assert max(later - earlier for (earlier, _), (later, _) in itertools.pairwise(arrivals)) < 1
    assert max(after - before for (_, before), (_, after) in itertools.pairwise(arrivals)) < 100, "not by the reply"
    assert generation.token_ids == undisturbed.token_ids
    assert generation.logprobs == undisturbed.logprobs
    assert service.directory.snapshot()["router"]["channel"]["num_missed"] > 0


async def test_nothing_is_generated_for_a_dead_router():
    """Fault F16: within 5 s its rows and pages are free; another router's stream and one without a channel go on."""
    replica = EngineReplica(emulated_config(emulation={"tokens_per_s": 50.0, "max_seq_len": 2048}), "replica-0")
    dead, alive = AnySink(), AnySink()
    calls = [
        GenerateCall.of(request(1500), 1, dead.listener.address),
        GenerateCall.of(request(1500), 2, dead.listener.address),
        GenerateCall.of(request(400), 1, alive.listener.address),
        GenerateCall.of(request(400), 0, None),
    ]
    running = [asyncio.ensure_future(replica.generate(encode(call))) for call in calls]
    await wait_for(lambda: dead.items and alive.items)
    await wait_for(lambda: replica._loop.latest_stats.num_running == 4)
    dead.listener.close()
    assert await wait_for(lambda: replica._loop.latest_stats.num_running == 2) < 5
    failure = Failure(FailureKind.LEAVING, "the token channel to the router was lost")
    failures = [decode_reply(await call).failure for call in running[:2]]
    assert failures == [failure] * 2, "a router that lives after all goes on"
    replies = [decode_reply(await call) for call in running[2:]]
    assert [(len(r.token_ids), r.end.reason) for r in replies] == [(400, FinishReason.LENGTH)] * 2
    await wait_for(lambda: len(alive.tokens(1)) == 400)
    await wait_for(lambda: replica._loop.latest_stats.num_used_pages == 0)
    assert replica._loop._sender.num_routers == 1
    alive.listener.close()
    replica.stop()


async def test_a_router_that_listens_on_another_address_hears_each_report_once(make_service: ServiceFactory):
    """Replicas move to the new address and leave the old one; streams that are open go on."""
    service = await make_service(num_replicas=2)
    senders = [replica._loop._sender for replica in service.client.replicas]
    before = service.router.journal.channel
    open_streams = await service.router.start([request(1000) for _ in range(4)])
    await open_streams.news()
    service.directory.hub.listen_on("127.0.0.1")
    after = service.router.journal.channel
    assert after.endpoint != before.endpoint
    later = await service.router.start([request(20) for _ in range(8)])
    await wait_for(lambda: all(generation.end for generation in later.generations))

    def endpoints() -> set[str]:
        return {router.link.endpoint for sender in senders for router in sender._routers.values()}

    await wait_for(lambda: endpoints() == {after.endpoint})
    assert [sender.num_routers for sender in senders] == [1, 1]
    await wait_for(lambda: all(generation.end for generation in open_streams.generations))
    assert all(len(generation.token_ids) == 1000 for generation in open_streams.generations)
    counters = service.directory.hub.counters
    num_frames = counters.num_frames
    await asyncio.sleep(2)
    assert 2 <= counters.num_frames - num_frames <= 2 * 22, "ten reports a second of each replica, no more"
