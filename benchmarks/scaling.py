"""How a fleet grows: throughput, a real trace, replicas that die and autoscaling, from one replica to many.

    python -m benchmarks.scaling --model DIR                              # one replica for each GPU that is here
    python -m benchmarks.scaling --emulated --counts 1 2 4 8 16           # no GPU: engines that make letters at a pace
    python -m benchmarks.scaling … --trace mooncake_conversation.jsonl    # adds the row of routing policies
    python -m benchmarks.scaling --plot scaling.jsonl --out scaling.png   # draws what was measured

One JSON line a row, on the screen and in `--results`:

- `throughput`, for each number of replicas: mixed lengths, closed loop, `--streams` a replica, one router for two
  replicas, HAProxy in front. `linear` is the share of what the first row promises; `cores` what each kind of process
  used, in CPU cores.
- `trace`: a Mooncake trace at shares of what the fleet can carry, under each routing policy, beside what the routing
  simulator says of the same requests at the same pace (`benchmarks.routing_sim`).
- `faults`: open loop at 60% while a replica is killed every 20 s.
- `autoscaling`: from one replica to all on a step in load.

`benchmarks.random_checkpoint` makes a checkpoint of a known shape with random weights.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.scaling_cores import CoreMeter
from benchmarks.scaling_prediction import emulated_speed, predict
from chaos.fleet import Fleet, Place, cluster, emulated, num_serving
from chaos.streams import Clients
from deployments.config import PolicyName
from deployments.model_config import EmulationConfig

_PARTS = ("throughput", "trace", "faults", "autoscaling")
_KILL_EVERY_S = 20.0
_GOODPUT = "ttft:500,tpot:25"
_START_TIMEOUT_S = 300.0
_NAME = "demo"
"""What clients call the model, whichever it is."""


class ScalingRun:
    """Measures one machine's fleets, one after the other.

    Args:
        options: the command line.
        place: address of the front end behind which the fleets are started; or one that runs, which is measured at
            each number of replicas, for tests.
    """

    def __init__(self, options: argparse.Namespace, place: Place) -> None:
        self._options = options
        self._place = place
        self._rows: list[dict[str, Any]] = []
        self._num_fleets = 0

    def run(self) -> None:
        """Measure the parts that were asked for."""
        for part in self._options.parts:
            getattr(self, part)()

    def throughput(self) -> None:
        """Tokens a second at each number of replicas."""
        for count in self._options.counts:
            with self._fleet(count) as fleet:
                self._bench(fleet, "--concurrency", count, "--num-requests", 2 * count, *self._mixed())  # warm
                with CoreMeter(fleet) as meter:
                    result = self._closed_loop(fleet, count)
            first = next((row for row in self._rows if row["part"] == "throughput"), None)
            rate = result["output_tokens_per_s"]
            linear = rate / count / (first["output_tokens_per_s"] / first["replicas"]) if first else 1.0
            self._emit("throughput", count, output_tokens_per_s=rate, linear=round(linear, 3), cores=meter.cores,
                       **_latencies(result))  # fmt: skip

    def trace(self) -> None:
        """Routing policies on a trace, measured and predicted."""
        count = max(self._options.counts)
        with self._fleet(count) as fleet:
            capacity = self._bench(
                fleet, *self._trace(speed=1e6), "--num-requests", self._options.streams * count * 2
            )["request_throughput"]  # fmt: skip
        for load in self._options.loads:
            for policy in self._options.policies:
                num_requests = max(1, round(capacity * load * self._options.seconds))
                with self._fleet(count, router_policy=policy) as fleet:
                    before = _prompt_tokens(fleet)
                    speed = capacity * load / self._trace_rate(num_requests)
                    result = self._bench(
                        fleet, *self._trace(speed), "--num-requests", num_requests, "--goodput", _GOODPUT
                    )  # fmt: skip
                    found, total = (after - former for after, former in zip(_prompt_tokens(fleet), before, strict=True))
                predicted = predict(
                    self._options.trace, num_requests=num_requests, time_scale=1 / speed, policy=policy,
                    num_replicas=count, num_routers=_num_routers(count), speed=self._speed(),
                    max_prompt=self._options.max_input_tokens,
                )  # fmt: skip
                self._emit("trace", count, policy=str(policy), load=load, requests_per_s=result["request_throughput"],
                           goodput=result["request_goodput"], hit_rate=round(found / max(1, total), 3),
                           **_latencies(result), predicted=predicted)  # fmt: skip

    def faults(self) -> None:
        """A replica killed every 20 s."""
        count = max(self._options.counts)
        if count < 2:
            return
        with self._fleet(count) as fleet:
            full = self._closed_loop(fleet, count)
            rate = 0.6 * full["request_throughput"]
            kills = 0

            def kill() -> None:
                nonlocal kills
                if num_serving(_stats(fleet)) == count:  # one at a time, however long a machine takes to start another
                    fleet.hurt_one(9)
                    kills += 1

            with self._every(self._options.kill_every_s, kill):
                result = self._bench(
                    fleet, "--rate", f"{rate:.3f}", "--duration-s", self._options.fault_seconds, "--save-requests",
                    *self._mixed(),
                )  # fmt: skip
        pauses = sorted(max(request["gaps_s"], default=0.0) for request in result["requests"])
        self._emit("faults", count, killed=kills, streams=len(pauses), lost=result["failed"] + result["refused"],
                   pause_p99_s=round(pauses[int(0.99 * (len(pauses) - 1))], 3),
                   output_tokens_per_s=result["output_tokens_per_s"],
                   undisturbed_tokens_per_s=round(0.6 * full["output_tokens_per_s"], 1))  # fmt: skip

    def autoscaling(self) -> None:
        """From one replica to all."""
        count = max(self._options.counts)
        if count < 2:
            return
        autoscaling = {"min_replicas": 1, "max_replicas": count, "target_waiting_tokens": 4096, "target_row_use": 0.5}
        with self._fleet(count, autoscaling=autoscaling) as fleet, ThreadPoolExecutor(1) as pool:
            ready = pool.submit(asyncio.run, _wait_for_replicas(fleet, count))
            results = [self._closed_loop(fleet, count)]
            while not ready.done():  # the load lasts until it is answered, on a slow machine too
                results.append(self._closed_loop(fleet, count))
        first = results[0]
        self._emit("autoscaling", count, all_serve_after_s=ready.result(),
                   failed=sum(result["failed"] for result in results),
                   refused=sum(result["refused"] for result in results),
                   output_tokens_per_s=first["output_tokens_per_s"], **_latencies(first))  # fmt: skip

    @contextmanager
    def _fleet(
        self, count: int, *, router_policy: PolicyName = PolicyName.COST, autoscaling: dict[str, Any] | None = None
    ) -> Iterator[Fleet]:
        """A fleet that serves, taken away afterwards."""
        if isinstance(self._place, Fleet):
            yield self._place
            return
        self._num_fleets += 1
        fleet = Fleet(self._place, f"f{self._num_fleets}")
        fleet.deploy(self._arguments(count, router_policy, autoscaling))
        try:
            asyncio.run(_wait_for_replicas(fleet, 1 if autoscaling else count))
            yield fleet
        finally:
            fleet.delete()

    def _arguments(self, count: int, policy: PolicyName, autoscaling: dict[str, Any] | None) -> dict[str, Any]:
        options = self._options
        replicas = {"num_replicas": count, "num_cpus": 0.1, "num_gpus": 1, "autoscaling": autoscaling}
        router = {"num_replicas": _num_routers(count), "num_cpus": 0.1, "policy": policy}
        shared = {"served_model_name": _NAME, "replicas": replicas, "router": router,
                  "admission": {"max_queue_s": 3600.0}}  # fmt: skip
        if options.emulated:
            pace = EmulationConfig(
                tokens_per_s=options.emulated_tokens_per_s, prefill_tokens_per_s=50_000, max_seq_len=20_000
            )
            engine = {"max_batch_size": options.streams, "num_pages": 65_536}
            return emulated(count, **shared, engine=engine, emulation=pace.model_dump())
        engine = {"max_batch_size": options.streams, "max_seq_len": options.max_input_tokens + 2048}
        return {"model": str(options.model), "engine": engine, **shared}

    def _closed_loop(self, fleet: Fleet, count: int) -> dict[str, Any]:
        options = self._options
        return self._bench(
            fleet, "--concurrency", options.streams * count, "--num-requests",
            options.requests * options.streams * count, *self._mixed(),
        )  # fmt: skip

    def _mixed(self) -> list[str]:
        return ["--input-tokens", self._options.lengths, "--output-tokens", self._options.lengths]

    def _trace(self, speed: float) -> list[str]:
        return ["--trace", str(self._options.trace), "--trace-format", "mooncake", "--speed", f"{speed:.6f}",
                "--max-input-tokens", str(self._options.max_input_tokens), "--max-output-tokens", "2000"]  # fmt: skip

    def _trace_rate(self, num_requests: int) -> float:
        """Requests a second of the trace's beginning, as it was recorded."""
        with self._options.trace.open(encoding="utf-8") as file:
            times = [json.loads(line)["timestamp"] for line, _ in zip(file, range(num_requests), strict=False)]
        return len(times) / max((times[-1] - times[0]) / 1000, 1e-3)

    def _bench(self, fleet: Fleet, *arguments: object) -> dict[str, Any]:
        """A run of `rayline bench` to its end."""
        return self._start_bench(fleet, *arguments)()

    def _start_bench(self, fleet: Fleet, *arguments: object) -> Callable[[], dict[str, Any]]:
        """A run of `rayline bench`; call what is returned to wait for its result.

        Raises:
            RuntimeError: it failed.
        """
        out = Path(tempfile.mkdtemp(prefix="scaling-")) / "result.json"
        token_ids = "97-122" if self._options.emulated else "10-9999"
        self._num_fleets += 1  # another seed for each run: no prompt is in a prefix cache by accident
        command = [sys.executable, "-m", "deployments.bench", "run", "--url", f"{fleet.url}/v1", "--model", _NAME,
                   "--token-ids", token_ids, "--ignore-eos", "--processes", str(self._options.clients),
                   "--seed", str(self._num_fleets), "--out", str(out), *(str(a) for a in arguments)]  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

        def result() -> dict[str, Any]:
            printed, _ = process.communicate()
            if process.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{printed[-3000:]}")
            measured: dict[str, Any] = json.loads(out.read_text())
            return measured

        return result

    @contextmanager
    def _every(self, seconds: float, action: Callable[[], None]) -> Iterator[None]:
        """Do something again and again, in a thread, while the body runs."""
        import threading

        over = threading.Event()

        def repeat() -> None:
            while not over.wait(seconds):
                action()

        thread = threading.Thread(target=repeat)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _speed(self) -> Any:
        """What the simulator is to assume of a replica; None for an 8B model on an H200."""
        options = self._options
        return emulated_speed(options.emulated_tokens_per_s, 50_000, options.streams) if options.emulated else None

    def _emit(self, part: str, count: int, **figures: Any) -> None:
        row = {"part": part, "replicas": count, "routers": _num_routers(count), "streams": self._options.streams,
               "engine": "emulated" if self._options.emulated else self._options.model.name, **figures}  # fmt: skip
        self._rows.append(row)
        print(json.dumps(row), flush=True)
        with self._options.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _prompt_tokens(fleet: Fleet) -> tuple[int, int]:
    """Tokens of prompts so far that were found in prefix caches, and all of them."""
    replicas = _stats(fleet)["replicas"].values()
    found = sum(replica["num_cached_prompt_tokens"] for replica in replicas)
    return found, sum(replica["num_prompt_tokens"] for replica in replicas)


