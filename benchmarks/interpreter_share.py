"""What a step costs while another thread of the process is busy with Python, by the interpreter's switch interval.

    python -m benchmarks.interpreter_share [--intervals-ms 5 1 0.2] [--rounds 4]

The demo model on a CPU, 8 rows, one thread for its kernels; the other thread parses JSON. One JSON line an interval.
"""

import argparse
import json
import sys
import threading
import time

import torch

from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import GenerationRequest

_NUM_ROWS, _NUM_WARM_STEPS = 8, 5


class Decodes:
    """Decode steps of one engine, and how long they took.

    Attributes:
        num_steps: measured.
        seconds: that they took together.
    """

    def __init__(self, engine: ContinuousBatchingEngine) -> None:
        self._engine = engine
        self.num_steps, self.seconds = 0, 0.0

    @property
    def ms_per_step(self) -> float:
        """Mean of those measured."""
        return self.seconds / self.num_steps * 1e3

    def measure(self, num_steps: int, least_s: float) -> None:
        """Run so many steps, and for so many seconds, at least; the engine is idle afterwards."""
        request = {"prompt": "Count from 1 to 99", "max_new_tokens": self._engine.max_seq_len // 2, "ignore_eos": True}
        ids = [self._engine.add_request(GenerationRequest(**request)) for _ in range(_NUM_ROWS)]
        for _ in range(_NUM_WARM_STEPS):
            self._engine.step()
        start, num_done, seconds = time.perf_counter(), 0, 0.0
        while (num_done < num_steps or seconds < least_s) and self._engine.scheduler.has_pending_work:
            self._engine.step()
            num_done, seconds = num_done + 1, time.perf_counter() - start
        for request_id in ids:
            self._engine.abort(request_id)
        self.num_steps, self.seconds = self.num_steps + num_done, self.seconds + seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--intervals-ms", type=float, nargs="+", default=[5, 1, 0.2])
    parser.add_argument("--steps", type=int, default=150, help="to measure at least, each time")
    parser.add_argument("--seconds", type=float, default=0, help="to measure at least, each time")
    parser.add_argument("--rounds", type=int, default=1, help="in turn, so that all meet the same load of the machine")
    options = parser.parse_args()
    torch.set_num_threads(1)
    engine = ContinuousBatchingEngine.from_pretrained("configs/demo", device="cpu", progress=False)
    alone = Decodes(engine)
    alone.measure(options.steps, options.seconds)
    body = json.dumps(list(range(600)))
    is_over = threading.Event()

    def parse() -> None:
        while not is_over.is_set():
            json.loads(body)

    thread = threading.Thread(target=parse)
    thread.start()
    beside = {interval_ms: Decodes(engine) for interval_ms in options.intervals_ms}
    for _ in range(options.rounds):
        for interval_ms, decodes in beside.items():
            sys.setswitchinterval(interval_ms / 1e3)
            decodes.measure(options.steps, options.seconds)
    is_over.set()
    thread.join()
    for interval_ms, decodes in beside.items():
        figures = {"alone_ms": round(alone.ms_per_step, 2), "ms_per_step": round(decodes.ms_per_step, 2)}
        print(json.dumps({"interval_ms": interval_ms, **figures}))


if __name__ == "__main__":
    main()
