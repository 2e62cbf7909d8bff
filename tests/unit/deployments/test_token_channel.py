"""The token channel over real sockets: what arrives, what is sent again, who is let in and who counts as dead."""

import asyncio
import logging
import random
import socket
import time

import msgspec
import pytest
import zmq
import zmq.utils.z85
from channel_ends import STATS, Relay, Sink, report, wait_for

from deployments.channel import link, sender as sending
from deployments.channel.frames import MAX_FRAME_BYTES, FrameHeader
from deployments.channel.link import WINDOW_FRAMES
from deployments.channel.listener import TokenListener
from deployments.channel.messages import (
    ChannelAddress,
    End,
    EngineTiming,
    Report,
    TokenItem,
    encode,
)
from deployments.channel.sender import MAX_BLOCKS_A_REPORT, TokenSender
from llm.scheduling.slot_pool import ContentChanges
from llm.serving.schemas import FinishReason, TokenLogprobs

pytestmark = pytest.mark.timeout(60)


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


def lose_frames(monkeypatch: pytest.MonkeyPatch, is_lost) -> list[int]:
    """Have listeners not see the frames whose count, from 1, `is_lost` chooses; returns the counts of these."""
    take, lost, num_seen = TokenListener._take, [], 0

    def lossy(self: TokenListener, peer: bytes, data: bytes) -> None:
        nonlocal num_seen
        num_seen += 1
        if is_lost(num_seen):
            lost.append(num_seen)
        else:
            take(self, peer, data)

    monkeypatch.setattr(TokenListener, "_take", lossy)
    return lost


def insider(address: ChannelAddress) -> zmq.Socket:
    """A socket that knows the key, as a replica of another version does."""
    socket = zmq.Context.instance().socket(zmq.DEALER)
    socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
    socket.curve_serverkey = address.server_key
    socket.setsockopt(zmq.LINGER, 1000)
    socket.connect(address.endpoint)
    return socket


async def test_a_step_is_one_frame_with_every_stream_of_the_router(sink, sender):
    first, second = sender.open(1, sink.listener.address, 0), sender.open(2, sink.listener.address, 5)
    first.push((10, 11))
    second.push((20,), (TokenLogprobs(20, -0.5, ((20, -0.5), (3, -2.0))),), End(FinishReason.STOP, 20, 16))
    sender.flush()
    await wait_for(lambda: len(sink.items) == 2)
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
    await wait_for(lambda: len(sink.items) == 5)
    assert [(item.offset, item.token_ids) for item in sink.items] == [(i, [i]) for i in range(5)]


async def test_reports_tell_everything_first_then_what_changed(sink, sender):
    """Block hashes are the low 64 bits of a page's; each stream is told as arrived once."""
    sender.attach(sink.listener.address)
    sender.report(STATS, ContentChanges({1}), [1, 2, 2**64 + 3])
    sender.open(7, sink.listener.address, 0)
    sender.report(STATS, ContentChanges({4}, {2}), [1, 3, 4])
    sender.report(STATS, ContentChanges(), [1, 3, 4])
    await wait_for(lambda: len(sink.reports) == 3)
    assert sink.reports[0] == Report("replica", STATS, [1, 2, 3], is_snapshot=True)
    assert sink.reports[1] == Report("replica", STATS, [4], [2], received=[7])
    assert sink.reports[2] == Report("replica", STATS)


async def test_a_large_cache_is_told_in_several_reports(sink, sender):
    sender.attach(sink.listener.address)
    num_blocks = 2 * MAX_BLOCKS_A_REPORT + 1
    sender.report(STATS, ContentChanges(), [2**64 - 1 - i for i in range(num_blocks)])
    await wait_for(lambda: len(sink.reports) == 3)
    assert [part.is_snapshot for part in sink.reports] == [True, False, False]
    assert sum(len(part.added_blocks) for part in sink.reports) == num_blocks


async def test_how_long_the_engine_took_goes_with_the_first_tokens(sink, sender):
    stream = sender.open(1, sink.listener.address, 0)
    stream.push((1,), timing=EngineTiming(0.5, 0.25))
    sender.flush()
    stream.push((2,))
    sender.flush()
    await wait_for(lambda: len(sink.items) == 2)
    assert [item.timing for item in sink.items] == [EngineTiming(0.5, 0.25), None]


# A router that does not keep up


