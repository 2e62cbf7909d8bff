"""Where the time of a step goes: on the device by kind of kernel, on the host by phase."""

import time
from collections import Counter
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from benchmarks.engine import Bench

_KINDS = {
    "attention": ("_paged_decode", "_merge_chunks", "_paged_prefill", "_plan_work", "_hopper_prefill", "_gather"),
    "matrix products": (
        "tile_product",
        "single_row_product",
        "nvjet",
        "gemm",
        "cutlass",
        "xmma",
        "splitk",
        "scaled_mm",
    ),
    "norm, rope, activation, embedding": (
        "_rms_norm",
        "_rope_and_store",
        "_activate_gated",
        "_embed_tokens",
        "quantize",
        "_scale_rows",
    ),
    "sums over GPUs": ("_all_reduce", "_chunked_gather", "nccl"),
    "sampling": ("_prepare", "_best_of"),
}
_NUM_STEPS = 20


def profile(bench: "Bench", batches: list[int], context_len: int, scale: int = 1) -> None:
    """Print the table for decode steps of these batch sizes behind so many tokens, and for a prefill step."""
    for batch in batches:
        lens = [max(context_len // scale, 1)] * max(batch // scale, 1)
        _profile_steps(bench, f"decode, batch {batch}, behind {context_len} tokens", lens, 64 + sum(lens) // 1000)
    _profile_steps(bench, "prefill, 8 x 2048", [2048 // scale] * 8, 1)


def _profile_steps(bench: "Bench", title: str, input_lens: list[int], num_out: int) -> None:
    """Run once to warm up, once on the host's clock, once under the profiler."""
    bench.run(input_lens, [num_out] * len(input_lens))
    host, wall, num_steps = _host_times(bench, input_lens, num_out)
    on_gpu = torch.cuda.is_available()
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    prompts = [bench.prompt(length) for length in input_lens]
    for prompt in prompts:
        bench.add(prompt, num_out)
    if num_out > 1:  # past the prompts, into steps that are all alike
        bench.read_prompts()
        for _ in range(5):
            bench.engine.step()
    with torch.profiler.profile(activities=[activity]) as profiler:
        num_profiled = 0
        while bench.engine.scheduler.has_pending_work and num_profiled < _NUM_STEPS:
            bench.engine.step()
            num_profiled += 1
        if on_gpu:
            torch.cuda.synchronize()
    while bench.engine.scheduler.has_pending_work:
        bench.engine.step()
    kernels = [
        (event.key, event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count)
        for event in profiler.key_averages()
    ]
    _print(title, kernels, num_profiled, host, wall, num_steps)


def _host_times(bench: "Bench", input_lens: list[int], num_out: int) -> tuple[Counter[str], float, int]:
    """Seconds on the host by phase, seconds in all, steps; over the second half of a run, without the prompts."""
    engine = bench.engine
    times: Counter[str] = Counter()
    for length in input_lens:
        bench.add(bench.prompt(length), num_out)
    if num_out > 1:
        bench.read_prompts()
    owners: dict[str, object] = {
        "schedule": engine.scheduler, "pack": engine._packer, "launch": engine.runner, "apply": engine.scheduler,
        "process": engine._outputs,
    }  # fmt: skip
    for name, owner in owners.items():
        setattr(owner, name, _timed(getattr(owner, name), times, name))
    start, num_steps = time.perf_counter(), 0
    while engine.scheduler.has_pending_work:
        engine.step()
        num_steps += 1
    wall = time.perf_counter() - start
    for name, owner in owners.items():
        delattr(owner, name)
    return times, wall, num_steps


def _timed(call, times: Counter[str], name: str):  # type: ignore[no-untyped-def]
    def wrapper(*args, **kwargs):  # type: ignore[no-untyped-def]
        start = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            times[name] += time.perf_counter() - start

    return wrapper


def _print(
    title: str,
    kernels: list[tuple[str, float, int]],
    num_profiled: int,
    host: Counter[str],
    wall: float,
    num_steps: int,
) -> None:
    console = Console(width=120)
    table = Table(title=f"{title}: {wall / num_steps * 1e3:.2f} ms a step without the profiler", title_justify="left")
    table.add_column("kind")
    table.add_column("ms a step", justify="right")
    by_kind: Counter[str] = Counter()
    for name, microseconds, _ in kernels:
        by_kind[_kind(name)] += microseconds
    for kind, microseconds in by_kind.most_common():
        table.add_row(kind, f"{microseconds / num_profiled / 1e3:.3f}")
    for phase, seconds in host.items():
        table.add_row(f"host: {phase}", f"{seconds / num_steps * 1e3:.3f}")
    waiting = wall - sum(host.values())
    table.add_row("host: waiting for the device, and the rest", f"{waiting / num_steps * 1e3:.3f}")
    for name, microseconds, count in sorted(kernels, key=lambda item: -item[1])[:12]:
        per_step = microseconds / num_profiled / 1e3
        table.add_row(f"  {count / num_profiled:.0f} x {microseconds / count:.1f} µs {name[:80]}", f"{per_step:.3f}")
    console.print(table)
    console.print("Kernels that start early wait inside for the one before: their times overlap and add up to more.")


def _kind(kernel: str) -> str:
    for kind, parts in _KINDS.items():
        if any(part in kernel for part in parts):
            return kind
    return "copies and the rest"
