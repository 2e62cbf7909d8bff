"""Somebody who has found the token channel's port and lacks its key: whatever can be sent there, for some seconds.

python -m chaos.strangers tcp://127.0.0.1:PORT SECONDS
"""

import asyncio
import contextlib
import os
import sys
import time
from urllib.parse import urlsplit

import zmq

FRAME_BYTES = 4 << 20
_NUM_OF_EACH = 4
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00"
"""The beginning of ZMTP 3.0 (https://rfc.zeromq.org/spec/23): signature and version; then comes the mechanism."""


def opening(mechanism: bytes) -> bytes:
    """What a ZeroMQ client says first."""
    return GREETING + mechanism.ljust(20, b"\0") + bytes(32)


def raw_streams() -> list[bytes]:
    """Bytes for connections without ZeroMQ: noise, another protocol, a first message of 4 MiB after each opening."""
    size = FRAME_BYTES.to_bytes(8, "big")
    return [
        os.urandom(FRAME_BYTES),
        b"POST / HTTP/1.1\r\nContent-Length: 9999999\r\n\r\n" + bytes(FRAME_BYTES),
        opening(b"NULL") + b"\x02" + size + bytes(FRAME_BYTES),
        opening(b"CURVE") + b"\x06" + size + bytes(FRAME_BYTES),
        opening(b"CURVE") + b"\x06" + (200 << 10).to_bytes(8, "big") + bytes(FRAME_BYTES),
        opening(b"CURVE")[:40],
    ]


def zeromq_sockets(context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> list[zmq.Socket[bytes]]:
    """Clients of ZeroMQ: without security, and with a key that is not the router's."""
    sockets = []
    for kind in (zmq.DEALER, zmq.PUSH, zmq.REQ, zmq.DEALER):
        socket = context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, 4)
        if len(sockets) >= 2:
            socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
            socket.curve_serverkey, _ = zmq.curve_keypair()
        socket.connect(endpoint)
        sockets.append(socket)
    return sockets


async def attack(endpoint: str, seconds: float) -> int:
    """Do all of it over and over from many connections at once; returns how many were opened without ZeroMQ."""
    until = time.monotonic() + seconds
    address, num_opened = urlsplit(endpoint), 0

    async def throw(data: bytes) -> None:
        nonlocal num_opened
        while time.monotonic() < until:
            with contextlib.suppress(OSError, TimeoutError):
                _, writer = await asyncio.open_connection(address.hostname, address.port)
                num_opened += 1
                writer.write(data)
                await asyncio.wait_for(writer.drain(), 1)
                await asyncio.sleep(0.05)
                writer.transport.abort()

    async def push(socket: zmq.Socket[bytes]) -> None:
        frame = bytes(FRAME_BYTES)
        while time.monotonic() < until:
            with contextlib.suppress(zmq.ZMQError):
                socket.send(frame, zmq.NOBLOCK)
            await asyncio.sleep(0.02)

    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    sockets = [socket for _ in range(_NUM_OF_EACH) for socket in zeromq_sockets(context, endpoint)]
    throwing = [throw(data) for data in raw_streams() for _ in range(_NUM_OF_EACH)]
    await asyncio.gather(*throwing, *(push(socket) for socket in sockets))
    context.destroy(linger=0)
    return num_opened


if __name__ == "__main__":
    print(asyncio.run(attack(sys.argv[1], float(sys.argv[2]))))
