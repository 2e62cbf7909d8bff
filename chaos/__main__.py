"""Run faults against a fleet on this machine and print what came of each.

python -m chaos [F1 F5 …] [--list] [--json FILE]
python -m chaos F1-GPU F25-GPU      need two GPUs
python -m chaos F13-GPU     needs one
"""

import argparse
import asyncio
import json
import logging
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from chaos import (
    channel_faults,
    client_faults,
    command_faults,
    embedding_faults,
    engine_faults,
    faults,
    input_faults,
    nodes,
    rank_faults,
    scaling_faults,
    verdict_faults,
)
from chaos.fleet import Outcome, cluster

FAULTS: dict[str, list[Callable[[str], Awaitable[Outcome]]]] = {
    "F1": [faults.f1_kill_replicas, faults.f1_kill_demo],
    "F2": [faults.f2_nobody_left],
    "F3": [faults.f3_before_the_first_byte],
    "F4": [engine_faults.f4_forward_fails],
    "F5": [faults.f5_hang],
    "F6": [faults.f6_update_and_scale],
    "F7": [faults.f7_disconnects],
    "F8": [faults.f8_overload],
    "F9": [engine_faults.f9_small_pool],
    "F10": [nodes.f10_nodes_removed],
    "F11": [faults.f11_control_plane],
    "F13": [verdict_faults.f13_steps_fail, verdict_faults.f13_demo],
    "F14": [verdict_faults.f14_engine_breaks],
    "F15": [verdict_faults.f15_poison_kills, verdict_faults.f15_poison_hangs],
    "F16": [channel_faults.f16_router_killed, channel_faults.f16_router_stopped],
    "F17": [channel_faults.f17_frame_lost],
    "F18": [verdict_faults.f18_update_of_the_model],
    "F19": [channel_faults.f19_router_stuck],
    "F20": [channel_faults.f20_strangers],
    "F21": [client_faults.f21_clients_that_never_read, client_faults.f21_behind_haproxy],
    "F22": [embedding_faults.f22_embedding_hangs],
    "F23": [command_faults.f23_behind_haproxy, command_faults.f23_behind_serves_proxy],
    "F24": [scaling_faults.f24_scaled_to_zero],
    "F25": [rank_faults.f25_rank_killed, rank_faults.f25_rank_stopped],
    "INPUTS": [input_faults.bad_inputs],
}
GPU_FAULTS: dict[str, list[Callable[[str], Awaitable[Outcome]]]] = {
    "F1-GPU": [faults.f1_kill_on_gpus, faults.f1_kill_in_bfloat16],
    "F13-GPU": [verdict_faults.f13_on_a_gpu],
    "F25-GPU": [rank_faults.f25_on_gpus],
}
"""Run only where they are named."""
BEHIND_HAPROXY = {"F16"}
"""Run in a process of their own, for which front end there is is decided when Ray is first imported."""
SIDE_BY_SIDE = {"F21", "F24"}
"""Run at the same time, last: all that they do for most of a minute is wait."""
_NUM_GPUS = 2


def main() -> None:
    """Parse the command line, run the faults, exit with 1 if one did what it must not."""
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="F1", help="faults to run; all that need no GPU, if none is named")
    parser.add_argument("--list", action="store_true", help="list the faults")
    parser.add_argument("--haproxy", action="store_true", help="put HAProxy in front, not Serve's own proxy")
    parser.add_argument("--json", type=Path, help="append one JSON line a fault to this file")
    options = parser.parse_args()
    known = {**FAULTS, **GPU_FAULTS}
    if options.list:
        for name, functions in known.items():
            print(f"{name:6} {' '.join((functions[0].__doc__ or '').split())}")
        return
    unknown = [name for name in options.names if name not in known]
    if unknown:
        parser.error(f"no such fault: {', '.join(unknown)}; there are {', '.join(known)}")
    logging.disable(logging.WARNING)
    names = options.names or list(FAULTS)
    elsewhere = [] if options.haproxy else [name for name in names if name in BEHIND_HAPROXY]
    here = [name for name in names if name not in elsewhere]
    results: list[bool] = []
    if here:
        num_gpus = _NUM_GPUS if any(name in GPU_FAULTS for name in here) else 0
        with cluster(num_gpus, haproxy=options.haproxy) as front_end:
            for name in here:
                if name not in SIDE_BY_SIDE:
                    results += _run_all(name, front_end, options.json)
            waiting = [name for name in here if name in SIDE_BY_SIDE]
            with ThreadPoolExecutor(len(SIDE_BY_SIDE)) as pool:
                for several in pool.map(lambda name: _run_all(name, front_end, options.json), waiting):
                    results += several
    if elsewhere:
        results.append(_run_behind_haproxy(elsewhere, options.json))
    sys.exit(0 if all(results) else 1)


def _run_behind_haproxy(names: list[str], path: Path | None) -> bool:
    """Run faults in another process, whose front end is HAProxy."""
    json_option = ["--json", str(path)] if path is not None else []
    command = [sys.executable, "-m", "chaos", *names, "--haproxy", *json_option]
    return subprocess.run(command, check=False).returncode == 0


def _run_all(name: str, front_end: str, path: Path | None) -> list[bool]:
    """Run the functions of one fault, one after the other."""
    return [_run(name, function, front_end, path) for function in {**FAULTS, **GPU_FAULTS}[name]]


def _run(name: str, function: Callable[[str], Awaitable[Outcome]], front_end: str, path: Path | None) -> bool:
    """Run one fault and print its line."""
    started = time.monotonic()
    print(f"{name:6} …", end="", flush=True, file=sys.stderr)
    try:
        outcome = asyncio.run(function(front_end))  # type: ignore[arg-type]
    except Exception as error:  # noqa: BLE001 - one fault that cannot be tried does not keep the others from it
        outcome = Outcome(f"{type(error).__name__}: {error}", False)
    seconds = time.monotonic() - started
    print("\r", end="", file=sys.stderr)
    print(f"{name:6} {'ok    ' if outcome.is_ok else 'FAILED'} {outcome.figure} [{seconds:.0f} s]", flush=True)
    if path is not None:
        row = {"fault": name, "function": function.__name__, "ok": outcome.is_ok, "figure": outcome.figure}
        with path.open("a") as file:
            file.write(json.dumps({**row, "seconds": round(seconds, 1)}) + "\n")
    return outcome.is_ok


if __name__ == "__main__":
    main()