async def test_a_router_that_does_not_read_costs_no_encoding_and_gets_each_token_once(sink, sender, monkeypatch):
    """Once its window is full, tokens and log-probabilities wait as they are; each is encoded a single time."""
    frames: list[bytes] = []
    monkeypatch.setattr(sending, "encode", lambda message: frames.append(encode(message)) or frames[-1])
    streams = [sender.open(i, sink.listener.address, 0) for i in range(8)]

    def step(token_id: int) -> None:
        for stream in streams:
            stream.push((token_id,), (TokenLogprobs(token_id, -0.5, ((token_id, -0.5),)),))
        sender.flush()

    for token_id in range(1000):  # the event loop does not run meanwhile: nothing is read
        step(token_id)
    assert len(frames) == WINDOW_FRAMES
    for token_id in range(1000, 1400):
        await wait_for(lambda: sender._router(sink.listener.address).link.poll() or not sender_is_full(sender, sink))
        step(token_id)
    await wait_for(lambda: len(sink.tokens(7)) == 1400, sender)
    for stream_id in range(8):
        assert sink.tokens(stream_id) == list(range(1400))
        found = [e.token_id for item in sink.items if item.stream_id == stream_id for e in item.logprobs]
        assert found == list(range(1400))
    whole = encode(sink.items)
    assert sum(len(frame) for frame in frames) < 1.2 * len(whole) + 10_000, "nothing was encoded again and again"
    assert max(len(item.token_ids) for item in sink.items) <= 4, "no step pays for the whole backlog"


def sender_is_full(sender: TokenSender, sink: Sink) -> bool:
    return not sender._router(sink.listener.address).link.has_room


async def test_a_router_that_missed_reports_is_told_everything(sink, sender):
    sender.attach(sink.listener.address)
    for _ in range(3 * WINDOW_FRAMES):
        report(sender)
    sender.open(8, sink.listener.address, 0)
    sender.report(STATS, ContentChanges({1}), [1])
    await wait_for(lambda: len(sink.reports) == 2 * WINDOW_FRAMES)
    # Again and again, because there is room only once the acknowledgements have come back.
    await wait_for(lambda: sender.report(STATS, ContentChanges({2}), [1, 2]) or len(sink.reports) > 2 * WINDOW_FRAMES)
    assert sink.reports[2 * WINDOW_FRAMES] == Report("replica", STATS, [1, 2], is_snapshot=True, received=[8])


async def test_a_router_that_is_stuck_is_not_dead(sink, sender):
    """ZeroMQ's own thread answers heartbeats while the router's event loop stands still."""
    lost: list[bool] = []
    stream = sender.open(1, sink.listener.address, 0, lambda: lost.append(True))
    await wait_for(lambda: sink.reports, sender)
    until = time.monotonic() + link.LOST_AFTER_S + 3
    token_id = 0
    while time.monotonic() < until:
        stream.push((token_id,))
        sender.flush()
        report(sender)
        token_id += 1
        time.sleep(0.02)  # and with it the event loop
    assert not lost
    await wait_for(lambda: stream.push((token_id,)) or sender.flush() or len(sink.tokens(1)) >= token_id, sender)


async def test_the_end_of_a_stream_that_a_router_is_too_slow_for_comes_with_the_reply(sink, sender):
    """What is over leaves nothing behind in the replica."""
    stream = sender.open(1, sink.listener.address, 0)
    for token_id in range(500):
        stream.push((token_id,))
        sender.flush()
    stream.push((500,), end=End(FinishReason.LENGTH))
    stream.close()
    router = sender._router(sink.listener.address)
    assert not router.dirty
    assert not router.streams


# Frames that get lost


@pytest.mark.parametrize("lost", ["one", "half", "the first", "a run"])
async def test_what_is_lost_comes_again(sink, sender, monkeypatch, lost: str):
    """Nothing is missing, nothing comes twice, and the reports are whole too."""
    draws = random.Random(5)
    chosen = {
        "one": lambda n: n == 20,
        "half": lambda _: draws.random() < 0.5,
        "the first": lambda n: n == 1,
        "a run": lambda n: 10 <= n < 30,
    }[lost]
    dropped = lose_frames(monkeypatch, chosen)
    stream = sender.open(1, sink.listener.address, 0)
    other = sender.open(2, sink.listener.address, 0)
    for token_id in range(100):
        stream.push((token_id,))
        if token_id < 50:
            other.push((token_id,), end=End(FinishReason.LENGTH) if token_id == 49 else None)
        sender.flush()
        if token_id % 5 == 0:
            sender.report(STATS, ContentChanges({token_id + 1}), [token_id + 1])
        await asyncio.sleep(0.01)
    await wait_for(lambda: len(sink.tokens(1)) == 100, sender)
    assert dropped
    assert sink.tokens(1) == list(range(100))
    assert sink.tokens(2) == list(range(50))
    assert [item.end is not None for item in sink.items if item.stream_id == 2][-1]
    assert [b for part in sink.reports for b in part.added_blocks] == list(range(1, 100, 5))
    assert sink.listener.counters.num_missed > 0


