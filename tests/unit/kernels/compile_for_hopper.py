"""Compiles kernels for compute capability 9.0 without a GPU: `python compile_for_hopper.py`. Prints a name each.

A program of its own, for a process that has Triton's interpreter on cannot compile.
"""

from itertools import product
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llm.attention.kernels import decode, prefill, rope
from llm.kernels import activation, few_rows, norm, quantization

HOPPER = GPUTarget("cuda", 90, 32)
BF16, FLOAT, INT, FP8 = "*bf16", "*fp32", "*i32", "*fp8e4nv"
SCALES = {"row_scales": FLOAT, "scales": FLOAT, "bias": BF16}
NO_SCALES = dict.fromkeys(SCALES)


def compile_kernel(name: str, kernel: Any, arguments: dict[str, Any], **constants: Any) -> None:
    """Compile for these types of arguments; None, and what is no type, is a constant."""
    values = {**arguments, **constants, "PDL": True}
    is_type = {name: isinstance(value, str) for name, value in values.items()}
    signature = {name: values[name] if is_type[name] else "constexpr" for name in kernel.arg_names}
    constexprs = {(i,): values[name] for i, name in enumerate(kernel.arg_names) if not is_type[name]}
    triton.compile(
        ASTSource(kernel, signature, constexprs), target=HOPPER, options={"num_warps": 4, "launch_pdl": True}
    )
    print(name, flush=True)


def compile_norms() -> None:
    """Alone, behind a product to be scaled, into 16 bits and into 8."""
    arguments = {"total": BF16, "weight": BF16, "eps": "fp32"}
    for (pending, scales), (output, output_scales) in product(
        ((None, NO_SCALES), (BF16, SCALES), (BF16, {**SCALES, "bias": None})), ((BF16, None), (FP8, FLOAT))
    ):
        more = {"pending": pending, "output": output, "output_scales": output_scales, **scales}
        compile_kernel("norm", norm._rms_norm, {**arguments, **more}, HIDDEN=1000, BLOCK=1024)


def compile_activations() -> None:
    """The same for SwiGLU."""
    for scales, (output, output_scales) in product((NO_SCALES, SCALES), ((BF16, None), (FP8, FLOAT))):
        arguments = {"gate_up": BF16, "output": output, "output_scales": output_scales, "size": "i32", **scales}
        compile_kernel("activation", activation._silu_mul, arguments, DTYPE=tl.bfloat16, BLOCK=1024)
    rows = {"x": BF16, "values": FP8, "scales": FLOAT, "num_inputs": "i32"}
    compile_kernel("rounding", quantization._quantize_rows, rows, BLOCK=1024)


def compile_rope() -> None:
    """Keys and values in 16 bits and in 8, with and without QK-norm."""
    arguments = {"qkv": BF16, "query": BF16, "rope_table": FLOAT, "norm_eps": "fp32"}
    arguments |= {"page_tables": INT, "token_rows": INT, "positions": INT, "table_stride": "i32", "sin_offset": "i32"}
    sizes = {"NUM_HEADS": 8, "NUM_KV_HEADS": 2, "HALF": 64, "HALF_BLOCK": 64, "BLOCK_HEADS": 2, "PAGE_SIZE": 16}
    for pages, scales, weight in product((BF16, FP8), (NO_SCALES, SCALES), (None, BF16)):
        more = {"keys": pages, "values": pages, "query_norm": weight, "key_norm": weight, **scales}
        compile_kernel("rope", rope._rope_and_store, {**arguments, **more}, **sizes)


def compile_attention() -> None:
    """Keys and values in 16 bits and in 8; heads of 128 numbers and, with masks, of 80."""
    arguments = dict.fromkeys(("page_tables", "part_rows", "query_starts", "query_lens", "context_lens"), INT)
    arguments |= dict.fromkeys(("item_parts", "item_chunks", "first_items", "summary"), INT)
    arguments |= {"query": BF16, "output": BF16, "partial": FLOAT, "partial_lse": FLOAT, "scale_log2": "fp32"}
    arguments |= dict.fromkeys(("num_tokens", "num_splits", "query_stride", "table_stride", "window"), "i32")
    common = {"NUM_HEADS": 8, "NUM_KV_HEADS": 2, "GROUP": 4, "PAGE_SIZE": 16, "BLOCK": 64, "INDEX": tl.int32}
    for (pages, as_type), head_dim in product(((BF16, tl.bfloat16), (FP8, tl.float16)), (80, 128)):
        heads = {**common, "keys": pages, "values": pages, "PRODUCT": as_type, "HEAD_DIM": head_dim, "HEAD_BLOCK": 128}
        stored = {**arguments, **heads}
        compile_kernel("decode", decode._paged_decode, stored, GROUP_BLOCK=16, HAS_PAIRS=pages == FP8)
        if head_dim == 80:
            tile = {"GROUP_BLOCK": 4, "BLOCK_TOKENS": 16, "MIN_SPLIT_BLOCKS": 8, "IS_UNIFORM": False}
            compile_kernel("prefill", prefill._paged_prefill, stored, HAS_WINDOW=True, **tile)
    compile_kernel("merge", decode._merge_chunks, {**arguments, **common}, GROUP_BLOCK=4, HEAD_DIM=80, HEAD_BLOCK=128)


def compile_products() -> None:
    """A row and a tile of them, into rows and into the stream, of weights of 16 bits and of 8, sums cut and whole."""
    arguments = {"x": BF16, "output": BF16, "bias": None, "num_outputs": "i32", "num_inputs": "i32"}
    for (weight, scales), (swiglu, adds) in product(
        ((BF16, None), (FP8, FLOAT)), ((False, False), (False, True), (True, False))
    ):
        common = {**arguments, "weight": weight, "scales": scales, "SWIGLU": swiglu, "ADDS": adds}
        for weights_of_norm in (None, BF16):
            row = {**common, "norm": weights_of_norm, "norm_eps": "fp32", "OUTPUTS": 4, "TILE_K": 1024}
            compile_kernel("single row", few_rows.single_row_product, row)
        for num_parts in (1, 2):
            tile = {**common, "partial": FLOAT, "arrivals": INT, "num_rows": "i32", "inputs_per_part": "i32"}
            tile |= {"ROWS": 16, "OUTPUTS": 64, "TILE_K": 128, "NUM_PARTS": num_parts, "IS_SHARED": num_parts > 1}
            compile_kernel("tile", few_rows.tile_product, tile, IS_EVEN=True, CAN_PREFETCH=True)


if __name__ == "__main__":
    compile_norms()
    compile_activations()
    compile_rope()
    compile_attention()
    compile_products()
