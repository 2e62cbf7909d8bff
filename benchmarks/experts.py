"""A layer's experts alone on one GPU: microseconds by number of tokens, of each part, and of other shapes of tiles.

    python -m benchmarks.experts [--model benchmarks/models/qwen3-30b-a3b] [--tokens 1 16] [--sweep 512] [--format awq]

One JSON line each. Weights are random and of several layers in turn, so that none is in the second-level cache.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from unittest.mock import patch

import torch
import triton

from benchmarks.gpu_timing import graph_microseconds
from llm.checkpoint.model_config import load_model_config
from llm.config import WeightFormat, WeightLayout
from llm.kernels import experts as kernels
from llm.kernels.expert_tiles import ExpertTile, expert_tile
from llm.kernels.experts import ExpertMixture
from llm.kernels.linear import Weights
from llm.kernels.norm import Norm, ResidualStream, rms_norm
from llm.kernels.routing import ExpertShape, route
from llm.models.quantized import QuantizedExperts

_NUM_LAYERS = 4
FORMATS = {
    "bf16": None,
    "fp8": WeightFormat(layout=WeightLayout.FP8),
    "fp8-blocks": WeightFormat(layout=WeightLayout.FP8, group_size=128, block_rows=128),
    "awq": WeightFormat(layout=WeightLayout.AWQ, group_size=128, has_zeros=True),
    "gptq": WeightFormat(layout=WeightLayout.GPTQ, group_size=128),
    "mxfp4": WeightFormat(layout=WeightLayout.MXFP4, group_size=32),
}
_FEW = [
    (outputs, k, num_warps, num_stages)
    for outputs, k, num_warps, num_stages in (
        (64, 128, 4, 2), (64, 128, 4, 3), (64, 128, 4, 4), (64, 64, 4, 4), (64, 64, 4, 6), (128, 64, 4, 3),
        (128, 64, 8, 4), (128, 128, 8, 3), (64, 256, 4, 2), (128, 64, 4, 5), (128, 64, 8, 6), (64, 128, 4, 5),
    )
]  # fmt: skip
_MANY = [
    (64, 64, 128, 4, 3), (64, 128, 64, 4, 3), (64, 128, 64, 8, 4), (64, 128, 128, 8, 3), (64, 256, 64, 8, 3),
    (128, 64, 64, 4, 4), (128, 64, 64, 8, 4), (128, 128, 64, 4, 4), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4),
    (128, 128, 128, 8, 2), (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (256, 64, 64, 8, 4), (256, 128, 64, 8, 4),
]  # fmt: skip
_CUTS = [(outputs, num_warps) for outputs in (1, 2, 4, 8) for num_warps in (2, 4, 8)]
_SINGLES = [
    *((cut, (4, 4), tile_k) for cut in _CUTS for tile_k in (512, 1024, 2048)),
    *(((4, 4), cut, 1024) for cut in _CUTS),
]  # fmt: skip
"""Of one token: outputs and warps of either product, and inputs at once."""
_GROUPS = [(64, 4, 3), (64, 4, 5), (128, 4, 3), (128, 4, 5), (128, 8, 2), (128, 8, 3), (128, 8, 4), (256, 8, 3)]
"""Of weights in groups, which say how many inputs a tile has."""


class Bench:
    """Experts of `num_layers` layers, and the tokens of one step.

    Args:
        shape: of each layer.
        weight_format: of the weights; None for bfloat16.
    """

    def __init__(
        self, shape: ExpertShape, max_tokens: int, weight_format: WeightFormat | None, *, num_layers: int = _NUM_LAYERS
    ) -> None:
        self.shape, self.device, dtype = shape, torch.device("cuda"), torch.bfloat16
        self.mixture = ExpertMixture(shape, max_tokens, dtype, self.device)
        self.norm = Norm(torch.ones(shape.hidden_size, dtype=dtype, device=self.device), 1e-6)
        self.x = torch.randn(max_tokens, shape.hidden_size, dtype=dtype, device=self.device)
        self.layers = []
        for _ in range(num_layers):
            router = self._random(shape.num_experts, shape.hidden_size)
            sizes = (2 * shape.size, shape.hidden_size), (shape.hidden_size, shape.size)
            self.layers.append((router, *(self._weights(*each, weight_format) for each in sizes)))

    def _weights(self, num_outputs: int, num_inputs: int, weight_format: WeightFormat | None) -> Weights:
        num_experts, dtype = self.shape.num_experts, torch.bfloat16
        if weight_format is None:
            return Weights(self._random(num_experts, num_outputs, num_inputs))
        coded = QuantizedExperts(num_experts, num_inputs, num_outputs, weight_format, has_bias=False, dtype=dtype)
        coded.to_empty(device=self.device).reset_parameters()
        coded.join()
        scales = coded.row_scales
        return Weights(coded.weight, None, scales, coded.groups if scales is None else None)

    def _random(self, *sizes: int) -> torch.Tensor:
        return torch.empty(*sizes, dtype=torch.bfloat16, device=self.device).normal_(std=0.02)

    def microseconds(self, run: Callable[[int], object]) -> float:
        """Of `run(layer)`, of all layers in turn."""
        return round(graph_microseconds([partial(run, layer) for layer in range(_NUM_LAYERS)] * 2), 1)

    def parts(self, num_tokens: int) -> dict[str, float]:
        """Microseconds of the whole and of its parts."""
        x, routes = self.x[:num_tokens], self.mixture._routes
        stream, normed = ResidualStream(x.clone()), torch.empty_like(x)
        found = {"all": self.microseconds(lambda layer: self.mixture(stream, self.norm, *self.layers[layer]))}
        stream = ResidualStream(x)
        found["norm"] = self.microseconds(lambda _: rms_norm(stream, self.norm, normed))
        found["route"] = self.microseconds(lambda layer: route(normed, self.layers[layer][0], routes))
        found["order"] = self.microseconds(lambda _: routes.order_pairs(num_tokens))
        for name, swiglu in (("gate_up", True), ("down", False)):
            found[name] = self.microseconds(partial(self.product, num_tokens, swiglu, None))
        return found

    def product(self, num_tokens: int, swiglu: bool, tile: ExpertTile | None, layer: int) -> None:
        """One of the two products, of the pairs as they were ordered last."""
        mixture, (_, gate_up, down) = self.mixture, self.layers[layer]
        if swiglu:
            mixture.product(self.x[:num_tokens], gate_up, mixture._activated, num_tokens, swiglu=True, tile=tile)
        else:
            mixture.product(mixture._activated, down, mixture._made, num_tokens, swiglu=False, tile=tile)

    def tiles(self, num_tokens: int) -> Iterator[ExpertTile]:
        """Shapes to try."""
        num_pairs, groups = num_tokens * self.shape.per_token, self.layers[0][1].groups
        if groups is not None:
            fitting = min(max(1 << (num_pairs // self.shape.num_experts).bit_length(), 16), 128)
            for rows in {fitting, min(2 * fitting, 128)}:
                yield from (ExpertTile(rows, *more) for more in self._group_tiles(groups.span))
            return
        rows = expert_tile(num_pairs, self.shape.num_experts, 2, False, True).rows
        if rows <= 32:
            yield from (ExpertTile(rows, *more) for more in _FEW)
        else:
            yield from (ExpertTile(*sizes) for sizes in _MANY)

    def _group_tiles(self, k: int) -> Iterator[tuple[int, int, int, int]]:
        return ((outputs, k, num_warps, num_stages) for outputs, num_warps, num_stages in _GROUPS)

    def single(self, cuts: tuple[tuple[int, int], tuple[int, int], int]) -> Callable[[int], None]:
        """One token, with other cuts of its products."""
        stream = ResidualStream(self.x[:1].clone())

        def run(layer: int) -> None:
            gate_up, down, tile_k = cuts
            with (
                patch.object(kernels, "_GATE_UP_CUT", gate_up), patch.object(kernels, "_DOWN_CUT", down),
                patch.object(kernels, "_SINGLE_MOST_TILE_K", tile_k),
            ):  # fmt: skip
                self.mixture(stream, self.norm, *self.layers[layer])

        return run

    def written_out(self) -> float:
        """Microseconds of writing both weights out in 16 bits."""
        return self.microseconds(lambda layer: [each.written_out(torch.bfloat16) for each in self.layers[layer][1:]])


def compile_some(bench: Bench, sweep: list[int], share: int, num_shares: int) -> None:
    """Compile every `num_shares`-th of the tiles to try."""
    if 1 in sweep and bench.layers[0][1].groups is None:
        for cuts in _SINGLES[share::num_shares]:
            bench.single(cuts)(0)
    for num_tokens in (each for each in sweep if each > 1 or bench.layers[0][1].groups is not None):
        bench.mixture(ResidualStream(bench.x[:num_tokens].clone()), bench.norm, *bench.layers[0])
        work = [(swiglu, tile) for swiglu in (True, False) for tile in bench.tiles(num_tokens)]
        for swiglu, tile in work[share::num_shares]:
            with suppress(RuntimeError, triton.OutOfResources):
                bench.product(num_tokens, swiglu, tile, 0)


def main() -> None:
    """Compile, then measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="benchmarks/models/qwen3-30b-a3b")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 16, 64, 128, 256, 512, 1024, 2048, 8192])
    parser.add_argument("--sweep", nargs="*", type=int, default=[512, 1024, 8192], help="tokens to try tiles for")
    parser.add_argument("--format", choices=FORMATS, default="bf16", help="of the weights")
    parser.add_argument("--jobs", type=int, default=12, help="processes that compile")
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    config = load_model_config(options.model)
    shape = ExpertShape(
        config.num_experts, config.num_experts_per_token, config.expert_size, config.hidden_size,
        config.normalize_expert_weights, config.swiglu_limit, config.swiglu_alpha,
    )  # fmt: skip
    begin = time.perf_counter()
    torch.manual_seed(0)
    max_tokens = max([*options.tokens, *options.sweep])
    with torch.inference_mode():
        if options.share is not None:
            bench = Bench(shape, max_tokens, FORMATS[options.format], num_layers=1)
            compile_some(bench, options.sweep, options.share, options.jobs)
            return
        if options.sweep:
            command = [sys.executable, "-m", "benchmarks.experts", *sys.argv[1:], "--share"]
            jobs = [subprocess.Popen([*command, str(share)]) for share in range(options.jobs)]
            for job in jobs:
                job.wait()
        bench = Bench(shape, max_tokens, FORMATS[options.format])
        weight = bench.layers[0][1].weight
        itemsize = weight.nbytes / (shape.num_experts * 2 * shape.size * shape.hidden_size)
        if bench.layers[0][1].groups is not None:
            print(json.dumps({"written_out": bench.written_out()}), flush=True)
        for num_tokens in options.tokens:
            parts = bench.parts(num_tokens)
            num_used = int((bench.mixture._routes.starts.diff() > 0).sum())
            num_bytes = min(num_used, num_tokens * shape.per_token) * 3 * shape.size * shape.hidden_size * itemsize
            flops = 6 * num_tokens * shape.per_token * shape.size * shape.hidden_size
            rates = {"gb_s": round(num_bytes / parts["all"] / 1e3), "tflops": round(flops / parts["all"] / 1e6)}
            line = {"tokens": num_tokens, "experts_used": num_used, **parts, **rates}
            print(json.dumps({**line, "s": round(time.perf_counter() - begin)}), flush=True)
        for num_tokens in options.sweep:
            bench.parts(num_tokens)
            if num_tokens == 1 and bench.layers[0][1].groups is None:
                for cuts in _SINGLES:
                    print(json.dumps({"tokens": 1, "us": bench.microseconds(bench.single(cuts)), "cuts": cuts}))
                continue
            for name, swiglu in (("gate_up", True), ("down", False)):
                for tile in bench.tiles(num_tokens):
                    try:
                        us: object = bench.microseconds(partial(bench.product, num_tokens, swiglu, tile))
                    except Exception as error:  # noqa: BLE001  # a shape that does not fit is a result too
                        us = type(error).__name__
                    line = {"tokens": num_tokens, "product": name, "us": us}
                    sizes = [tile.rows, tile.outputs, tile.k, tile.num_warps, tile.num_stages]
                    print(json.dumps({**line, "tile": sizes, "s": round(time.perf_counter() - begin)}), flush=True)


if __name__ == "__main__":
    main()