async def test_a_lost_last_frame_is_missed_with_the_next_report(sink, sender, monkeypatch):
    """With a report every 0.05 s the pause is far below a second."""
    stream = sender.open(1, sink.listener.address, 0)
    await wait_for(lambda: sink.reports, sender)
    is_losing = True
    dropped = lose_frames(monkeypatch, lambda _: is_losing)
    stream.push((1,), end=End(FinishReason.LENGTH))
    sender.flush()
    await wait_for(lambda: dropped)
    is_losing = False
    assert await wait_for(lambda: sink.items, sender) < 1
    assert sink.tokens(1) == [1]


async def test_when_a_whole_window_is_lost_the_link_goes_on(sink, sender, monkeypatch):
    """With nothing acknowledged there is no room for another frame, so that the first is sent again."""
    stream = sender.open(1, sink.listener.address, 0)
    is_losing = True
    lose_frames(monkeypatch, lambda _: is_losing)
    for token_id in range(3 * WINDOW_FRAMES):
        stream.push((token_id,))
        sender.flush()
        report(sender)
    await asyncio.sleep(0.2)
    is_losing = False
    assert await wait_for(lambda: sink.items, sender) < 3


async def test_a_connection_that_breaks_loses_nothing(sink, sender):
    relay = Relay(sink.listener.address.endpoint)
    await relay.open()
    lost: list[bool] = []
    address = msgspec.structs.replace(sink.listener.address, endpoint=relay.endpoint)
    stream = sender.open(1, address, 0, lambda: lost.append(True))
    for token_id in range(100):
        stream.push((token_id,))
        sender.flush()
        if token_id % 5 == 0:
            report(sender)
        if token_id % 30 == 20:
            relay.cut()
        await asyncio.sleep(0.01)
    await wait_for(lambda: len(sink.tokens(1)) == 100, sender)
    assert sink.tokens(1) == list(range(100))
    assert not lost
    await relay.close()


# Routers that die, and routers that move


async def test_a_router_that_is_gone_is_forgotten_and_its_streams_are_told(sink, sender):
    lost: list[int] = []
    sender.open(1, sink.listener.address, 0, lambda: lost.append(1)).close()
    sender.open(2, sink.listener.address, 0, lambda: lost.append(2))
    other = Sink()
    sender.open(3, other.listener.address, 0, lambda: lost.append(3))
    await wait_for(lambda: sink.reports and other.reports, sender)
    sink.listener.close()
    assert await wait_for(lambda: lost, sender) < 5
    assert lost == [2], "neither a stream that is over nor another router's"
    assert sender.num_routers == 1
    other.listener.close()


async def test_a_router_whose_node_vanished_is_forgotten_too(sink, sender):
    """Nothing tells of it but that heartbeats are not answered: the connection neither breaks nor delivers."""
    relay = Relay(sink.listener.address.endpoint)
    await relay.open()
    lost: list[bool] = []
    address = msgspec.structs.replace(sink.listener.address, endpoint=relay.endpoint)
    sender.open(1, address, 0, lambda: lost.append(True))
    await wait_for(lambda: sink.reports, sender)
    relay.fall_silent()
    assert await wait_for(lambda: lost, sender) < 5
    await relay.close()


