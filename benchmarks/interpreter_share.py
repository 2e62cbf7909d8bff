"""What a step costs while another thread of the process is busy with Python, by the interpreter's switch interval.

    python -m benchmarks.interpreter_share [--intervals-ms 5 1 0.2]

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


def ms_per_step(engine: ContinuousBatchingEngine, num_steps: int) -> float:
    """Of decode steps; the engine is idle afterwards."""
    num_tokens = _NUM_WARM_STEPS + num_steps + 2
    ids = [
        engine.add_request(GenerationRequest(prompt="Count from 1 to 99", max_new_tokens=num_tokens, ignore_eos=True))
        for _ in range(_NUM_ROWS)
    ]
    for _ in range(_NUM_WARM_STEPS):
        engine.step()
    start = time.perf_counter()
    for _ in range(num_steps):
        engine.step()
    seconds = time.perf_counter() - start
    for request_id in ids:
        engine.abort(request_id)
    return seconds / num_steps * 1e3


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--intervals-ms", type=float, nargs="+", default=[5, 1, 0.2])
    parser.add_argument("--steps", type=int, default=150, help="to measure")
    options = parser.parse_args()
    torch.set_num_threads(1)
    engine = ContinuousBatchingEngine.from_pretrained("configs/demo", device="cpu", progress=False)
    alone = ms_per_step(engine, options.steps)
    body = json.dumps(list(range(600)))
    for interval_ms in options.intervals_ms:
        sys.setswitchinterval(interval_ms / 1e3)
        is_over = threading.Event()

        def parse(is_over: threading.Event = is_over) -> None:
            while not is_over.is_set():
                json.loads(body)

        thread = threading.Thread(target=parse)
        thread.start()
        beside = ms_per_step(engine, options.steps)
        is_over.set()
        thread.join()
        print(json.dumps({"interval_ms": interval_ms, "alone_ms": round(alone, 2), "ms_per_step": round(beside, 2)}))


if __name__ == "__main__":
    main()
