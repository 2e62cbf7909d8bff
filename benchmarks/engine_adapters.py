"""The engine's rows with adapters: what they cost beside the model alone, and gaps while hundreds rotate."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.engine_rows import NUM_LONG, Row, percentile
from benchmarks.random_adapter import write_random_adapter
from llm.checkpoint.adapter_digest import adapter_digest
from llm.checkpoint.model_config import load_model_config
from llm.schemas import AdapterRef

RunAdapted = Callable[[list[int], list[int], Sequence[int | None]], float]
"""Seconds for requests of these input and output lengths with these adapters, all handed over at once."""


class Steps(Protocol):
    """An engine that hands over what each step gives."""

    def add(self, input_len: int, output_len: int, adapter: AdapterRef | None) -> str:
        """Hand a request over."""
        ...

    def step(self) -> list[str]:
        """Run a step; the requests that got tokens."""
        ...


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of both engines' benchmarks."""
    parser.add_argument("--adapters", type=int, default=0, metavar="N", help="rows with so many random adapters")
    parser.add_argument("--adapter-rank", type=int, default=16, metavar="RANK", help="their rank")
    parser.add_argument("--num-long", type=int, default=NUM_LONG, metavar="N", help="requests of the row 1000/1000")


def write_adapters(model: str, directory: Path, num_adapters: int, rank: int) -> list[Path]:
    """Write random adapters in 16 bits on every projection of a model of this shape."""
    config = load_model_config(Path(model))
    paths = [directory / f"adapter-{i}" for i in range(num_adapters)]

    def write(seed: int) -> None:
        write_random_adapter(config, paths[seed], rank=rank, seed=seed, dtype=torch.bfloat16)

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, range(num_adapters)))
    return paths


def adapter_rows(run: RunAdapted, num_adapters: int, rank: int, scale: int = 1) -> Iterator[Row]:
    """Decoding with adapters beside decoding without, in the same engine."""
    num_requests, num_steps = 64 // scale, 256 // scale

    def decode(adapters: Sequence[int | None]) -> float:
        lens = [128 // scale] * num_requests
        run(lens, [8] * num_requests, adapters)
        prefill = run(lens, [1] * num_requests, adapters)
        return run(lens, [1 + num_steps] * num_requests, adapters) - prefill

    def measure() -> dict[str, Any]:
        plain = decode([None] * num_requests)
        seconds = decode([i % num_adapters for i in range(num_requests)])
        num_tokens = num_requests * num_steps
        return {
            "output_tok_s": round(num_tokens / seconds), "base_output_tok_s": round(num_tokens / plain),
            "ms_per_step": round(seconds / num_steps * 1e3, 3), "ratio": round(plain / seconds, 3),
        }  # fmt: skip

    yield Row(f"adapters: {num_requests} rows over {num_adapters} of rank {rank}", measure)


def adapter_refs(paths: Sequence[Path]) -> list[AdapterRef]:
    """The adapters in these directories."""
    with ThreadPoolExecutor() as pool:
        digests = pool.map(adapter_digest, paths)
        return [
            AdapterRef(name=path.name, path=str(path), digest=digest)
            for path, digest in zip(paths, digests, strict=True)
        ]


def copies_of(paths: Sequence[Path], num_copies: int) -> list[AdapterRef]:
    """Adapters of other digests with these weights, which are linked to."""
    copies = []
    for i in range(num_copies):
        path = paths[i % len(paths)]
        copy = path.with_name(f"copy-{i}")
        copy.mkdir()
        settings = json.loads((path / "adapter_config.json").read_text())
        (copy / "adapter_config.json").write_text(json.dumps({**settings, "revision": str(i)}))
        (copy / "adapter_model.safetensors").symlink_to(path / "adapter_model.safetensors")
        copies.append(copy)
    return adapter_refs(copies)


def rotation_row(steps: Steps, paths: Sequence[Path], num_rotating: int, scale: int = 1) -> Row:
    """Gaps between the tokens of streams without adapters while requests for as many new adapters go by."""

    def measure() -> dict[str, Any]:
        copies = copies_of(paths, num_rotating // scale)
        streams = {steps.add(128 // scale, 100_000, None) for _ in range(32 // scale)}
        for _ in range(40):
            steps.step()
        rotating = {steps.add(16, 8, adapter) for adapter in copies}
        last: dict[str, float] = {}
        gaps: list[float] = []
        start = time.perf_counter()
        left = set(rotating)
        num_left = dict.fromkeys(rotating, 8)
        while left:
            progressed = steps.step()
            now = time.perf_counter()
            for request_id in progressed:
                if request_id in streams:
                    gaps += [now - last[request_id]] if request_id in last else []
                    last[request_id] = now
                elif request_id in left:
                    num_left[request_id] -= 1
                    if not num_left[request_id]:
                        left.remove(request_id)
                        print(f"{len(rotating) - len(left)} adapters, longest gap {max(gaps):.3f} s", file=sys.stderr)
        return {
            "longest_gap_ms": round(max(gaps) * 1e3, 1), "p99_gap_ms": round(percentile(gaps, 0.99) * 1e3, 2),
            "median_gap_ms": round(percentile(gaps, 0.5) * 1e3, 2),
            "adapters_s": round(len(rotating) / (time.perf_counter() - start), 1),
        }  # fmt: skip

    return Row(f"rotation: {num_rotating} adapters beside 32 streams", measure)