def is_free(port: int) -> bool:
    """ZeroMQ gives a closed socket's port back on a thread of its own."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


async def test_a_router_that_takes_a_dead_ones_port_is_another_one(sink, sender):
    """It has another key, so that the replica does not take it for the dead one."""
    lost: list[bool] = []
    sender.open(1, sink.listener.address, 0, lambda: lost.append(True))
    await wait_for(lambda: sink.reports, sender)
    sink.listener.close()
    reports: list[Report] = []
    port = int(sink.listener.address.endpoint.rpartition(":")[2])
    await wait_for(lambda: is_free(port))
    successor = TokenListener("127.0.0.1", port, on_items=lambda *_: None, on_report=reports.append)
    await wait_for(lambda: lost, sender)
    assert not reports
    sender.attach(successor.address)
    await wait_for(lambda: reports, sender)
    successor.close()


async def test_a_second_address_replaces_the_first_once_it_works(sink, sender):
    """One link a router, whatever it listens on: nothing is lost on the way, and reports come once."""
    first = sink.listener.address
    stream = sender.open(1, first, 0)
    stream.push((0,))
    sender.flush()
    await wait_for(lambda: sink.items, sender)
    nowhere = msgspec.structs.replace(first, endpoint="tcp://127.0.0.1:9", version=first.version + 1)
    sender.attach(nowhere)
    stream.push((1,))
    sender.flush()
    await wait_for(lambda: len(sink.tokens(1)) == 2, sender)
    sink.listener._version = nowhere.version
    second = sink.listener.listen_on("127.0.0.1")
    assert (second.router_id, second.version) == (first.router_id, first.version + 2)
    sender.attach(second)
    router_link = sender._router(second).link
    for token_id in range(2, 100):
        stream.push((token_id,))
        sender.flush()
        await asyncio.sleep(0.002)
    await wait_for(lambda: router_link.endpoint == second.endpoint, sender)
    sender.open(2, first, 0)  # a call that was on its way brings the old address
    await wait_for(lambda: len(sink.tokens(1)) == 100, sender)
    assert router_link.endpoint == second.endpoint
    assert sender.num_routers == 1
    num_reports = len(sink.reports)
    for _ in range(10):
        report(sender)
    await wait_for(lambda: len(sink.reports) >= num_reports + 10)
    await asyncio.sleep(0.1)
    assert len(sink.reports) == num_reports + 10


# Who is let in


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
        b"\xff" * 10_000,
    ],
)
async def test_frames_that_do_not_parse_are_dropped_and_counted(sink, sender, payload):
    socket = insider(sink.listener.address)
    socket.send(FrameHeader(1, 1, 1).pack() + payload)
    socket.send(FrameHeader(1, 2, 1).pack()[:7])
    socket.send_multipart([FrameHeader(1, 2, 1).pack(), payload])
    await wait_for(lambda: sink.listener.counters.num_malformed == 3)
    socket.close()
    sender.open(1, sink.listener.address, 0).push((7,))
    sender.flush()
    await wait_for(lambda: sink.items)
    assert sink.items[0].token_ids == [7], "the channel goes on"


async def test_frames_that_are_too_long_are_neither_sent_nor_taken(sink, sender, caplog):
    socket = insider(sink.listener.address)
    socket.setsockopt(zmq.LINGER, 0)
    socket.send(FrameHeader(1, 1, 1).pack() + bytes(MAX_FRAME_BYTES + 1))
    stream = sender.open(1, sink.listener.address, 0)
    stream.push((1,), end=End(FinishReason.ERROR, error="x" * MAX_FRAME_BYTES))
    sender.flush()
    report(sender)
    await wait_for(lambda: sink.reports)
    assert "too long" in caplog.text
    assert not sink.items
    assert sink.listener.counters.num_frames == 1
    socket.close()


async def test_the_key_is_shown_nowhere(sink, sender, caplog):
    caplog.set_level(logging.DEBUG)
    address = sink.listener.address
    sender.attach(address)
    await wait_for(lambda: sink.reports, sender)
    for shown in (repr(address), str(address), f"{address}", caplog.text):
        assert address.server_key.decode() not in shown
    assert str(address.server_key) not in repr(address)


async def test_nothing_travels_in_clear(sink, sender):
    """Neither tokens nor the key: what passes on the wire holds no part of either."""
    seen = bytearray()
    relay = Relay(sink.listener.address.endpoint)
    pump = relay._pump

    async def listen_in(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        feed = reader.read

        async def read(size: int) -> bytes:
            data = await feed(size)
            seen.extend(data)
            return data

        reader.read = read  # type: ignore[method-assign]
        await pump(reader, writer)

    relay._pump = listen_in  # type: ignore[method-assign]
    await relay.open()
    address = msgspec.structs.replace(sink.listener.address, endpoint=relay.endpoint)
    sender.open(1, address, 0).push(tuple(range(1000, 1200)))
    sender.flush()
    await wait_for(lambda: sink.items, sender)
    assert len(seen) > 600
    assert encode([1000, 1001, 1002])[1:] not in seen
    assert b"replica" not in seen
    assert sink.listener.address.server_key not in seen
    assert zmq.utils.z85.decode(sink.listener.address.server_key) not in seen
    await relay.close()
