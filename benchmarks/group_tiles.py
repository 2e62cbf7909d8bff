"""Tiles of the products with 4-bit weights, at the shapes of Llama-3.1-8B: which cut is fast for how many rows.

    python -m benchmarks.group_tiles [--rows 16 32 64 128 256] [--jobs 16]

Prints a line for each shape and number of rows: microseconds of the fastest tile, of the rule's, and of writing the
weight out for the library; and the share of the memory's bandwidth that reading the codes once takes. In the end come
the four products of a layer together, by number of rows. Tiles are compiled by several processes first.
"""

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton

from benchmarks.gpu_timing import graph_microseconds
from llm.config import Activation
from llm.core.weight_groups import WeightGroups
from llm.kernels import linear as products
from llm.kernels.linear import Linear, Weights
from llm.kernels.tiles import HOPPER_OUTPUTS, HOPPER_SPAN, HopperTile, Tile

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
_GROUP = 128
_SPAN = 128
_BYTES_IN_TURN = 400 << 20
"""Weights that are multiplied one after the other, so that none is in the second-level cache."""
_BANDWIDTH = 4.3e12
_SHARED_MEMORY = 220 << 10
"""Bytes that the stages of a program may take."""
_MOST_PROGRAMS = 500
_DEVICE = torch.device("cuda")


class Cut(NamedTuple):
    """What is tried: a tile, and whether sums have units."""

    tile: Tile | HopperTile
    in_units: bool


