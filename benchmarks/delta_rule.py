"""The gated delta rule's kernels by themselves, of one layer, in the shape of Qwen3.6 27B.

    python -m benchmarks.delta_rule [--sweep] [--prefills]

One JSON line for each step: microseconds of each kernel, and what the rule reads and writes a second. Of prompts,
"rule" walks token by token and "chunks" works 64 out at once. `--sweep` tries other numbers of rows and warps for a
program of the rule, and of values for one of the chunks; `--prefills` leaves decodes out. Needs a GPU.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial

import torch
from triton.testing import do_bench_cudagraph

from llm.core.recurrent_state import DeltaSpec, RecurrentState
from llm.kernels import delta_chunks, delta_rule
from llm.kernels.attention.work import StepParts

SPEC = DeltaSpec(16, 48, 128, 128, 4)
STEPS = {
    "decodes": [(rows, 1) for rows in (1, 16, 64, 256)],
    "prefills": [(64, 128), (1, 2048), (4, 2048), (1, 8192), (64, 2048)],
}
DTYPE = torch.bfloat16
CHUNK = delta_chunks.CHUNK
CHUNK_VALUES = 16, 64, 128
"""Of a head, in a program of the chunks."""


def ints(numbers: list[int]) -> torch.Tensor:
    """On the device."""
    return torch.tensor(numbers, dtype=torch.int32, device="cuda")


def kernels_of(num_rows: int, num_new: int) -> dict[str, Callable[[], None]]:
    """A step of so many parts with as many new tokens each, in sequences that have begun; by the kernels' names."""
    num_tokens = num_rows * num_new
    width = SPEC.conv_size + SPEC.output_size
    mixed, convolved, output = (
        torch.randn(num_tokens, size, device="cuda", dtype=DTYPE) for size in (width, SPEC.conv_size, SPEC.output_size)
    )
    decay = torch.randn(num_tokens, 2 * SPEC.num_value_heads, device="cuda", dtype=DTYPE)
    weight = torch.randn(SPEC.conv_size, 1, SPEC.kernel_size, device="cuda", dtype=DTYPE)
    norm, rates = torch.ones(SPEC.value_dim, device="cuda", dtype=DTYPE), torch.zeros(48, device="cuda")
    state = RecurrentState.zeros(SPEC, num_rows, "cuda", DTYPE)
    rows = list(range(num_rows))
    token_rows = ints(rows).repeat_interleave(num_new)
    positions = ints(list(range(100, 100 + num_new))).repeat(num_rows)
    starts, lens, ends = [row * num_new for row in rows], [num_new] * num_rows, [100 + num_new] * num_rows
    parts = StepParts(ints(rows), ints(starts), ints(lens), ints(ends))

    arguments = SPEC, convolved, decay, rates, rates.to(DTYPE), state.matrix, parts, output
    chunks = {"chunks": lambda: delta_chunks.gated_delta_chunks(*arguments)} if num_new >= CHUNK else {}
    for num_values in CHUNK_VALUES if chunks else ():
        chunks[f"chunks, {num_values} values"] = partial(
            delta_chunks.gated_delta_chunks, *arguments, num_values=num_values
        )
    return {
        "convolution": lambda: delta_rule.short_convolution(
            mixed, weight, state.tail, token_rows, positions, convolved
        ),
        "tails": lambda: delta_rule.store_tails(mixed, state.tail, parts),
        "rule": lambda: delta_rule.gated_delta_rule(*arguments),
        **chunks,
        "norm": lambda: delta_rule.gate_by_norm(SPEC, mixed, norm, 1e-6, output),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--prefills", action="store_true")
    arguments = parser.parse_args()
    tiles = [(8, 1)]
    if arguments.sweep:
        tiles += [(4, 1), (16, 1), (32, 1), (4, 4), (8, 4), (16, 2)]
    matrix_bytes = 2 * 4 * SPEC.output_size * SPEC.key_dim
    for kind, steps in STEPS.items():
        if arguments.prefills and kind != "prefills":
            continue
        for num_rows, num_new in steps:
            for values, num_warps in tiles:
                delta_rule._VALUES, delta_rule._NUM_WARPS = values, num_warps
                kernels = kernels_of(num_rows, num_new)
                if not arguments.sweep:
                    kernels = {name: run for name, run in kernels.items() if "values" not in name}
                names = list(kernels) if (values, num_warps) == tiles[0] else ["rule"]
                taken = {name: round(1000 * do_bench_cudagraph(kernels[name]), 1) for name in names}
                rate = round(num_rows * matrix_bytes / taken["rule"] / 1000, 1)
                row = {"step": kind, "rows": num_rows, "tokens": num_new, "values": values, "warps": num_warps}
                print(json.dumps({**row, "us": taken, "matrices_gb_s": rate}), flush=True)


if __name__ == "__main__":
    main()
