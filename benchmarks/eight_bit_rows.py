"""From how many rows on the library multiplies 8-bit weights faster than our kernels, at the shapes of Llama-3.1-8B.

    python -m benchmarks.eight_bit_rows [--rows 1 2 8 32 64]

Prints a JSON line for each number of rows and product: microseconds of our kernels, which widen the weights, and of
the library, which multiplies rows that are rounded to 8 bits; with what the engine does beside the product in either
case.
"""

import argparse
import json

import torch

from benchmarks.gpu_timing import graph_microseconds
from benchmarks.group_tiles import SHAPES
from llm.config import Activation
from llm.kernels.activation import activate_gated
from llm.kernels.linear import Linear, Weights
from llm.kernels.quantization import EightBitRows, eight_bit_product, quantize_rows, quantize_weight

_BYTES_IN_TURN = 400 << 20
"""Weights that are multiplied one after the other, so that none is in the second-level cache."""
_DEVICE = torch.device("cuda")


def measure(name: str, num_rows: int, linear: Linear) -> dict[str, float]:
    """Microseconds of one product either way."""
    num_outputs, num_inputs = SHAPES[name]
    values, scales = quantize_weight(torch.randn(num_outputs, num_inputs, device=_DEVICE))
    copies = max(2, _BYTES_IN_TURN // values.numel())
    weights = [Weights(values.clone(), scales=scales) for _ in range(copies)]
    x = torch.randn(num_rows, num_inputs, device=_DEVICE).bfloat16()
    rounded = quantize_rows(x)
    is_gated = name == "gate_up"
    output = x.new_zeros(num_rows, num_outputs // 2 if is_gated else num_outputs)
    narrow = EightBitRows.allocate(num_rows, output.shape[1], _DEVICE, x.dtype)

    def own(weight: Weights) -> None:
        multiply = linear._single if num_rows == 1 else linear._tiled
        multiply(x, weight, output, gated_by=Activation.SILU if is_gated else None, adds=not is_gated)

    def of_library(weight: Weights) -> None:
        rows = quantize_rows(x) if name == "o" else rounded  # what attention writes has a kernel of its own for it
        assert weight.scales is not None
        made = eight_bit_product(rows, weight.weight, weight.scales, None)
        if is_gated:
            activate_gated(made, narrow, Activation.SILU)

    calls = {"ours_us": own, "library_us": of_library}
    return {
        key: round(graph_microseconds([lambda w=w, call=call: call(w) for w in weights]), 1)  # type: ignore[misc]
        for key, call in calls.items()
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 8, 32, 64])
    options = parser.parse_args()
    linear = Linear(_DEVICE)
    for num_rows in options.rows:
        for name in SHAPES:
            print(json.dumps({"rows": num_rows, "product": name, **measure(name, num_rows, linear)}), flush=True)


if __name__ == "__main__":
    main()
