"""A server over HTTP: ours, and vLLM's under the same load on the same machine, one after the other.

    python -m benchmarks.over_http --model benchmarks/models/llama-3.1-8b --routers 2
    python -m benchmarks.over_http --model benchmarks/models/llama-3.1-8b --servers rayline vllm --out http.jsonl

Each server is started, and waited for; then `rayline bench run` sends the mixed row's requests all at once, twice, and
those of one client after that. One JSON line a server. A model without weights gets random ones, kept in `--work-dir`,
which vLLM does not read. vLLM has to be installed beside, or in the Python that `--vllm-python` names. With `--url`, a
server that runs already is measured.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from benchmarks.random_checkpoint import write_checkpoint
from llm.checkpoint.model_config import load_model_config

_CLI = "from deployments.cli import main; main()"
_START_TIMEOUT_S = 600.0
_STOP_TIMEOUT_S = 60.0
_ONE_CLIENT_REQUESTS = 20
_MAX_SEQ_LEN = 4096


class OverHTTP:
    """Measures servers of one model, one at a time.

    Args:
        options: the command line.
        checkpoint: directory of the model, with weights and a tokenizer.
    """

    def __init__(self, options: argparse.Namespace, checkpoint: Path) -> None:
        self._options = options
        self._checkpoint = checkpoint
        self._url: str = options.url or f"http://127.0.0.1:{options.port}"

    def measure(self, server: str) -> dict[str, Any]:
        """One server's row.

        Raises:
            RuntimeError: it did not start; the message says where its output is.
        """
        started = time.monotonic()
        with self._running(server):
            ready_s = time.monotonic() - started
            lens = ["--input-tokens", self._options.lens, "--output-tokens", self._options.lens]
            requests = self._options.requests
            bursts = [
                self._load(server, f"burst-{i}", requests, requests, [*lens, "--processes", "4", "--seed", str(i)])
                for i in range(1, 3)
            ]
            lens = ["--input-tokens", "512", "--output-tokens", "128"]
            one_requests = min(_ONE_CLIENT_REQUESTS, requests)
            one = self._load(server, "one", 1, one_requests, [*lens, "--warmup", "2", "--seed", "9"])
        return {
            "server": server,
            "model": self._options.model.name,
            "ready_s": round(ready_s, 1),
            "output_tok_s": [round(burst["output_tokens_per_s"]) for burst in bursts],
            "ttft_p50_ms": [burst["ttft_ms"]["p50"] for burst in bursts],
            "gap_p50_ms": [burst["itl_ms"]["p50"] for burst in bursts],
            "gap_p99_ms": [burst["itl_ms"]["p99"] for burst in bursts],
            "one_client": {"ttft_p50_ms": one["ttft_ms"]["p50"], "gap_p50_ms": one["itl_ms"]["p50"]},
        }

    @contextlib.contextmanager
    def _running(self, server: str) -> Iterator[None]:
        """The server, ready for requests; ended behind."""
        if self._options.url is not None:
            yield
            return
        log = self._options.work_dir / f"{server}.log"
        command = self.rayline_command() if server == "rayline" else self._vllm_command()
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                self._wait(process, server, log)
                yield
            finally:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(_STOP_TIMEOUT_S)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)

    def rayline_command(self) -> list[str]:
        """What starts ours."""
        settings = {
            "engine.max_seq_len": min(_MAX_SEQ_LEN, load_model_config(self._checkpoint).max_seq_len),
            "router.num_replicas": self._options.routers,
        }
        given = [f"--set={setting}" for setting in self._options.set]
        defaults = [f"--set={name}={value}" for name, value in settings.items()]
        port = ["--port", str(self._options.port)]
        return [sys.executable, "-c", _CLI, "serve", str(self._checkpoint), *port, *defaults, *given]

    def _vllm_command(self) -> list[str]:
        return [
            self._options.vllm_python, "-m", "vllm.entrypoints.cli.main", "serve", str(self._checkpoint),
            "--load-format", "dummy", "--dtype", "bfloat16", "--max-model-len", str(_MAX_SEQ_LEN),
            "--gpu-memory-utilization", "0.9", "--no-enable-prefix-caching", "--host", "127.0.0.1",
            "--port", str(self._options.port), "--served-model-name", self._checkpoint.name,
        ]  # fmt: skip

    def _wait(self, process: "subprocess.Popen[bytes]", server: str, log: Path) -> None:
        path = "/ready" if server == "rayline" else "/health"
        deadline = time.monotonic() + _START_TIMEOUT_S
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(self._url + path, timeout=5).status_code == 200:
                    return
            time.sleep(0.1)
        raise RuntimeError(f"{server} is not ready; what it printed is in {log}")

    def _load(self, server: str, name: str, concurrency: int, num_requests: int, more: list[str]) -> dict[str, Any]:
        """The result of one `rayline bench run`."""
        out = self._options.work_dir / f"{server}-{name}.json"
        command = [
            sys.executable, "-c", _CLI, "bench", "run", "--url", f"{self._url}/v1", "--model", self._checkpoint.name,
            "--concurrency", str(concurrency), "--num-requests", str(num_requests), "--ignore-eos",
            "--temperature", "0.6", "--token-ids", self._options.token_ids, "--out", str(out), *more,
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        result: dict[str, Any] = json.loads(out.read_text())
        return result


def main() -> None:
    """Measure each server, and print."""
    options = parse()
    options.work_dir.mkdir(parents=True, exist_ok=True)
    checkpoint = options.model.resolve()
    if not any(checkpoint.glob("*.safetensors")):
        print(f"random weights of the shape of {checkpoint.name} …", file=sys.stderr)
        checkpoint = write_checkpoint(checkpoint, (options.work_dir / checkpoint.name).resolve())
    bench = OverHTTP(options, checkpoint)
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(options.out.open("a")) if options.out else None
        for server in options.servers:
            line = json.dumps(bench.measure(server))
            print(line, flush=True)
            if out is not None:
                out.write(line + "\n")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, with what it leaves out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory with a config.json (and weights)")
    parser.add_argument("--servers", nargs="+", default=["rayline"], choices=["rayline", "vllm"])
    parser.add_argument("--routers", type=int, default=2, help="routers of ours")
    parser.add_argument("--requests", type=int, default=256, help="of a burst, all at once")
    parser.add_argument("--lens", default="100-1024", help="tokens in and out of a burst's requests")
    parser.add_argument("--token-ids", default="5-9999", help="of the prompts")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of `rayline serve`")
    parser.add_argument("--vllm-python", default=sys.executable, help="a Python that has vLLM")
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument("--url", help="a server that runs already; none is started")
    parser.add_argument("--work-dir", type=Path, default=Path("over_http"), help="for random weights, logs and results")
    parser.add_argument("--out", type=Path, help="file to append the JSON lines to")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