def cuts(num_rows: int, name: str) -> Iterator[Cut]:
    """Those to try for so many rows."""
    rows = max(32, 1 << (num_rows - 1).bit_length())
    is_gated, num_inputs = name == "gate_up", SHAPES[name][1]
    kinds = product((min(rows, 64), 128), ((64, 4), (128, 8)), (128, 256), (2, 3, 4), (False, True), (1, 2, 4, 8))
    for tile_rows, (outputs, warps), k, stages, in_units, parts in kinds:
        fits = (tile_rows + (1 + is_gated) * outputs // 4) * 2 * k * stages <= _SHARED_MEMORY
        is_in_time = stages > 2 or (tile_rows == 128 and k == 256)
        is_cut_well = num_inputs // k % parts == 0 and parts * num_rows <= (512 if is_gated else 1024)
        if (
            tile_rows <= rows
            and (tile_rows == 64 or in_units == (tile_rows > 32))
            and fits
            and is_in_time
            and is_cut_well
        ):
            yield Cut(Tile(tile_rows, outputs, k, parts, parts > 1, warps, stages), in_units)
    for (tile_rows, stages), parts in product(((64, 6), (128, 4)), (1,) if is_gated else (1, 2, 4, 8)):
        num_programs = parts * SHAPES[name][0] // HOPPER_OUTPUTS * -(-num_rows // tile_rows)
        if num_rows > tile_rows // 2 and num_programs <= _MOST_PROGRAMS and num_inputs // HOPPER_SPAN % parts == 0:
            yield Cut(HopperTile(tile_rows, parts, stages), in_units=True)


def create_weights(num_outputs: int, num_inputs: int) -> Weights:
    """Random codes."""
    codes = torch.randint(0, 256, (num_outputs, num_inputs // 2), dtype=torch.uint8, device=_DEVICE)
    shape = num_inputs // _GROUP, num_outputs
    scales = torch.rand(shape, device=_DEVICE).half() / 100
    zeros = torch.randint(6, 10, shape, dtype=torch.uint8, device=_DEVICE)
    return Weights(codes, groups=WeightGroups(scales, zeros, None, _GROUP, _SPAN).joined())


@contextmanager
def using(cut: Cut | None) -> Iterator[None]:
    """Cut products in this way; None: by the rule."""
    if cut is None:
        yield
        return
    most_summed = 0 if cut.in_units else 1 << 20
    is_hopper = isinstance(cut.tile, HopperTile)
    with (
        patch.object(products, "group_tile", lambda *_: cut.tile),
        patch.object(products, "hopper_tile", lambda *_: cut.tile if is_hopper else None),
        patch.object(products, "MAX_SUMMED_ROWS", most_summed),
    ):
        yield


class Bench:
    """One shape and number of rows."""

    def __init__(self, name: str, num_rows: int, *, num_copies: int | None = None) -> None:
        num_outputs, num_inputs = SHAPES[name]
        self.linear = Linear(_DEVICE)
        self.linear._partial = torch.empty(1 << 25, device=_DEVICE)
        self.linear._arrivals = torch.zeros(1 << 12, dtype=torch.int32, device=_DEVICE)
        copies = num_copies or max(2, _BYTES_IN_TURN // (num_outputs * num_inputs // 2))
        self.weights = [create_weights(num_outputs, num_inputs) for _ in range(copies)]
        self.x = torch.randn(num_rows, num_inputs, device=_DEVICE).bfloat16()
        self.is_gated = name == "gate_up"
        size = num_outputs // 2 if self.is_gated else num_outputs
        self.output = torch.zeros(num_rows, size, device=_DEVICE, dtype=torch.bfloat16)

    def call(self, weights: Weights) -> None:
        """The product by tiles as the engine asks for it: gated, or added to the stream."""
        self.linear._tiled(
            self.x, weights, self.output, gated_by=Activation.SILU if self.is_gated else None, adds=not self.is_gated
        )

    def microseconds(self, cut: Cut | None) -> float:
        """Of a call with a cut; None for the rule's."""
        with using(cut):
            return self._timed(self.call if cut is not None or len(self.x) > 1 else self.single)

    def single(self, weights: Weights) -> None:
        """The same by the kernel of a single row."""
        gated_by = Activation.SILU if self.is_gated else None
        self.linear._single(self.x, weights, self.output, gated_by=gated_by, adds=not self.is_gated)

    def singles(self) -> Iterator[tuple[float, str]]:
        """Microseconds of that kernel, by outputs and pieces."""
        for outputs, pieces in product((1, 2, 4, 8), (64, 128, 256)):
            names = "_GROUP_CUT", "_LONG_GROUP_CUT", "_GATED_GROUP_CUT"
            cut: dict[str, Any] = dict.fromkeys(names, (outputs, pieces))
            with patch.multiple(products, **cut):
                yield self._timed(self.single), f"single row, {outputs} outputs, {pieces} pieces"

    def library(self) -> float:
        """Of writing the weight out, and the library's product."""
        linear = torch.nn.functional.linear
        return self._timed(lambda weights: linear(self.x, weights.written_out(self.x.dtype).weight))

    def _timed(self, call: Callable[[Weights], object]) -> float:
        return graph_microseconds([partial(call, weights) for weights in self.weights])


def check(bench: Bench, cut: Cut | None) -> float:
    """Relative error of a call against the weights written out."""
    bench.output.zero_()
    weights = bench.weights[0]
    assert weights.groups is not None
    if cut is not None and isinstance(cut.tile, Tile):  # codes are as random in another layout
        weights = replace(weights, groups=replace(weights.groups, span=cut.tile.k))
    with using(cut):
        (bench.call if cut is not None or len(bench.x) > 1 else bench.single)(weights)
    expected = bench.x.float() @ weights.written_out(torch.float32).weight.t()
    if bench.is_gated:
        gate, up = expected.chunk(2, -1)
        expected = torch.nn.functional.silu(gate) * up
    return float((bench.output.float() - expected).norm() / expected.norm())


def compile_some(rows: list[int], share: int, num_shares: int) -> None:
    """Compile every `num_shares`-th cut."""
    work = {  # a kernel is compiled for a cut, whatever the shape
        (name == "gate_up", cut): (name, num_rows, cut)
        for name in SHAPES
        for num_rows in rows
        for cut in cuts(num_rows, name)
    }
    for name, num_rows, cut in list(work.values())[share::num_shares]:
        bench = Bench(name, num_rows, num_copies=1)
        try:
            with using(cut):
                bench.call(bench.weights[0])
        except (RuntimeError, triton.OutOfResources) as error:
            print(name, num_rows, cut, type(error).__name__, str(error)[:80], file=sys.stderr)


def measure(name: str, num_rows: int) -> dict[str, float]:
    """Print what is found for one shape and number of rows. Returns microseconds."""
    bench = Bench(name, num_rows)
    found: list[tuple[float, Cut]] = []
    for cut in cuts(num_rows, name):
        try:
            found.append((bench.microseconds(cut), cut))
        except (RuntimeError, triton.OutOfResources) as error:
            print(name, num_rows, cut, type(error).__name__, file=sys.stderr)
    found.sort()
    best, cut = found[0]
    codes = bench.weights[0].weight.nbytes
    times = {"us": best, "rule_us": bench.microseconds(None), "library_us": bench.library()}
    line = {"shape": name, "rows": num_rows, **{key: round(us, 2) for key, us in times.items()}}
    line |= {"bandwidth": round(codes / best / _BANDWIDTH * 1e6, 3), "tflops": round(4e-6 * codes * num_rows / best)}
    line |= {"error": round(check(bench, cut), 5), "rule_error": round(check(bench, None), 5)}
    print(json.dumps(line), flush=True)
    for us, what in sorted(bench.singles())[:5] if num_rows == 1 else ():
        print(f"    {us:8.2f} {what}", flush=True)
    for us, (tile, in_units) in found[:5]:
        print(f"    {us:8.2f} {tile}{', in units' if in_units else ''}", flush=True)
    return times


def main() -> None:
    """Compile, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--jobs", type=int, default=16)
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.share is not None:
        compile_some(options.rows, options.share, options.jobs)
        return
    command = [sys.executable, "-m", "benchmarks.group_tiles", "--jobs", str(options.jobs), "--rows"]
    command += map(str, options.rows)
    jobs = [subprocess.Popen([*command, "--share", str(share)]) for share in range(options.jobs)]
    for job in jobs:
        job.wait()
    for num_rows in options.rows:
        of_layer: Counter[str] = Counter()
        for name in SHAPES:
            of_layer.update(measure(name, num_rows))
        print(json.dumps({"layer": num_rows, **{key: round(us, 1) for key, us in of_layer.items()}}), flush=True)


if __name__ == "__main__":
    main()
