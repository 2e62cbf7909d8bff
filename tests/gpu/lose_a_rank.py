"""Stops or kills a rank of an engine on two GPUs while it works, and prints what came of it as JSON.

    python tests/gpu/lose_a_rank.py DIRECTORY SIGKILL|SIGSTOP

A program of its own: what its GPU is in the middle of when a rank is lost never ends.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from two_gpu_checkpoint import create_requests, make_engine


def runs(pid: int) -> bool:
    """Whether a process is there, and not only its entry until somebody asks how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def main() -> None:
    engine = make_engine(Path(sys.argv[1]), 2)
    engine.generate(create_requests(2), progress=False)
    ranks = engine.rank_process_ids
    for request in create_requests(max_new_tokens=400):
        engine.add_request(request)
    for _ in range(40):
        engine.step()
    os.kill(ranks[0], getattr(signal, sys.argv[2]))
    lost_at = time.monotonic()
    outputs = []
    while engine.scheduler.has_pending_work:
        outputs += engine.step()
    failures = {str(output.step_failure) for output in outputs if output.step_failure is not None}
    result = {"s": round(time.monotonic() - lost_at, 2), "failures": sorted(failures), "why": engine.failure}
    deadline = time.monotonic() + 20  # the system frees the memory of a killed process's GPU first
    while (left := [pid for pid in ranks if runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    result["left"] = left
    print(json.dumps(result), flush=True)
    os._exit(0)  # the device is busy for ever


if __name__ == "__main__":
    main()
