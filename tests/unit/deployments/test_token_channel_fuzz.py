"""Whatever is thrown at the token channel's port, tokens keep arriving and memory stays bounded."""

import asyncio
import contextlib
import random
import resource
import subprocess
import sys
import time
from urllib.parse import urlsplit

import pytest
import zmq
from channel_ends import STATS, Sink, report, wait_for
from hypothesis import given, settings, strategies as st
from in_process import ServiceFactory
from test_token_channel import insider

from chaos.strangers import opening
from deployments.channel.frames import FrameHeader
from deployments.channel.link import LOST_AFTER_S
from deployments.channel.messages import End, Report, StepFrame, TokenItem, encode
from deployments.channel.sender import TokenSender
from llm.serving.schemas import FinishReason, TokenLogprobs

READY = b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x04PUSH"

garbage = st.binary(max_size=4096)
openings = st.sampled_from((opening(b"NULL"), opening(b"CURVE"), opening(b"PLAIN"), b"\xff" + bytes(8) + b"\x01"))
tcp_streams = st.one_of(
    garbage,
    st.builds(lambda start, tail: start[: len(tail) % len(start)], openings, garbage),
    st.builds(lambda start, tail: start + tail, openings, garbage),
    st.builds(lambda start, tail: start + READY + tail, openings, garbage),
    st.builds(lambda start, tail: start + b"\x04\xc8\x05HELLO\x01\x00" + tail, openings, garbage),
    st.builds(
        lambda start, size: start + READY + b"\x02" + size.to_bytes(8, "big") + b"x" * 100,
        openings,
        st.integers(1, 2**63 - 1),
    ),
    st.just(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
)


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
            await wait_for(lambda: sink.items)
            assert sink.tokens(1) == [7]
            assert sink.listener.counters.num_frames == 1, "nothing passes for a frame without the key"
        finally:
            sender.close()
            sink.listener.close()

    asyncio.run(attack())


async def test_strangers_are_refused_before_anything_of_theirs_is_buffered():
    """Frames of 4 MiB, with no security and with a wrong key, noise and half a handshake, from forty connections.

    The event loop's own work is measured by the processor time of its thread, which a busy machine does not change.
    """
    sink, sender = Sink(), TokenSender("replica")
    stream = sender.open(1, sink.listener.address, 0)
    await wait_for(lambda: sink.reports, sender)
    memory, busy, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time(), time.monotonic()
    strangers = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "chaos.strangers", sink.listener.address.endpoint, "2", stdout=asyncio.subprocess.PIPE
    )
    output = asyncio.ensure_future(strangers.communicate())
    num_sent = 0
    while not output.done():
        stream.push((num_sent,))
        num_sent += 1
        sender.flush()
        report(sender)
        await asyncio.sleep(0.02)
    busy_share = (time.thread_time() - busy) / (time.monotonic() - started)
    num_opened = int(output.result()[0])
    assert strangers.returncode == 0
    assert num_opened > 24
    await wait_for(lambda: sink.listener.counters.num_refused >= num_opened)
    await wait_for(lambda: len(sink.tokens(1)) == num_sent, sender)
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    assert grown_mb < 64, f"{num_opened} connections brought 4 MiB each"
    assert busy_share < 0.3
    assert sink.listener.counters.num_malformed == 0
    sender.close()
    sink.listener.close()


async def test_five_hundred_idle_connections_are_closed():
    """Who does not prove himself within two seconds is thrown out, and counted."""
    sink, sender = Sink(), TokenSender("replica")
    address = urlsplit(sink.listener.address.endpoint)
    ends = [await asyncio.open_connection(address.hostname, address.port) for _ in range(500)]
    sender.open(1, sink.listener.address, 0).push((7,))
    sender.flush()
    await wait_for(lambda: sink.items)
    await wait_for(lambda: sink.listener.counters.num_refused == 500)
    for reader, _ in ends:
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionError):
                while await reader.read(1 << 16):
                    pass
    for _, writer in ends:
        writer.transport.abort()
    sender.close()
    sink.listener.close()


