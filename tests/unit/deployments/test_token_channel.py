import asyncio
import secrets

import pytest
import zmq

from deployments.channel.messages import (
    SECRET_BYTES,
    ChannelAddress,
    End,
    EngineTiming,
    Report,
    StepFrame,
    TokenItem,
    encode,
)
from deployments.channel.token_channel import MAX_FRAME_BYTES, TokenListener, TokenSender
from llm.core.slot_pool import ContentChanges
from llm.serving.schemas import EngineStats, FinishReason, TokenLogprobs

STATS = EngineStats(1, 2, 3, 4, 5, 6, 15, 16, 0, 7, 8, 9)


class Sink:
    def __init__(self) -> None:
        self.items: list[TokenItem] = []
        self.reports: list[Report] = []
        self.listener = TokenListener("127.0.0.1", 0, on_items=self.take, on_report=self.reports.append)

    def take(self, replica_id: str, items: list[TokenItem]) -> None:
        assert replica_id == "replica"
        self.items += items

    async def wait_for(self, condition) -> None:
        async with asyncio.timeout(30):
            while not condition():
                await asyncio.sleep(0.002)


@pytest.fixture
async def sink():
    sink = Sink()
    yield sink
    sink.listener.close()


@pytest.fixture
def sender():
    sender = TokenSender("replica")
    yield sender
    sender.close()


def raw_socket(address: ChannelAddress) -> zmq.Socket:
    socket = zmq.Context.instance().socket(zmq.PUSH)
    socket.setsockopt(zmq.LINGER, 1000)
    socket.connect(address.endpoint)
    return socket


async def test_a_step_is_one_frame_with_every_stream_of_the_router(sink, sender):
    first, second = sender.open(1, sink.listener.address, 0), sender.open(2, sink.listener.address, 5)
    first.push((10, 11))
    second.push((20,), (TokenLogprobs(20, -0.5, ((20, -0.5), (3, -2.0))),), End(FinishReason.STOP, 20, 16))
    sender.flush()
    await sink.wait_for(lambda: len(sink.items) == 2)
    assert sink.listener.counters.num_frames == 1
    assert sink.items[0] == TokenItem(1, 0, [10, 11])
    assert sink.items[1].offset == 5
    assert sink.items[1].logprobs == [TokenLogprobs(20, -0.5, ((20, -0.5), (3, -2.0)))]
    assert sink.items[1].end == End(FinishReason.STOP, 20, 16)


async def test_offsets_go_on_from_step_to_step(sink, sender):
    stream = sender.open(1, sink.listener.address, 0)
    for token_id in range(5):
        stream.push((token_id,))
        sender.flush()
    await sink.wait_for(lambda: len(sink.items) == 5)
    assert [(item.offset, item.token_ids) for item in sink.items] == [(i, [i]) for i in range(5)]


async def test_what_a_full_queue_refuses_goes_with_a_later_step(sink, sender, monkeypatch):
    stream = sender.open(1, sink.listener.address, 0)
    link = sender._routers[sink.listener.address.endpoint]
    with monkeypatch.context() as patch:
        patch.setattr(link, "send", lambda frame: False)
        stream.push((1,))
        sender.flush()
    stream.push((2,))
    sender.flush()
    await sink.wait_for(lambda: sink.items)
    assert sink.items == [TokenItem(1, 0, [1, 2])]


async def test_reports_tell_everything_first_then_what_changed(sink, sender):
    """Block hashes are the low 64 bits of a page's; each stream is told as arrived once."""
    sender.attach(sink.listener.address)
    sender.report(STATS, ContentChanges({1}), [1, 2, 2**64 + 3])
    sender.open(7, sink.listener.address, 0)
    sender.report(STATS, ContentChanges({4}, {2}), [1, 3, 4])
    sender.report(STATS, ContentChanges(), [1, 3, 4])
    await sink.wait_for(lambda: len(sink.reports) == 3)
    assert sink.reports[0] == Report("replica", STATS, [1, 2, 3], is_snapshot=True)
    assert sink.reports[1] == Report("replica", STATS, [4], [2], received=[7])
    assert sink.reports[2] == Report("replica", STATS)


async def test_a_router_that_missed_a_report_is_told_everything(sink, sender, monkeypatch):
    sender.attach(sink.listener.address)
    sender.open(7, sink.listener.address, 0)
    sender.report(STATS, ContentChanges(), [])
    with monkeypatch.context() as patch:
        patch.setattr(sender._routers[sink.listener.address.endpoint], "send", lambda frame: False)
        sender.open(8, sink.listener.address, 0)
        sender.report(STATS, ContentChanges({1}), [1])
    sender.report(STATS, ContentChanges({2}), [1, 2])
    await sink.wait_for(lambda: len(sink.reports) == 2)
    assert sink.reports[1] == Report("replica", STATS, [1, 2], is_snapshot=True, received=[8])


async def test_how_long_the_engine_took_goes_with_the_first_tokens(sink, sender):
    stream = sender.open(1, sink.listener.address, 0)
    stream.push((1,), timing=EngineTiming(0.5, 0.25))
    sender.flush()
    stream.push((2,))
    sender.flush()
    await sink.wait_for(lambda: len(sink.items) == 2)
    assert [item.timing for item in sink.items] == [EngineTiming(0.5, 0.25), None]


async def test_frames_without_the_secret_are_dropped_and_counted(sink):
    socket = raw_socket(sink.listener.address)
    frame = encode(StepFrame("replica", [TokenItem(1, 0, [1])]))
    for data in (b"", b"short", frame, secrets.token_bytes(SECRET_BYTES) + frame):
        socket.send(data)
    counters = sink.listener.counters
    await sink.wait_for(lambda: counters.num_unauthenticated == 4)
    socket.close()
    assert sink.items == []


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1garbage",
        b"\x93",
        encode(["tokens", "replica", [[1, -1, "x"]]]),
        encode(["unknown", []]),
        encode(["report", 5, {}]),
        encode(Report("r", STATS))[:-3],
        secrets.token_bytes(10_000),
    ],
)
async def test_frames_that_do_not_parse_are_dropped_and_counted(sink, sender, payload):
    socket = raw_socket(sink.listener.address)
    socket.send(sink.listener.address.secret + payload)
    await sink.wait_for(lambda: sink.listener.counters.num_malformed == 1)
    socket.close()
    sender.open(1, sink.listener.address, 0).push((7,))
    sender.flush()
    await sink.wait_for(lambda: sink.items)
    assert sink.items[0].token_ids == [7], "the channel goes on"


async def test_oversized_frames_are_not_taken(sink, sender):
    socket = raw_socket(sink.listener.address)
    socket.setsockopt(zmq.LINGER, 0)
    socket.send(sink.listener.address.secret + bytes(MAX_FRAME_BYTES))
    await asyncio.sleep(0.3)
    assert sink.listener.counters.num_frames == 0
    socket.close()


async def test_a_router_that_is_gone_is_forgotten(sink, sender):
    stream = sender.open(1, sink.listener.address, 0)
    sink.listener.close()
    for _ in range(3000):
        sender.report(STATS, ContentChanges(), [])
    assert sender.num_routers == 1, "a stream still needs it"
    stream.close()
    for _ in range(3000):
        sender.report(STATS, ContentChanges(), [])
    assert sender.num_routers == 0


def test_the_secret_is_not_shown():
    address = ChannelAddress("tcp://127.0.0.1:1", b"s" * SECRET_BYTES)
    assert "sss" not in repr(address)
