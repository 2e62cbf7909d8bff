"""What CURVE costs the token channel: encoding and sending a step's tokens, with it and without, in one run.

    python -m benchmarks.channel_security [--streams 64 256] [--logprobs 0 5] [--steps 2000]

Another process receives. Prints one JSON line a row: microseconds of processor time a step of the engine's thread
(encode and send), of the whole sending process (ZeroMQ's thread encrypts), and both as ratios to sending in clear.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection

import zmq

from deployments.channel.messages import StepFrame, TokenItem, encode
from llm.serving.schemas import TokenLogprobs

_ROUNDS = 7


def receive(secured: bool, keys: tuple[bytes, bytes], told: Connection) -> None:
    """Take frames until an empty one comes."""
    socket = zmq.Context.instance().socket(zmq.ROUTER)
    socket.setsockopt(zmq.RCVHWM, 0)
    if secured:
        socket.curve_server, socket.curve_secretkey = True, keys[1]
    told.send(socket.bind_to_random_port("tcp://127.0.0.1"))
    while socket.recv_multipart()[1]:
        pass
    told.send(None)


class Wire:
    """A connection to a receiver of its own."""

    def __init__(self, secured: bool) -> None:
        keys = zmq.curve_keypair()
        self._told, told = multiprocessing.Pipe()
        self._process = multiprocessing.Process(target=receive, args=(secured, keys, told), daemon=True)
        self._process.start()
        self._socket = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        if secured:
            self._socket.curve_publickey, self._socket.curve_secretkey = zmq.curve_keypair()
            self._socket.curve_serverkey = keys[0]
        self._socket.connect(f"tcp://127.0.0.1:{self._told.recv()}")

    def steps(self, frame: StepFrame, num_steps: int) -> tuple[float, float]:
        """Send so many steps; returns seconds a step of this thread and of this process."""
        thread, process = time.thread_time(), time.process_time()
        for _ in range(num_steps):
            self._socket.send(encode(frame))
            time.sleep(0.0005)  # a step takes longer than its sending: nothing queues up
        return (time.thread_time() - thread) / num_steps, (time.process_time() - process) / num_steps

    def close(self) -> None:
        """End the receiver."""
        self._socket.send(b"")
        self._told.recv()
        self._process.join()


def main() -> None:
    """Measure every combination."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--logprobs", type=int, nargs="+", default=[0, 5], help="log-probabilities a token")
    parser.add_argument("--steps", type=int, default=500, help="in each of 7 rounds, which take turns")
    options = parser.parse_args()
    wires = {secured: Wire(secured) for secured in (False, True)}
    for num_logprobs in options.logprobs:
        entry = TokenLogprobs(12345, -0.5, tuple((12345 + i, -0.5 - i) for i in range(num_logprobs)))
        for num_streams in options.streams:
            logprobs = [entry] if num_logprobs else None
            frame = StepFrame("replica", [TokenItem(i, 200 + i, [12345], logprobs) for i in range(num_streams)])
            times: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
            for _ in range(_ROUNDS):
                for secured, wire in wires.items():
                    times[secured].append(wire.steps(frame, options.steps))
            clear, curve = (
                [statistics.median(column) for column in zip(*times[secured], strict=True)] for secured in wires
            )
            row = {
                "streams": num_streams, "logprobs": num_logprobs, "bytes": len(encode(frame)),
                "thread_us_clear": round(1e6 * clear[0], 1), "thread_us_curve": round(1e6 * curve[0], 1),
                "process_us_clear": round(1e6 * clear[1], 1), "process_us_curve": round(1e6 * curve[1], 1),
                "thread_ratio": round(curve[0] / clear[0], 2), "process_ratio": round(curve[1] / clear[1], 2),
            }  # fmt: skip
            print(json.dumps(row), flush=True)
    for wire in wires.values():
        wire.close()


if __name__ == "__main__":
    main()