def _stats(fleet: Fleet) -> dict[str, Any]:
    async def ask() -> dict[str, Any]:
        async with Clients(fleet.url) as clients:
            return dict(await clients.get("/rayline/stats"))

    return asyncio.run(ask())


async def _wait_for_replicas(fleet: Fleet, count: int) -> float:
    async with Clients(fleet.url) as clients:
        return round(
            await fleet.wait_for(
                clients, lambda stats: num_serving(stats) >= count, _START_TIMEOUT_S, f"{count} replicas serve"
            ),
            1,
        )


def _num_routers(count: int) -> int:
    return (count + 1) // 2


def _latencies(result: dict[str, Any]) -> dict[str, Any]:
    return {
        "ttft_p50_ms": result["ttft_ms"]["p50"],
        "ttft_p99_ms": result["ttft_ms"]["p99"],
        "ttft_mean_ms": result["ttft_ms"]["mean"],
        "tpot_p50_ms": result["tpot_ms"]["p50"] if result["tpot_ms"] else None,
    }


def plot(results: Path, out: Path) -> None:
    """Draw tokens a second against replicas, a line for each engine."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["part"] == "throughput"]
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for engine in dict.fromkeys(row["engine"] for row in rows):
        own = [row for row in rows if row["engine"] == engine]
        counts = [row["replicas"] for row in own]
        axes.plot(counts, [row["output_tokens_per_s"] for row in own], marker="o", label=engine)
        first = own[0]["output_tokens_per_s"] / counts[0]
        axes.plot(counts, [first * count for count in counts], linestyle=":", color="gray")
    axes.set(xlabel="replicas", ylabel="output tokens/s", xticks=sorted({row["replicas"] for row in rows}))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, dpi=150)


def _default_counts(num_gpus: int) -> list[int]:
    return [count for count in (1, 2, 4, 8, 16) if count <= num_gpus] or [1]


def _num_gpus() -> int:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return 0
    return len(listed.stdout.splitlines())


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, with what it leaves out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="checkpoint to serve")
    parser.add_argument(
        "--emulated", action="store_true", help="engines that make letters, and GPUs that Ray only counts"
    )
    parser.add_argument("--emulated-tokens-per-s", type=float, default=20.0, help="of each emulated stream")
    parser.add_argument(
        "--counts", type=int, nargs="+", help="numbers of replicas; by default 1, 2, 4 … up to the GPUs"
    )
    parser.add_argument("--parts", nargs="+", choices=_PARTS, default=list(_PARTS))
    parser.add_argument("--streams", type=int, default=256, help="streams a replica")
    parser.add_argument("--requests", type=int, default=2, help="requests for each stream of a closed loop")
    parser.add_argument("--lengths", default="100-1024", help="tokens in and out")
    parser.add_argument("--trace", type=Path, help="Mooncake trace")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.6, 0.9], help="of the trace: shares of capacity")
    parser.add_argument("--policies", type=PolicyName, nargs="+", default=list(PolicyName), help="of the trace")
    parser.add_argument("--max-input-tokens", type=int, default=14_000)
    parser.add_argument("--seconds", type=float, default=60, help="of the trace, for each policy and load")
    parser.add_argument("--fault-seconds", type=float, default=180)
    parser.add_argument("--kill-every-s", type=float, default=_KILL_EVERY_S)
    parser.add_argument("--clients", type=int, default=max(1, (os.cpu_count() or 2) // 4), help="client processes")
    parser.add_argument("--plain-proxy", action="store_true", help="Serve's own proxy, not HAProxy")
    parser.add_argument("--results", type=Path, default=Path("scaling.jsonl"))
    parser.add_argument("--plot", type=Path, metavar="RESULTS", help="draw these results instead of measuring")
    parser.add_argument("--out", type=Path, default=Path("scaling.png"), help="of --plot")
    options = parser.parse_args(arguments)
    if options.plot is not None:
        return options
    if not options.emulated and options.model is None:
        parser.error("give --model DIR, or --emulated")
    options.num_gpus = max(options.counts or [1]) if options.emulated else _num_gpus()
    if not options.num_gpus:
        parser.error("there is no GPU here; --emulated measures everything but the engines")
    options.counts = options.counts or _default_counts(options.num_gpus)
    if options.trace is None and "trace" in options.parts:
        options.parts.remove("trace")
    return options


def main() -> None:
    """Measure, or draw."""
    options = parse()
    if options.plot is not None:
        plot(options.plot, options.out)
        return
    with cluster(options.num_gpus, haproxy=not options.plain_proxy) as front_end:
        ScalingRun(options, front_end).run()


if __name__ == "__main__":
    main()
