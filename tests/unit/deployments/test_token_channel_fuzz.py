"""Whatever is thrown at the token channel's port, tokens keep arriving and memory stays bounded."""

import asyncio
import contextlib
import random
import resource
import secrets
from urllib.parse import urlsplit

import pytest
import zmq
from hypothesis import given, settings, strategies as st
from in_process import ServiceFactory

from deployments.channel.messages import SECRET_BYTES, End, Report, StepFrame, TokenItem, encode
from deployments.channel.token_channel import TokenListener, TokenSender
from llm.serving.schemas import EngineStats, FinishReason, TokenLogprobs

# ZMTP 3.0 (https://rfc.zeromq.org/spec/23): signature, version, mechanism, as-server, filler; then the READY command.
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)
READY = b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x04PUSH"

garbage = st.binary(max_size=4096)
tcp_streams = st.one_of(
    garbage,
    garbage.map(lambda tail: GREETING[: len(tail) % len(GREETING)]),
    garbage.map(lambda tail: GREETING + tail),
    garbage.map(lambda tail: GREETING + READY + tail),
    st.integers(1, 2**63 - 1).map(lambda size: GREETING + READY + b"\x02" + size.to_bytes(8, "big") + b"x" * 100),
    st.just(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
)


class Sink:
    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.listener = TokenListener("127.0.0.1", 0, on_items=self.take, on_report=lambda _: None)

    def take(self, _: str, items: list[TokenItem]) -> None:
        for item in items:
            self.token_ids += item.token_ids

    async def wait_for(self, token_id: int) -> None:
        async with asyncio.timeout(30):
            while token_id not in self.token_ids:
                await asyncio.sleep(0.002)


async def throw(endpoint: str, data: bytes) -> None:
    """Send `data` over a connection of its own; how the other side takes it does not matter."""
    address = urlsplit(endpoint)
    with contextlib.suppress(OSError, TimeoutError):
        _, writer = await asyncio.open_connection(address.hostname, address.port)
        writer.write(data)
        await asyncio.wait_for(writer.drain(), 1)
        writer.close()


@settings(max_examples=150, deadline=None)
@given(streams=st.lists(tcp_streams, min_size=1, max_size=8))
def test_bytes_that_are_no_zeromq(streams: list[bytes]):
    async def attack() -> None:
        sink, sender = Sink(), TokenSender("replica")
        try:
            stream = sender.open(1, sink.listener.address, 0)
            await asyncio.gather(*(throw(sink.listener.address.endpoint, data) for data in streams))
            stream.push((7,))
            sender.flush()
            await sink.wait_for(7)
            assert sink.token_ids == [7]
            assert sink.listener.counters.num_malformed == 0, "nothing passes for a frame without the secret"
        finally:
            sender.close()
            sink.listener.close()

    asyncio.run(attack())


async def test_five_hundred_idle_connections_and_a_flood_without_the_secret():
    sink, sender = Sink(), TokenSender("replica")
    context = zmq.Context()
    address = urlsplit(sink.listener.address.endpoint)
    writers = [(await asyncio.open_connection(address.hostname, address.port))[1] for _ in range(500)]
    flood = context.socket(zmq.PUSH)
    flood.setsockopt(zmq.LINGER, 0)
    flood.connect(sink.listener.address.endpoint)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    frame = secrets.token_bytes(1 << 20)
    for _ in range(300):
        with contextlib.suppress(zmq.Again):
            flood.send(frame, zmq.NOBLOCK)
        await asyncio.sleep(0)
    sender.open(1, sink.listener.address, 0).push((7,))
    sender.flush()
    await sink.wait_for(7)
    assert sink.listener.counters.num_unauthenticated > 0
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown_mb < 400, "300 MB were sent, to be dropped"
    for writer in writers:
        writer.close()
    context.destroy(linger=0)
    sender.close()
    sink.listener.close()


def mutated(frame: bytes, rng: random.Random) -> bytes:
    """A frame with bytes changed, left out or doubled."""
    data = bytearray(frame)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(data))
        match rng.randrange(3):
            case 0:
                data[place] = rng.randrange(256)
            case 1:
                del data[place : place + rng.randint(1, 8)]
            case _:
                data[place:place] = data[place : place + rng.randint(1, 8)]
        data = data or bytearray(b"\0")
    return bytes(data)


@pytest.mark.parametrize("seed", range(4))
async def test_mutated_frames_with_the_secret_break_nothing(make_service: ServiceFactory, seed: int, caplog, serve_log):
    """Nobody who lacks the secret can send these, but a replica of another version could."""
    service = await make_service()
    rng = random.Random(seed)
    channel = service.router.journal.channel
    counters = service.router.snapshot
    logprobs = [TokenLogprobs(5, -1.0, ((5, -1.0), (6, -2.0)))]
    end = End(FinishReason.STOP)
    stats = EngineStats(1, 2, 3, 4, 5, 6, 15, 16, 0, 7, 8, 9)
    frames = [
        encode(StepFrame("replica-0", [TokenItem(1, 0, [5], logprobs), TokenItem(2, 3, [5], None, end)])),
        encode(Report("replica-0", stats, [1, 2, 3], [4], received=[1, 2])),
        encode(Report("replica-0", stats, [1, 2, 3], [], is_snapshot=True)),
        encode(Report("replica-9", stats)),
    ]
    socket = zmq.Context.instance().socket(zmq.PUSH)
    socket.setsockopt(zmq.LINGER, 1000)
    socket.connect(channel.endpoint)
    for _ in range(500):
        socket.send(channel.secret + mutated(rng.choice(frames), rng))
    socket.close()
    async with asyncio.timeout(10):
        while counters()["router"]["channel"]["num_frames"] < 500:
            await asyncio.sleep(0.01)
    assert len(channel.secret) == SECRET_BYTES
    answers = await asyncio.gather(*(service.post("/v1/completions", prompt="a", max_tokens=5) for _ in range(8)))
    assert [answer.status_code for answer in answers] == [200] * 8
    assert all(answer.json()["usage"]["completion_tokens"] == 5 for answer in answers)
    assert not any(record.exc_info for record in [*caplog.records, *serve_log])
