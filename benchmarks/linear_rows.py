"""Products of up to 256 rows of 16 bits: by the library, and by Rayline's tiles for small weights and for large ones.

    python -m benchmarks.linear_rows [--models 8B half quarter 0.6B] [--rows 8 32 64 96 128 256]

`half` and `quarter` are what one of two and of four GPUs has of the 8B shape. Prints a line for each product and number
of rows, and a line for each model and number of rows: a layer's products, norms and activation by the engine's own
calls. All are microseconds a call inside a CUDA graph, with weights in turns, so that none stay in the second-level
cache. A norm goes before each product but `down`, which follows itself. `gate_up` includes the activation, `o` and
`down` add to the residual stream.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import cached_property, partial
from itertools import product
from unittest.mock import patch

import torch
import triton

from benchmarks.gpu_timing import graph_microseconds
from llm.config import Activation
from llm.kernels import linear as products
from llm.kernels.activation import activate_gated
from llm.kernels.linear import Linear, Weights
from llm.kernels.norm import Norm, ResidualStream, rms_norm
from llm.kernels.tiles import MAX_SOME_ROWS

Shapes = dict[str, tuple[int, int]]
MODELS: dict[str, Shapes] = {
    "8B": {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
        "head": (128256, 4096),
    },
    "half": {"qkv": (3072, 4096), "o": (4096, 2048), "gate_up": (14336, 4096), "down": (4096, 7168)},
    "quarter": {"qkv": (1536, 4096), "o": (4096, 1024), "gate_up": (7168, 4096), "down": (4096, 3584)},
    "0.6B": {
        "qkv": (4096, 1024),
        "o": (1024, 2048),
        "gate_up": (6144, 1024),
        "down": (1024, 3072),
        "head": (151936, 1024),
    },
}
_BYTES_IN_TURN = 160 << 20
"""Weights that are multiplied one after the other: the second-level cache has 50 MB."""
_DEVICE = torch.device("cuda")


class Bench:
    """One product and number of rows."""

    def __init__(self, name: str, num_rows: int, shape: tuple[int, int]) -> None:
        self.name, (num_outputs, num_inputs) = name, shape
        self.linear = Linear(_DEVICE)
        copies = max(2, _BYTES_IN_TURN // (2 * num_outputs * num_inputs))
        self.weights = [Weights(random(num_outputs, num_inputs) / 64) for _ in range(copies)]
        self.x = random(num_rows, num_inputs)
        self.stream = ResidualStream(random(num_rows, num_inputs))
        self.norm = Norm(torch.ones(num_inputs, device=_DEVICE, dtype=torch.bfloat16), 1e-5)
        rms_norm(self.stream, self.norm, self.x)
        self.is_gated, self.adds = name == "gate_up", name in ("o", "down")
        self.output = random(num_rows, num_outputs // 2 if self.is_gated else num_outputs)

    def library(self, weights: Weights) -> None:
        """The product as the engine leaves it to the library."""
        if self.adds:
            self.output.addmm_(self.x, weights.weight.t())
        elif self.is_gated:
            activate_gated(torch.nn.functional.linear(self.x, weights.weight), self.output, Activation.SILU)
        else:
            torch.mm(self.x, weights.weight.t(), out=self.output)

    def tiles(self, large_weight: int, weights: Weights) -> None:
        """The product by Rayline's tiles, where a weight is large from so many numbers on."""
        with patch.object(products, "_LARGE_WEIGHT", large_weight):
            self.linear._tiled(
                self.x, weights, self.output, gated_by=Activation.SILU if self.is_gated else None, adds=self.adds
            )

    def microseconds(self, call: Callable[[Weights], None]) -> float:
        """Of a call, with the norm before it."""

        def with_norm(weights: Weights) -> None:
            if self.name != "down":
                rms_norm(self.stream, self.norm, self.x)
            call(weights)

        return graph_microseconds([partial(with_norm, weights) for weights in self.weights])

    def error(self, call: Callable[[Weights], None]) -> float:
        """Relative, of a call against float32."""
        self.output.zero_()
        call(self.weights[0])
        return float((self.output.float() - self.expected).norm() / self.expected.norm())

    @cached_property
    def expected(self) -> torch.Tensor:
        """The product with the first weights in float32."""
        sums = self.x.float() @ self.weights[0].weight.float().t()
        if not self.is_gated:
            return sums
        gate, up = sums.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up


def random(*shape: int) -> torch.Tensor:
    """Normal numbers in bfloat16."""
    return torch.randn(*shape, device=_DEVICE, dtype=torch.bfloat16)


def measure(model: str, name: str, num_rows: int) -> None:
    """Print what one product takes in each way, and how far each is from float32."""
    bench = Bench(name, num_rows, MODELS[model][name])
    ways: dict[str, Callable[[Weights], None]] = {"library": bench.library}
    if num_rows <= MAX_SOME_ROWS:
        ways |= {"small_tiles": partial(bench.tiles, 1 << 40), "large_tiles": partial(bench.tiles, 0)}
    line: dict[str, object] = {"model": model, "product": name, "rows": num_rows}
    errors = []
    for kind, call in ways.items():
        try:
            line[kind] = round(bench.microseconds(call), 1)
            errors.append(round(bench.error(call), 4))
        except triton.OutOfResources as error:  # the tiles of large weights are too large for this many rows
            print(kind, error, file=sys.stderr)
    print(json.dumps({**line, "errors": errors}), flush=True)


def measure_layer(model: str, num_rows: int) -> None:
    """Print what a layer's products take by the engine's calls."""
    shapes = {name: shape for name, shape in MODELS[model].items() if name != "head"}
    copies = max(2, _BYTES_IN_TURN // (2 * sum(outputs * inputs for outputs, inputs in shapes.values())))
    layers = [{name: Weights(random(*shape) / 64) for name, shape in shapes.items()} for _ in range(copies)]
    linear, hidden_size = Linear(_DEVICE), shapes["qkv"][1]
    norm = Norm(torch.ones(hidden_size, device=_DEVICE, dtype=torch.bfloat16), 1e-5)
    total, attended = random(num_rows, hidden_size), random(num_rows, shapes["o"][1])

    def run(layer: dict[str, Weights]) -> None:
        stream = ResidualStream(total)
        linear.of_norm(stream, norm, layer["qkv"])
        linear.add(stream, attended, layer["o"])
        linear.mlp(stream, norm, layer["gate_up"], layer["down"])

    microseconds = graph_microseconds([partial(run, layer) for layer in layers])
    print(json.dumps({"model": model, "rows": num_rows, "layer_us": round(microseconds, 1)}), flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["8B", "half", "0.6B"], choices=MODELS)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32, 64, 96, 128, 256])
    options = parser.parse_args()
    for model, num_rows in product(options.models, options.rows):
        for name in MODELS[model]:
            measure(model, name, num_rows)
        measure_layer(model, num_rows)


if __name__ == "__main__":
    main()