async def test_a_router_that_is_stuck_while_strangers_connect_is_not_dead():
    """Thousands of events that nobody reads do not stop ZeroMQ's thread, which answers the replicas' heartbeats."""
    sink, sender = Sink(), TokenSender("replica")
    lost: list[bool] = []
    sender.open(1, sink.listener.address, 0, lambda: lost.append(True))
    await wait_for(lambda: sink.reports, sender)
    port = sink.listener.address.endpoint.rpartition(":")[2]
    strangers = subprocess.Popen([sys.executable, "-c", MANY_CONNECTIONS, port])
    until = time.monotonic() + 30
    while strangers.poll() is None and time.monotonic() < until:
        report(sender)
        time.sleep(0.05)  # and with it the event loop
    until = time.monotonic() + LOST_AFTER_S + 3
    while time.monotonic() < until:
        report(sender)
        time.sleep(0.05)
    strangers.kill()
    assert strangers.wait() == 0
    await wait_for(lambda: sink.listener.counters.num_refused >= 3000)
    assert not lost
    sender.close()
    sink.listener.close()


MANY_CONNECTIONS = """
import socket, sys
for _ in range(3000):
    with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as connection:
        connection.sendall(b"GET / HTTP/1.1\\r\\n\\r\\n")
"""


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
async def test_mutated_frames_from_inside_break_nothing(make_service: ServiceFactory, seed: int, caplog, serve_log):
    """Nobody who lacks the key can send these, but a replica of another version could."""
    service = await make_service()
    rng = random.Random(seed)
    counters = service.directory.snapshot
    num_before = counters()["router"]["channel"]["num_frames"]
    logprobs = [TokenLogprobs(5, -1.0, ((5, -1.0), (6, -2.0)))]
    end = End(FinishReason.STOP)
    frames = [
        encode(StepFrame("replica-0", [TokenItem(1, 0, [5], logprobs), TokenItem(2, 3, [5], None, end)])),
        encode(Report("replica-0", STATS, [1, 2, 3], [4], received=[1, 2])),
        encode(Report("replica-0", STATS, [1, 2, 3], [], is_snapshot=True)),
        encode(Report("replica-9", STATS)),
    ]
    socket = insider(service.router.journal.channel)
    for number in range(1, 251):
        socket.send(FrameHeader(1, number, 1).pack() + mutated(rng.choice(frames), rng))
        socket.send(mutated(FrameHeader(2, number, 1).pack() + rng.choice(frames), rng))
    async with asyncio.timeout(10):
        while counters()["router"]["channel"]["num_frames"] < num_before + 500:
            await asyncio.sleep(0.01)
    socket.close()
    answers = await asyncio.gather(*(service.post("/v1/completions", prompt="a", max_tokens=5) for _ in range(8)))
    assert [answer.status_code for answer in answers] == [200] * 8
    assert all(answer.json()["usage"]["completion_tokens"] == 5 for answer in answers)
    assert not any(record.exc_info for record in [*caplog.records, *serve_log])


@pytest.mark.parametrize("seed", range(4))
async def test_mutated_acknowledgements_break_nothing(seed: int, caplog):
    """A router of another version may answer what it likes: the replica goes on."""
    rng = random.Random(seed)
    sink, sender = Sink(), TokenSender("replica")
    send = sink.listener._socket.send_multipart
    sink.listener._socket = Mangling(sink.listener._socket, lambda told: mutated(told, rng), send)
    stream = sender.open(1, sink.listener.address, 0)
    for token_id in range(200):
        stream.push((token_id,))
        sender.flush()
        report(sender)
        await asyncio.sleep(0.002)
    sink.listener._socket.mangle = lambda told: told
    sender.open(2, sink.listener.address, 0).push((7,))
    await wait_for(lambda: sink.tokens(2) == [7], sender, timeout_s=30)
    sender.close()
    sink.listener.close()


class Mangling:
    """A listener's socket that changes what it sends."""

    def __init__(self, socket: zmq.Socket, mangle, send) -> None:
        self.mangle = mangle
        self._socket = socket
        self._send = send

    def send_multipart(self, parts, *args) -> None:
        self._send((parts[0], self.mangle(parts[1])), *args)

    def __getattr__(self, name: str):
        return getattr(self._socket, name)
