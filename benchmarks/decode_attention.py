"""Decode attention over pages of 16 tokens in 16 bits and in 8, and how fast it reads keys and values.

    python -m benchmarks.decode_attention [--cases 256x1500 384x1500 64x1024 1x32768] [--heads 32/8 16/8]

A case is rows x tokens of context. Prints a JSON line for each: microseconds a call inside a CUDA graph, planning left
out and merging counted in, and the gigabytes of keys and values a second. "8 bits, shared memory" is the kernel that
heads of other sizes than 64, 128 and 256 take. Caches smaller than the second-level cache are read from there.
"""

import argparse
import json
from contextlib import ExitStack
from itertools import product
from unittest.mock import patch

import torch

from benchmarks.gpu_timing import graph_microseconds
from llm.kernels.attention import decode, work
from llm.kernels.attention.decode import PagedDecode
from llm.kernels.attention.work import StepParts, WorkItems, plan_decodes

_PAGE_SIZE = 16
_NUM_CALLS = 10
_DEVICE = torch.device("cuda")


def measure(case: str, heads: str, head_dim: int, dtype: torch.dtype, spread: float) -> dict[str, float]:
    """Microseconds and gigabytes a second of one case."""
    num_rows, mean_len = map(int, case.split("x"))
    num_heads, num_kv_heads = map(int, heads.split("/"))
    torch.manual_seed(0)
    lens = (mean_len * (1 + spread * (2 * torch.rand(num_rows) - 1))).int().to(_DEVICE)
    pages_a_row = -(-int(lens.max()) // _PAGE_SIZE)
    num_pages = num_rows * pages_a_row
    shape = 2, num_pages, _PAGE_SIZE, num_kv_heads, head_dim
    kv_pages = torch.empty(shape, device=_DEVICE, dtype=dtype)
    for half in kv_pages:
        half.copy_(torch.randn(shape[1:], device=_DEVICE, dtype=torch.bfloat16))
    tables = torch.randperm(num_pages, device=_DEVICE).view(num_rows, pages_a_row).int()
    ids = torch.arange(num_rows, device=_DEVICE, dtype=torch.int32)
    parts = StepParts(ids, ids, torch.ones_like(ids), lens)
    query = torch.randn(num_rows, num_heads, head_dim, device=_DEVICE, dtype=torch.bfloat16)
    output = torch.empty_like(query)
    items = WorkItems.allocate(decode.num_decode_items(num_rows), num_rows, _DEVICE)
    attention = PagedDecode(num_rows, num_heads, num_kv_heads, head_dim, _DEVICE)
    plan_decodes(parts, items, None)
    call = lambda: attention(query, kv_pages, tables, parts, items, None, output)  # noqa: E731
    microseconds = graph_microseconds([call] * _NUM_CALLS)
    num_bytes = 2 * int(lens.sum()) * num_kv_heads * head_dim * dtype.itemsize
    return {"us": round(microseconds, 1), "gb_s": round(num_bytes / microseconds / 1e3)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["256x1500", "384x1500", "64x1024", "1x32768"])
    parser.add_argument("--heads", nargs="+", default=["32/8"], help="heads/heads of keys and values")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--spread", type=float, default=0.0, help="contexts differ by so much from their mean")
    parser.add_argument("--cuts", nargs="+", type=int, default=[2], help="chunks a context may be cut into on average")
    parser.add_argument("--registers", nargs="+", type=int, default=[144], help="of a thread at most; 0 for any")
    options = parser.parse_args()
    kinds = [("16 bits", torch.bfloat16, 0), ("8 bits, shared memory", torch.float8_e4m3fn, 0)]
    kinds += [("8 bits", torch.float8_e4m3fn, registers) for registers in options.registers]
    for case, heads, cuts, (kind, dtype, registers) in product(options.cases, options.heads, options.cuts, kinds):
        with ExitStack() as patches:
            for module in (decode, work):
                patches.enter_context(patch.object(module, "num_decode_items", lambda n, cuts=cuts: cuts * n + 64))
            if kind == "8 bits, shared memory":
                patches.enter_context(patch.object(decode, "has_tiles", lambda *_: False))
            patches.enter_context(patch.object(decode, "TILE_REGISTERS", registers or None))
            row = measure(case, heads, options.head_dim, dtype, options.spread)
        labels = {"case": case, "heads": heads, "cuts": cuts, "kind": kind, "registers": registers}
        print(json.dumps({**labels, **row}), flush=True)


if __name__ == "__main__":
    main()
