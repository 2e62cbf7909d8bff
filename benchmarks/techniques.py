"""What a KV cache, grouped queries and a sliding window save, on this machine.

    python -m benchmarks.techniques [--device cpu] [--context 1024] [--new-tokens 32]

One decoder, greedy, a prompt of `--context` tokens and `--new-tokens` more. Latency is the time of the new tokens
alone (the prompt's own is the same for all); memory is what keys and values take: for the baseline without a cache,
the keys and values that each step computes anew. Beside ours stands the inference guide's table. Prints one JSON line
a row, then the table.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from llm.core.kv_cache import KVCache, reset_all_caches
from llm.models.decoder import DecoderModel

_HEADS = 16


@dataclass(frozen=True)
class Technique:
    """One row: a model shape, whether it caches, and what the guide promises relative to the baseline."""

    name: str
    shape: dict[str, int]
    uses_cache: bool
    guide_latency: float
    guide_memory: float


def techniques(context: int) -> list[Technique]:
    """The guide's rows; each adds to the one before."""
    gqa = {"num_kv_heads": _HEADS // 4}
    window = {**gqa, "window_size": context // 8}
    return [
        Technique("baseline", {}, False, 1.0, 1.0),
        Technique("+ KVCache", {}, True, 0.3, 1.0),
        Technique("+ GQA (4:1)", gqa, True, 0.25, 0.25),
        Technique(f"+ sliding window ({context // 8})", window, True, 0.2, 0.15),
    ]


@torch.inference_mode()
def measure(technique: Technique, *, context: int, num_new: int, device: str, repeats: int) -> tuple[float, int]:
    """Median seconds for `num_new` tokens after a prompt of `context`, and bytes of keys and values."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = DecoderModel(
        vocab_size=8192,
        hidden_size=1024,
        num_layers=8,
        num_heads=_HEADS,
        max_seq_len=context + num_new,
        device=device,
        dtype=dtype,
        **technique.shape,
    ).eval()
    prompt = torch.randint(0, 8192, (1, context), device=device)
    caches = model.make_kv_caches(max_batch_size=1)
    generate = _with_cache if technique.uses_cache else _without_cache
    times = [_timed(generate, model, prompt, caches, num_new) for _ in range(repeats + 1)]
    return statistics.median(times[1:]), sum(cache.num_bytes for cache in caches)


def _timed(
    generate: Callable[[DecoderModel, torch.Tensor, list[KVCache], int], float],
    model: DecoderModel,
    prompt: torch.Tensor,
    caches: list[KVCache],
    num_new: int,
) -> float:
    reset_all_caches(caches)
    return generate(model, prompt, caches, num_new)


def _without_cache(model: DecoderModel, prompt: torch.Tensor, caches: list[KVCache], num_new: int) -> float:
    del caches
    tokens = prompt
    start = _now(model)
    for _ in range(num_new):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    return _now(model) - start


def _with_cache(model: DecoderModel, prompt: torch.Tensor, caches: list[KVCache], num_new: int) -> float:
    model(prompt[:, :-1], kv_caches=caches, use_cache=True)
    token = prompt[:, -1:]
    start = _now(model)
    for _ in range(num_new):
        token = model(token, kv_caches=caches, use_cache=True)[:, -1:].argmax(-1)
    return _now(model) - start


def _now(model: DecoderModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    """Measure every row and print them beside the guide's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--context", type=int, default=1024, help="prompt length in tokens")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    table = Table(title=f"Context {options.context}, {options.new_tokens} new tokens, {options.device}")
    for column in ("technique", "ms/token", "latency", "guide", "KV memory", "relative", "guide"):
        table.add_column(column)
    baseline: tuple[float, int] | None = None
    for row in techniques(options.context):
        seconds, num_bytes = measure(
            row, context=options.context, num_new=options.new_tokens, device=options.device, repeats=options.repeats
        )
        baseline = baseline or (seconds, num_bytes)
        result = {
            "technique": row.name,
            "ms_per_token": round(seconds / options.new_tokens * 1e3, 2),
            "latency": round(seconds / baseline[0], 3),
            "guide_latency": row.guide_latency,
            "kv_mib": round(num_bytes / 2**20, 2),
            "memory": round(num_bytes / baseline[1], 3),
            "guide_memory": row.guide_memory,
        }
        print(json.dumps(result), flush=True)
        table.add_row(*(str(value) for value in result.values()))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
