"""Compiles kernels for Hopper, and products for older chips, without a GPU: `python compile_for_gpus.py`. Prints names.

A program of its own, for a process that has Triton's interpreter on cannot compile.
"""

import subprocess
from itertools import product
from tempfile import NamedTemporaryFile
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.tools.disasm import path_to_cuobjdump

from llm.core.recurrent_state import DeltaSpec
from llm.kernels import (
    activation,
    adapted_product,
    adapters,
    adjust,
    all_reduce,
    chunked_all_reduce,
    delta_chunks,
    delta_rule,
    expert_adapters,
    expert_groups,
    expert_many_pairs,
    expert_tiles,
    experts,
    few_rows,
    group_hopper,
    group_numbers,
    group_row,
    logprobs,
    mxfp4,
    norm,
    pair_order,
    quantization,
    routing,
    sampling,
    shares,
    soft_cap,
)
from llm.kernels.attention import decode, gates, gather, hopper_prefill, latent, latent_rows, prefill, rope
from llm.kernels.attention.work import AttentionOutputs, HeadShape, PagedCache, ScoreFactors, StepParts, WorkItems
from llm.kernels.expert_pairs import ExpertPairs, PairCounts
from llm.kernels.launch import stages_in
from llm.kernels.operands import GroupOperand, WeightOperand
from llm.kernels.tiles import HopperTile, Tile

SHARED_MEMORY = {80: 164 << 10, 89: 100 << 10, 90: 228 << 10}
"""Bytes of a multiprocessor's, by compute capability (CUDA C++ programming guide, table 27)."""
BF16, FLOAT, INT, FP8 = "*bf16", "*fp32", "*i32", "*fp8e4nv"
ALIGNED = {
    "num_inputs",
    "num_outputs",
    "inputs_per_part",
    "inputs_per_split",
    "slot_stride",
    "split_stride",
    "a_stride",
    "b_stride",
    "num_numbers",
    "query_stride",
    "table_stride",
    "num_words",
    "capacity",
}
SCALES = {"row_scales": FLOAT, "scales": FLOAT, "bias": BF16}
NO_SCALES = dict.fromkeys(SCALES)
PARTS, ITEMS = StepParts(*[INT] * 4), WorkItems(*[INT] * 4)
NO_GROUPS = GroupOperand(None, None, None)
WITHOUT_ADAPTERS = {"adapters": None, "RULE": None}


def compile_kernel(
    name: str,
    kernel: Any,
    arguments: dict[str, Any],
    *,
    capability: int = 90,
    num_stages: int = 3,
    num_warps: int = 4,
    maxnreg: int | None = None,
    source: type[ASTSource] = ASTSource,
    most_waits: int | None = None,
    **constants: Any,
) -> int:
    """Compile for these types of arguments; None, and what is no type, is a constant. Returns its shared memory.

    A named tuple has a type for each of its fields. With `most_waits` the compiled code may wait for products of the
    tensor cores at so many places, and keeps no number outside of registers.
    """
    is_hopper = capability == 90
    values = {**arguments, **constants, "PDL": is_hopper}
    signature, constexprs, aligned = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        fields = [((i,), parameter.name, value)]
        if isinstance(value, tuple) and not parameter.is_constexpr:
            fields = [((i, j), field, value[j]) for j, field in enumerate(value._fields)]
            signature[parameter.name] = type(value)(*(each if isinstance(each, str) else "constexpr" for each in value))
        else:
            signature[parameter.name] = value if isinstance(value, str) else "constexpr"
        for path, field, each in fields:
            if not isinstance(each, str):
                constexprs[path] = each
            elif each.startswith("*") or field in ALIGNED:
                aligned[path] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        source(kernel, signature, constexprs, aligned), target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps, "num_stages": num_stages, "launch_pdl": is_hopper, "maxnreg": maxnreg},
    )  # fmt: skip
    if most_waits is not None:
        assembly = assembly_of(compiled.asm["cubin"])
        assert 0 < assembly.count("WARPGROUP.DEPBAR") <= most_waits, (name, assembly.count("WARPGROUP.DEPBAR"))
        assert "STL" not in assembly, name
    print(name, flush=True)
    return int(compiled.metadata.shared)


def assembly_of(cubin: bytes) -> str:
    """All instructions of a compiled kernel. Triton's own listing leaves out what stands behind the first 64 KiB."""
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [path_to_cuobjdump(), "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout


def compile_norms() -> None:
    """Alone, behind a product to be scaled, or its norm, into 16 bits and into 8; embeddings and bounded logits."""
    arguments = {"total": BF16, "weight": BF16, "eps": "fp32"}
    plain = {"pending_weight": None, "pending_eps": None, "OFFSET": None}
    for (pending, scales), (output, output_scales) in product(
        ((None, NO_SCALES), (BF16, SCALES), (BF16, {**SCALES, "bias": None})), ((BF16, None), (FP8, FLOAT))
    ):
        more = {"pending": pending, "output": output, "output_scales": output_scales, **scales}
        compile_kernel("norm", norm._rms_norm, {**arguments, **plain, **more}, HIDDEN=1000, BLOCK=1024)
    behind = {"pending_weight": BF16, "pending_eps": "fp32", "OFFSET": 1.0, "output": BF16, "output_scales": None}
    for scales in (NO_SCALES, SCALES):
        more = {"pending": BF16, **behind, **scales}
        compile_kernel("norm behind", norm._rms_norm, {**arguments, **more}, HIDDEN=1000, BLOCK=1024)
    tokens = {"token_ids": INT, "last_token_ids": INT, "token_rows": INT, "table": BF16, "residual": BF16}
    for scale, part in ((None, None), ("fp32", "i32")):
        arguments = {**tokens, "scale": scale, "first_id": part, "num_ids": part}
        compile_kernel("embed", norm._embed_tokens, arguments, HIDDEN=1000, BLOCK=1024)
    logits = {"logits": BF16, "num_logits": "i64", "cap": "fp32", "inverse_cap": "fp32"}
    compile_kernel("soft cap", soft_cap._cap_softly, logits, BLOCK=4096, num_warps=8)


def compile_activations() -> None:
    """The same for SwiGLU, and GeGLU."""
    for scales, (output, output_scales) in product((NO_SCALES, SCALES), ((BF16, None), (FP8, FLOAT))):
        arguments = {"gate_up": BF16, "output": output, "output_scales": output_scales, "size": "i32", **scales}
        for is_gelu in (False, True) if scales is NO_SCALES else (False,):
            sizes = {"DTYPE": tl.bfloat16, "BLOCK": 1024, "GELU": is_gelu}
            compile_kernel("activation", activation._activate_gated, arguments, **sizes)
    rows = {"x": BF16, "values": FP8, "scales": FLOAT, "num_inputs": "i32"}
    shared = {"total": BF16, "weight": BF16, "eps": "fp32", "gate": BF16}
    for values, scales in ((BF16, None), (FP8, FLOAT)):
        shared["more"] = None if scales is None else FLOAT
        sizes = {"HIDDEN": 2048, "BLOCK": 2048, "OFFSET": 1.0, "SIZE": 768, "SIZE_BLOCK": 1024}
        compile_kernel("shares", shares._scale_by_share, {**shared, "values": values, "scales": scales, **sizes})
    compile_kernel("rounding", quantization._quantize_rows, rows, BLOCK=1024)
    scaled = {"values": BF16, "output": BF16, "size": "i32", **SCALES}
    compile_kernel("scaling", quantization._scale_rows, scaled, BLOCK=2048)


def compile_rope() -> None:
    """Keys and values in 16 bits and in 8, QK-norm, a product to be scaled or of heads that turn in part: every two."""
    arguments = {"qkv": BF16, "query": BF16, "rope_table": FLOAT, "norm_eps": "fp32"}
    arguments |= {"token_rows": INT, "positions": INT, "sin_offset": "i32", "PAGE_SIZE": 16}
    for is_narrow, is_scaled in product((False, True), repeat=2):
        pages, scales = FP8 if is_narrow else BF16, SCALES if is_scaled else NO_SCALES
        weight = BF16 if is_narrow == is_scaled else None
        more = {"cache": PagedCache(pages, pages, INT, "i32"), "query_norm": weight, "key_norm": weight, **scales}
        more |= {"query_scales": FLOAT if is_scaled else None, "OFFSET": 1.0 if is_scaled else None}
        heads = rope._Heads(8, 2, 1 + is_narrow, 64, 48 if is_scaled else 64, 64, 2)
        compile_kernel("rope", rope._rope_and_store, {**arguments, **more}, HEADS=heads)


def compile_attention() -> None:
    """Keys and values in 16 bits and in 8; heads of 128 and 256 numbers, on older chips too, and, with masks, of 80.

    Plain scores, and bounded ones beside sinks; small tiles and large ones.
    """
    arguments = {"query": BF16, "parts": PARTS, "items": ITEMS, "outputs": AttentionOutputs(BF16, FLOAT, FLOAT)}
    arguments |= dict.fromkeys(("num_tokens", "num_splits", "query_stride", "window"), "i32")
    plain, all_scores = ScoreFactors(None, "fp32", None), ScoreFactors("fp32", "fp32", BF16)
    common = {"PAGE_SIZE": 16, "BLOCK": 64, "INDEX": tl.int32}
    for capability, pages, head_dim, tile_rows, scores in (
        (80, BF16, 128, 128, plain),
        (89, BF16, 128, 128, plain),
        (89, FP8, 128, 128, all_scores),
        (90, BF16, 80, 128, plain),
        (90, FP8, 80, 128, plain),
        (80, BF16, 256, 128, plain),
        (89, BF16, 256, 64, plain),
        (90, BF16, 256, 64, all_scores),
        (90, BF16, 256, 128, plain),
    ):
        has_8_bits, head_block = pages == FP8, triton.next_power_of_2(head_dim)
        heads = {"HEADS": HeadShape(2, 4, head_dim, head_block), "PRODUCT": tl.float16 if has_8_bits else tl.bfloat16}
        stored = {**arguments, **common, **heads, "factors": scores, "cache": PagedCache(pages, pages, INT, "i32")}
        tile = {"TILE": prefill._Tile(tile_rows, tile_rows // 4, 64, 8), "IS_UNIFORM": False, "HAS_WINDOW": True}
        room, bytes_a_stage = SHARED_MEMORY[capability], 2 * 64 * head_block * (1 if has_8_bits else 2)
        room_beside_tile = room - tile_rows * (head_block + 64) * 2
        num_stages = tile_rows // 64 + 1
        if head_block > 128:
            num_stages = min(num_stages, max(stages_in(room_beside_tile, bytes_a_stage, capability // 10), 1))
        taken = (
            compile_kernel(
                "decode",
                decode._paged_decode,
                {**stored, "GROUP_BLOCK": 16, "HAS_PAIRS": has_8_bits},
                capability=capability,
                num_stages=min(3, stages_in(room, bytes_a_stage, capability // 10)),
            ),
            compile_kernel(
                "prefill",
                prefill._paged_prefill,
                {**stored, **tile},
                capability=capability,
                num_stages=num_stages,
                num_warps=4 if tile_rows * head_block <= 128 * 128 else 8,
            ),
        )
        assert max(taken) <= SHARED_MEMORY[capability] - 1024, (capability, pages, head_dim, taken)
    for capability, head_dim, group, scores in ((89, 256, 4, plain), (90, 64, 7, all_scores), (90, 128, 16, plain)):
        stored = {**arguments, "factors": scores, "cache": PagedCache(FP8, FP8, INT, "i32"), "PAGE_SIZE": 16}
        sizes = {"HEADS": HeadShape(8, group, head_dim, head_dim), "GROUP_BLOCK": 16 if group > 8 else 8}
        shared = compile_kernel(
            "decode in 8 bits", decode._paged_decode_8_bits, {**stored, **sizes}, BY_CHIP=True, num_warps=1,
            capability=capability,
        )  # fmt: skip
        assert shared <= 16 << 10, "queries and weights alone"
    arguments |= dict.fromkeys(("query_starts", "query_lens", "context_lens", "first_items", "summary"), INT)
    compile_kernel("merge", decode._merge_chunks, arguments, HEADS=HeadShape(2, 4, 80, 128), GROUP_BLOCK=4)


def compile_latents() -> None:
    """Of DeepSeek-V3's shape and of GLM-4.7-Flash's, on older chips too, whose tiles are lower."""
    arguments = {"parts": PARTS, "items": ITEMS, "rope_table": FLOAT}
    arguments |= dict.fromkeys(("page_tables", "token_rows", "positions"), INT)
    arguments |= dict.fromkeys(("pages", "output", "projected", "norm", "queries", "x", "weight"), BF16)
    arguments |= dict.fromkeys(("stride", "first", "sin_offset", "num_tokens", "x_stride", "output_stride"), "i32")
    arguments |= {"table_stride": "i32", "eps": "fp32", "scale_log2": "fp32"}
    kinds = [*product(SHARED_MEMORY.items(), (128, 20), (2,)), ((89, SHARED_MEMORY[89]), 16, 4)]
    for (capability, room), num_heads, itemsize in kinds:
        tile_rows, block = 64 if capability == 90 else 16, 64 // itemsize
        group = latent._largest_divisor(num_heads, tile_rows)
        number = FLOAT if itemsize == 4 else BF16
        cut = {**arguments, "query": number, "cache": latent._LatentCache(number, INT, "i32"), "output": number}
        cut |= {"outputs": AttentionOutputs(number, FLOAT, FLOAT), "INDEX": tl.int64, "BLOCK": block, "PAGE_SIZE": 16}
        cut["SHAPE"] = latent._Shape(num_heads, group, 512, 576, 512, 64)
        for name, kernel, block_tokens in (
            ("latent decode", latent._decode_latents, 1),
            ("latent prefill", latent._prefill_latents, tile_rows // group),
        ):
            rows = max(16, triton.next_power_of_2(block_tokens * group))
            bytes_a_stage, other_bytes = block * 576 * itemsize, rows * 576 * itemsize
            num_stages = min(2, max(1, stages_in(room - other_bytes, bytes_a_stage, capability // 10)))
            taken = compile_kernel(
                name, kernel, {**cut, "TILE_ROWS": rows, "BLOCK_TOKENS": block_tokens}, capability=capability,
                num_warps=8 if rows > 16 else 4, num_stages=num_stages,
            )  # fmt: skip
            assert taken <= room - 1024, (capability, num_heads, name, taken)
    pairs = {"NUM_PAIRS": 32, "PAIR_BLOCK": 32, "INTERLEAVED": True, "PAGE_SIZE": 16}
    compile_kernel("latents", latent_rows._store_latents, {**arguments, **pairs, "RANK": 512, "BLOCK": 512})
    compile_kernel("norm of columns", latent_rows._normalise_columns, arguments, SIZE=1536, BLOCK=2048)
    turned = {**arguments, **pairs, "NUM_HEADS": 20, "HEAD_BLOCK": 32, "WIDTH": 256, "OUTPUT_WIDTH": 576}
    compile_kernel("turned queries", latent_rows._turn_queries, turned)
    keys = {"X_HEAD": 192, "OUTPUT_HEAD": 576, "WEIGHT_OUT": 1, "WEIGHT_IN": 512, "IN": 128, "OUT": 512}
    values = {"X_HEAD": 512, "OUTPUT_HEAD": 128, "WEIGHT_OUT": 512, "WEIGHT_IN": 1, "IN": 512, "OUT": 128}
    for shape, (rows, outputs) in product((keys, values), ((16, 32), (64, 128))):
        cut = {**arguments, **shape, "WEIGHT_HEAD": 256 * 512, "ROWS": rows, "OUTPUTS": outputs, "TILE_K": 64}
        compile_kernel("heads", latent_rows._head_product, cut)


def compile_long_prefill() -> None:
    """Copies of contexts in 16 bits and in 8, and attention over them."""
    arguments = {"parts": PARTS, **dict.fromkeys(("page_tables", "starts", "slots"), INT)}
    arguments |= dict.fromkeys(("num_parts", "num_tokens", "table_stride"), "i32")
    blocks = {"PAGE_SIZE": 16, "MIN_QUERY_LEN": 2, "BLOCK": 512, "TOKEN_BLOCK": 32}
    compile_kernel("plan of copies", gather._plan_gather, arguments, num_warps=8, **blocks)
    for pages in (BF16, FP8):
        tokens = {**arguments, "keys": pages, "values": pages, "to_keys": BF16, "to_values": BF16}
        sizes = {"WIDTH": 1024, "WIDTH_BLOCK": 1024, "TOKEN_BLOCK": 8, "INDEX": tl.int64}
        compile_kernel("copies", gather._gather, tokens, **sizes)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    for dtype, head_dim in (("bf16", 128), ("fp16", 64)):
        copies = f"tensordesc<{dtype}[128, {head_dim}],{layout!r}>"
        arguments = {"keys": copies, "values": copies, "kv_starts": INT, "parts": PARTS, "items": ITEMS}
        arguments |= {"scale_log2": "fp32", "query": f"*{dtype}", "output": f"*{dtype}"}
        shared_memory = compile_kernel(
            "long prefill", hopper_prefill._hopper_prefill, arguments, source=GluonASTSource, NUM_KV_HEADS=4, GROUP=7,
            TILE_TOKENS=18, HEAD_DIM=head_dim, BLOCK=128, STAGES=2, ROWS=64, CONSUMER_REGISTERS=240,
            PRODUCER_REGISTERS=24,
        )  # fmt: skip
        assert shared_memory <= SHARED_MEMORY[90] - 1024, (head_dim, shared_memory)


def compile_products() -> None:
    """A row and a tile of them, into rows and into the stream, of weights of 16 bits and of 8, sums cut and whole.

    Every two of these together: norms of a row and cuts of a tile take turns.
    """
    arguments = {"x": BF16, "output": BF16, "num_outputs": "i32", "num_inputs": "i32"}
    kinds = product(((BF16, None), (FP8, FLOAT)), ((False, False), (False, True), (True, False)))
    for i, ((weight, scales), (swiglu, adds)) in enumerate(kinds):
        common = {**arguments, "SWIGLU": swiglu, "ADDS": adds, "GELU": swiglu and i % 2 == 0}
        row = {**common, "norm": BF16 if i % 2 else None, "norm_eps": "fp32", "OUTPUTS": 4, "TILE_K": 1024}
        row |= {"OFFSET": 1.0 if adds else None, "experts": INT if swiglu else None, "CAN_PREFETCH": not swiglu}
        is_bounded = swiglu and scales is None
        row["weights"] = WeightOperand(weight, scales, BF16 if is_bounded else None)
        row |= {"LIMIT": 7.0 if is_bounded else None, "ALPHA": 1.702, "IS_EVEN": not is_bounded}
        compile_kernel("single row", few_rows.single_row_product, row)
        num_parts = 1 + i % 2
        tile = {**common, "weights": WeightOperand(weight, scales, None), "groups": NO_GROUPS, "partial": FLOAT}
        tile |= {"arrivals": INT, "num_rows": "i32", "inputs_per_part": "i32"}
        tile["TILE"] = Tile(16, 64, 128, num_parts, num_parts > 1, num_warps=4, num_stages=3)
        compile_kernel("tile", few_rows.tile_product, tile, GROUP=0, IS_EVEN=True, IN_UNITS=False, CAN_PREFETCH=True)


def compile_delta_rule() -> None:
    """Of Qwen3.6 27B's shape, on older chips too; products as they are and to be scaled."""
    arguments = {"parts": PARTS, **dict.fromkeys(("token_rows", "positions"), INT)}
    arguments |= dict.fromkeys(("mixed", "weight", "tails", "output", "convolved", "qkv"), BF16)
    arguments |= {"decay": delta_rule.DecayOperand(BF16, FLOAT, BF16, "i32"), "matrices": FLOAT}
    arguments |= {"scale": "fp32", "eps": "fp32", "num_tokens": "i32", "SPEC": DeltaSpec(16, 48, 128, 128, 4)}
    sizes = {"NUM_CHANNELS": 10240, "KERNEL_SIZE": 4, "TAIL_LEN": 3, "BLOCK": 512, "CONV_SIZE": 10240}
    sizes |= {"KEY_BLOCK": 128, "VALUE_DIM": 128, "VALUES": 8, "NUM_BLOCKS": 16, "OUTPUT_SIZE": 6144}
    sizes |= {"NUM_HEADS": 24, "HEAD_DIM": 256}
    for scales in (SCALES, NO_SCALES):
        step = {**arguments, **sizes, **scales, "stride": "i32"}
        compile_kernel("short convolution", delta_rule._short_convolution, step)
        compile_kernel("tails", delta_rule._store_tails, step)
        compile_kernel("gated norm", delta_rule._gate_by_norm, {**step, "BLOCK": 128}, num_warps=1)
        compile_kernel("gates", gates._gate_heads, {**step, "BLOCK": 256}, num_warps=1)
    step |= {"MOST": 2**31 - 1, "LEAST": 32, "VALUE_BLOCK": 128, "ROWS": 16, "PARTS_BLOCK": 256}
    chunks = {**step, "solved": BF16, "num_parts": "i32", "IS_EXACT": False, "DTYPE": tl.bfloat16}
    chunks |= {"VALUES": 32, "NUM_BLOCKS": 4}
    for capability in SHARED_MEMORY:
        compile_kernel("delta rule", delta_rule._gated_delta_rule, step, capability=capability, num_warps=1)
    for capability in (89, 90):  # the least shared memory, and the most
        taken = [
            compile_kernel("chunks", kernel, chunks, capability=capability, num_stages=2)
            for kernel in (delta_chunks._solve_chunks, delta_chunks._walk_chunks)
        ]
        assert max(taken) <= SHARED_MEMORY[capability] - 1024, (capability, taken)


def compile_routes(name: str, kernel: Any, router: dict[str, Any], rows: int, num_warps: int) -> None:
    """A kernel that makes logits, with the stages that it gets; of many experts on every chip."""
    for capability in SHARED_MEMORY if router["NUM_EXPERTS"] >= 256 else (90,):
        room = SHARED_MEMORY[capability]
        bytes_a_stage = (router["EXPERT_BLOCK"] + rows) * router["TILE_K"] * 2
        num_stages = max(1, min(3, stages_in(room, bytes_a_stage, capability // 10)))
        taken = compile_kernel(
            name, kernel, router, capability=capability, num_stages=num_stages, num_warps=num_warps, ROWS=rows
        )
        assert taken <= room - 1024, (name, capability, router["NUM_EXPERTS"], taken)


def compile_experts() -> None:
    """Routes, and products of few and many tokens with weights of 16 bits and of 8, biases and bounds too."""
    arguments = {"x": BF16, "router": BF16, "experts": INT, "weights": FLOAT, "partial": FLOAT, "arrivals": INT}
    arguments |= {"num_tokens": "i32", "num_inputs": "i32", "inputs_per_part": "i32", "norm_eps": "fp32"}
    arguments |= {"order": INT, "starts": INT, "num_pairs": "i32"}
    plain, bounded = {"bias": None, "LIMIT": None, "ALPHA": None}, {"bias": BF16, "LIMIT": 7.0, "ALPHA": 1.702}
    for num_experts, weight in ((128, BF16), (128, None), (8, None), (512, None), (256, BF16)):
        router = {**arguments, "norm": weight, "NUM_EXPERTS": num_experts, "EXPERT_BLOCK": max(num_experts, 16)}
        router["squares"] = FLOAT
        router |= {"NUM_PARTS": 8, "HAS_NORM": weight is not None, "CAN_PREFETCH": True}
        router["bias"] = BF16 if num_experts == 8 else None
        router["TILE_K"] = 64 if num_experts == 512 else 128
        num_warps = 8 if num_experts >= 256 else 4
        has_groups = num_experts == 256
        router["correction"] = FLOAT if has_groups else None
        router["more"] = FLOAT if num_experts == 128 else None
        num_groups = (8, 4) if has_groups else (1, 1)
        router["CHOICE"] = routing._Choice(6, 8, weight is None, has_groups, *num_groups, 2.5)
        compile_routes("logits of experts", routing._parts_of_logits, router, 16, num_warps)
        compile_kernel("choice of experts", routing._choose, router, num_warps=1)
        if num_experts != 8:
            compile_routes("routes", routing._route_many, router, 64, num_warps)
    compile_kernel("order of pairs", pair_order._order_pairs, arguments, BLOCK=8192, num_warps=16)
    sizes = {"COUNTS": PairCounts(128, 128, 8), "PER_TOKEN": 8}
    arguments |= {"output": BF16, "pairs": ExpertPairs(INT, INT, FLOAT), "num_outputs": "i32", **sizes}
    arguments |= WITHOUT_ADAPTERS
    kinds = [*product(((BF16, None), (FP8, FLOAT)), (512, 16_384), (False, True), (plain,))]
    kinds += [((BF16, None), 512, False, bounded), ((BF16, None), 16_384, True, bounded)]
    kinds += [((FP8, FLOAT), 512, True, bounded), ((FP8, FLOAT), 16_384, False, bounded)]
    for (weight, scales), num_pairs, swiglu, more in kinds:
        tile = expert_tiles.expert_tile(num_pairs, 128, 2, False, swiglu)
        more = dict(more)
        cut = {"weights": WeightOperand(weight, scales, more.pop("bias")), "TILE": tile}
        kernel = experts._expert_product if num_pairs == 512 else expert_many_pairs.many_pairs_product
        taken = compile_kernel(
            "experts", kernel, {**arguments, **cut, **more}, SWIGLU=swiglu, IS_EVEN=more["LIMIT"] is None,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        assert taken <= SHARED_MEMORY[90] - 1024, (tile, weight, taken)
    arguments |= {"made": BF16, "total": BF16, "activated": BF16, "HIDDEN": 2048, "BLOCK": 1024}
    compile_kernel("sum of experts", experts._add_pairs, arguments)
    for weight, scales in ((BF16, None), (FP8, FLOAT)):
        single = {**arguments, "shares": FLOAT, "SIZE": 768, "OUTPUTS": 4, "TILE_K": 1024}
        single["weights"] = WeightOperand(weight, scales, None if scales else BF16)
        compile_kernel("single sum", experts._single_sum, {**single, "CAN_PREFETCH": True})


def compile_expert_groups() -> None:
    """Of MXFP4, 4 bits with zeros and an order, and 8: few pairs and many, gated and not, for older chips too."""
    arguments = {"x": BF16, "output": BF16, "pairs": ExpertPairs(INT, INT, FLOAT)}
    arguments |= dict.fromkeys(("num_outputs", "num_inputs", "num_groups"), "i32")
    arguments |= {"COUNTS": PairCounts(32, 32, 4), "IS_EVEN": True, "IN_ASSEMBLY": True}
    arguments |= WITHOUT_ADAPTERS
    plain, bounded = {"LIMIT": None, "ALPHA": None}, {"LIMIT": 7.0, "ALPHA": 1.702}
    formats = {
        "*u8": ("*u8", GroupOperand("*u8", None, None), bounded, 64),
        INT: ("*u8", GroupOperand(INT, None, INT), plain, 128),
        BF16: (FP8, GroupOperand(BF16, None, None), plain, 128),
    }
    for (scales, (codes, groups, more, span)), num_pairs, swiglu in product(
        formats.items(), (128, 4096), (False, True)
    ):
        tile = expert_tiles.expert_group_tile(num_pairs, 32, span, 2, False, swiglu)
        bias = BF16 if more is bounded else None
        cut = {"weights": WeightOperand(codes, None, bias), "groups": groups, **more, "TILE": tile, "SWIGLU": swiglu}
        cut |= {"IN_UNITS": tile.rows > expert_tiles.MAX_SUMMED_ROWS, "GROUP": 128}
        taken = compile_kernel(
            "experts in groups", expert_groups.groups_tile_product, {**arguments, **cut},
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        assert taken <= SHARED_MEMORY[90] - 1024, (tile, scales, taken)
    codes, groups, more, _ = formats["*u8"]
    older = {**arguments, **cut, **more, "weights": WeightOperand(codes, None, BF16), "groups": groups}
    for span in (32, 64):
        older |= {"TILE": tile._replace(k=span), "IN_UNITS": False}
        compile_kernel("experts in groups", expert_groups.groups_tile_product, older, capability=80)


def compile_stages() -> None:
    """Pipelined products fill the shared memory of every chip, and no more."""
    arguments = {"x": BF16, "output": BF16, "weights": WeightOperand(BF16, None, None), "groups": NO_GROUPS}
    arguments |= dict.fromkeys(("num_outputs", "num_inputs", "num_rows", "inputs_per_part"), "i32")
    arguments |= {"partial": FLOAT, "arrivals": INT, "ADDS": False, "IS_EVEN": True, "GELU": False}
    for (capability, shared_memory), (rows, swiglu) in product(SHARED_MEMORY.items(), ((32, False), (64, True))):
        num_stages = min(5, stages_in(shared_memory, (64 * (1 + swiglu) + rows) * 128 * 2, capability // 10))
        tile = {**arguments, "SWIGLU": swiglu, "CAN_PREFETCH": True, "IN_UNITS": False}
        tile["GROUP"] = 0
        tile["TILE"] = Tile(rows, 64, 128, 1, False, num_warps=4, num_stages=num_stages)
        taken = compile_kernel("stages", few_rows.tile_product, tile, capability=capability, num_stages=num_stages)
        assert num_stages > 2, (capability, rows, swiglu)
        assert taken <= shared_memory - 1024, (capability, rows, swiglu, taken)


def compile_groups() -> None:
    """Codes of 4 bits and of 8, gated and added, with zeros and an order and without, for few rows and for many."""
    arguments = {"x": BF16, "output": BF16, "partial": FLOAT, "arrivals": INT}
    arguments |= dict.fromkeys(("num_rows", "num_outputs", "num_inputs", "inputs_per_part"), "i32")
    codes = {
        "joined": ("*u8", INT, None, INT),
        "apart": ("*u8", FLOAT, "*u8", None),
        "8 bits": (FP8, FLOAT, None, None),
    }
    arguments |= {"num_groups": "i32", "GROUP": 128}
    for span in (32, 64):
        written = {**arguments, "codes": "*u8", "scales": "*u8", "num_blocks": "i32"}
        compile_kernel("floats written out", mxfp4._write_out, written, OUTPUTS=32, SPAN=span, IN_ASSEMBLY=True)
    for weight, scales, zeros, order in codes.values():
        operands = {"weights": WeightOperand(weight, None, None), "groups": GroupOperand(scales, zeros, order)}
        written = {**arguments, **operands, "codes": weight}
        compile_kernel("written out", group_numbers._write_out, written, OUTPUTS=32, SPAN=128, IN_ASSEMBLY=True)
        for rows, swiglu in ((16, False), (64, True)):
            tile = {**arguments, **operands, "SWIGLU": swiglu, "ADDS": not swiglu, "GELU": False}
            tile |= {"IS_EVEN": True, "CAN_PREFETCH": True, "IN_UNITS": rows > 16}
            tile["TILE"] = Tile(rows, 64, 128, 2, True, num_warps=4, num_stages=3)
            compile_kernel("groups", few_rows.tile_product, tile)
        if weight != FP8:
            row = {**written, "norm": BF16 if zeros else None, "norm_eps": "fp32", "OUTPUTS": 4, "PIECES": 128}
            row |= {"SPAN": 128, "SWIGLU": zeros is not None, "GELU": False, "OFFSET": None, "ADDS": zeros is None}
            compile_kernel("row of groups", group_row.single_row_of_groups, row, IN_ASSEMBLY=True)
    operands = {"weights": WeightOperand("*u8", None, None), "groups": GroupOperand(INT, None, None)}
    for group, dtype, capability in ((32, BF16, 90), (64, "*fp16", 90), (128, "*fp16", 80)):
        tile |= {**operands, "GROUP": group, "x": dtype, "output": dtype}
        tile["TILE"] = tile["TILE"]._replace(k=64 if group == 64 else 128)
        compile_kernel("groups", few_rows.tile_product, tile, capability=capability)
    for swiglu in (False, True):
        wide = {**tile, "x": BF16, "output": BF16, "SWIGLU": swiglu, "ADDS": not swiglu}
        wide["TILE"] = Tile(128, 128, 128, 1, False, num_warps=8, num_stages=3)
        taken = compile_kernel("groups", few_rows.tile_product, wide, num_warps=8)
        assert taken <= SHARED_MEMORY[90] - 1024, taken


def compile_groups_on_hopper() -> None:
    """Gated and added, sums whole and in parts. Products are asked for and not waited for one by one.

    Where the compiler cannot tell who reads a sum when, it waits behind every product.
    """
    arguments = {"scales": INT, "output": BF16, "partial": FLOAT, "arrivals": INT, "bias": None, "GELU": False}
    arguments |= dict.fromkeys(("num_rows", "num_outputs", "num_turns"), "i32")
    for dtype, group, swiglu, tile in (
        ("bf16", 128, True, HopperTile(128, 1, 4)),
        ("bf16", 128, False, HopperTile(64, 2, 6)),
        ("fp16", 4096, False, HopperTile(128, 2, 4)),
    ):
        rows = f"tensordesc<{dtype}[32, 64],{group_hopper.layout_of(128)!r}>"
        codes = f"tensordesc<i16[64, 32],{group_hopper.layout_of(64)!r}>"
        kernel = {**arguments, "rows": rows, "words": codes, "output": f"*{dtype}", "bias": None if swiglu else BF16}
        kernel |= {"TILE": tile, "GROUP": group, "SWIGLU": swiglu, "ADDS": not swiglu}
        taken = compile_kernel(
            "groups on Hopper", group_hopper.groups_product, kernel, source=GluonASTSource, most_waits=4
        )
        assert taken <= SHARED_MEMORY[90] - 1024, taken


def compile_all_reduce() -> None:
    """Between two GPUs and four, alone and added, in each format."""
    arguments = {"x": INT, "output": INT, "inboxes": "*i64", "inbox": "*i64", "calls": INT}
    arguments |= {"num_words": "i32", "capacity": "i32", "BLOCK": all_reduce.WORDS_PER_PROGRAM}
    for num_ranks, dtype in ((2, tl.bfloat16), (4, tl.float16), (2, tl.float32)):
        more = {"RANK": 1, "NUM_RANKS": num_ranks, "DTYPE": dtype, "ADDS": num_ranks == 2}
        compile_kernel("all-reduce", all_reduce._all_reduce, {**arguments, **more})
    arguments |= {"turns": INT, "num_flag_words": "i32"}
    for num_ranks, num_parts, dtype, lag in ((2, 1, tl.bfloat16, 1), (4, 4, tl.float16, 2), (2, 2, tl.float32, 1)):
        more = {"RANK": 1, "NUM_RANKS": num_ranks, "NUM_PARTS": num_parts, "DTYPE": dtype, "LAG": lag}
        more |= {"PART": 4096 // num_parts, "ADDS": num_parts < 4}
        compile_kernel("sums in chunks", chunked_all_reduce._chunked_all_reduce, {**arguments, **more}, num_warps=8)
        arguments |= {"num_rows": "i32", "row_words": "i32", "SLOT_WORDS": 8192, "LAG": lag}
        for rank in (0, 1):
            compile_kernel("columns in chunks", chunked_all_reduce._chunked_gather, {**arguments, **more, "RANK": rank})


def compile_adapters() -> None:
    """Of few tokens and of many, one part and three, in 16 bits and in 32, on the chip with the least shared memory."""
    arguments = dict.fromkeys(("order", "entries", "blocks"), INT)
    arguments |= {"shrunk": FLOAT, "num_tokens": "i32", "num_inputs": "i32", "inputs_per_split": "i32"}
    arguments |= {"slot_stride": "i64", "num_numbers": "i32", "num_outputs": "i32"}
    for dtype, size, rows, rank, num_parts, capability in (
        (BF16, 2, 16, 16, 3, 90), (BF16, 2, 64, 256, 1, 90), (BF16, 2, 16, 48, 2, 89), (FLOAT, 4, 64, 32, 3, 89),
    ):  # fmt: skip
        numbers = min(64, triton.next_power_of_2(num_parts * rank))
        num_stages = min(4, stages_in(SHARED_MEMORY[capability], (rows + numbers) * 128 * size, capability // 10))
        kernel = {**arguments, "x": dtype, "factor_a": dtype, "factor_b": dtype, "output": dtype, "RANK": rank}
        kernel |= {"ROWS": rows, "NUMBERS": numbers, "TILE_K": 128, "CAN_PREFETCH": True}
        kernel |= {"IS_EVEN": rank != 48, "NUM_SPLITS": 8}
        taken = compile_kernel("shrink", adapters._shrink, kernel, capability=capability, num_stages=max(num_stages, 1))
        assert taken <= SHARED_MEMORY[capability] - 1024, (capability, taken)
        compile_kernel("expand", adapters._expand, kernel, capability=capability)
        halves = {"gate_up": dtype, "UP_PART": num_parts - 1, "GELU": rows == 64}
        compile_kernel("gated expand", adapters._expand_gated, {**kernel, **halves}, capability=capability)
    fields = {"factor_a": BF16, "factor_b": BF16, "a_stride": "i32", "b_stride": "i32", "shrunk": BF16}
    fields["num_products"] = "i32"
    operand = adapted_product.AdapterOperand(
        **dict.fromkeys(("slots", "active", "step", "parts", "flags"), INT), **fields
    )
    arguments = {"x": BF16, "output": BF16, "partial": FLOAT, "arrivals": INT, "adapters": operand}
    arguments |= dict.fromkeys(("num_rows", "num_outputs", "num_inputs", "inputs_per_part", "number"), "i32")
    for capability, num_rows, swiglu, num_parts in ((90, 64, False, 2), (90, 64, True, 1), (89, 16, True, 1)):
        tile = Tile(num_rows, 64, 128, num_parts, num_parts > 1, num_warps=4, num_stages=4)
        bytes_a_stage = ((2 if swiglu else 1) * 64 + num_rows) * 128 * 2
        num_stages = min(4, stages_in(SHARED_MEMORY[capability], bytes_a_stage, capability // 10))
        kernel = {**arguments, "SWIGLU": swiglu, "GELU": False, "ADDS": not swiglu, "ON_GPU": True}
        kernel |= {"weights": WeightOperand(BF16, None, None), "TILE": tile}
        kernel["SHAPE"] = adapted_product.LowRankShape(8, 32 if swiglu else 48, 16)
        taken = compile_kernel(
            "product with adapters", adapted_product._adapted_product, kernel, capability=capability,
            num_stages=num_stages,
        )  # fmt: skip
        assert taken <= SHARED_MEMORY[capability] - 1024, (capability, taken)


def compile_expert_adapters() -> None:
    """Of few pairs and of many, gated and not, with weights of 16 bits, of 8 and in groups."""
    arguments = {"x": BF16, "factor_a": BF16, "pairs": ExpertPairs(INT, INT, FLOAT), "shrunk": FLOAT, "output": BF16}
    arguments |= {"slots": INT, "active": INT, "slot_stride": "i64", "num_numbers": "i32"}
    arguments |= dict.fromkeys(("num_pairs", "num_inputs", "num_outputs", "inputs_per_split"), "i32")
    arguments |= {"COUNTS": PairCounts(128, 128, 8), "LIMIT": None, "ALPHA": None}
    arguments["adapters"] = expert_adapters.PairAdapters(BF16, "i64", INT, INT, FLOAT, "i32")
    for num_pairs, swiglu, rank, (weight, scales) in (
        (512, False, 16, (BF16, None)), (512, True, 64, (FP8, FLOAT)), (4096, True, 64, (BF16, None)),
        (16_384, False, 48, (BF16, None)), (16_384, True, 64, (FP8, FLOAT)),
    ):  # fmt: skip
        cut = {"ROWS": 16 if num_pairs < 2048 else 64, "NUMBERS": 32, "TILE_K": 128, "IS_EVEN": rank != 48}
        cut |= {"SWIGLU": swiglu, "RULE": expert_adapters.PairRule(rank, min(rank & -rank, 64), 4 if rank == 16 else 1)}
        compile_kernel("shrink pairs", expert_adapters._shrink_pairs, {**arguments, **cut}, num_stages=3)
        tile = expert_tiles.expert_tile(num_pairs, 128, 2, False, swiglu)
        kernel = expert_many_pairs.many_pairs_product if tile.rows >= 128 else experts._expert_product
        cut |= {"weights": WeightOperand(weight, scales, None), "IS_EVEN": True, "TILE": tile}
        taken = compile_kernel(
            "experts with adapters", kernel, {**arguments, **cut}, num_warps=tile.num_warps, num_stages=tile.num_stages
        )
        assert taken <= SHARED_MEMORY[90] - 1024, (tile, rank, taken)
    more = {"weights": WeightOperand("*u8", None, BF16), "groups": GroupOperand("*u8", None, None), "LIMIT": 7.0}
    more |= {"ALPHA": 1.702, "IN_UNITS": False, "IN_ASSEMBLY": True, "GROUP": 32, "num_groups": "i32"}
    for num_pairs in (512, 16_384):
        tile = expert_tiles.expert_group_tile(num_pairs, 128, 64, 2, False, True)
        taken = compile_kernel(
            "experts in groups with adapters", expert_groups.groups_tile_product,
            {**arguments, **cut, **more, "TILE": tile}, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        assert taken <= SHARED_MEMORY[90] - 1024, (tile, taken)


def compile_draws() -> None:
    """Of logits in 16 bits and in 32, for all rows and for either sort."""
    arguments = {"fields": INT, "rows": INT, "positions": INT, "vocab_size": "i32", "row_stride": "i32"}
    arguments |= {"scales": FLOAT, "keys": "*i64", "thresholds": FLOAT, "candidates": FLOAT, "counts": INT}
    arguments |= {"best_scores": FLOAT, "best_ids": INT, "block": "i32", "best_stride": "i32", "num_blocks": "i32"}
    arguments |= dict.fromkeys(("out_token_ids", "last_token_ids", "token_ids", "entry_ids", "allowed", "output"), INT)
    arguments |= {"adjusted": FLOAT, "entry_values": FLOAT, "stats": FLOAT, "stats_stride": "i32", "num_words": "i32"}
    for (logits, size), which in product(((BF16, 2), (FLOAT, 4)), (0, 1, 2)):
        numbers = {"TILE": 16384 // size, "VEC": 16 // size, "SHIFT": 16 if size == 2 else 0, "WHICH": which}
        draw = {**arguments, "logits": logits}
        compile_kernel("cuts", sampling._prepare, {**draw, **numbers}, CAPACITY=4096, num_warps=16, maxnreg=64)
        best = {**draw, "TILE": 1024, "WHICH": which, "FAST_LOG": True}
        compile_kernel("best of blocks", sampling._best_of_blocks, best)
    for counts in (False, True):
        compile_kernel("best of rows", sampling._best_of_rows, arguments, BLOCKS=256, COUNTS=counts, num_warps=1)
    for logits in (BF16, FLOAT):
        draw = {**arguments, "logits": logits}
        compile_kernel("adjust", adjust._adjust_blocks, draw, BLOCK=4096, num_warps=8)
        compile_kernel("log probabilities", logprobs._of_blocks, draw, ASKED=11, BLOCK=4096, num_warps=8)
        compile_kernel("log probabilities", logprobs._of_rows, draw, ASKED=11, MOST=20, BLOCKS=64)
    compile_kernel("entries", adjust._apply_entries, arguments, CAPACITY=2048, BLOCK=128)


if __name__ == "__main__":
    compile_adapters()
    compile_draws()
    compile_norms()
    compile_activations()
    compile_rope()
    compile_attention()
    compile_delta_rule()
    compile_latents()
    compile_long_prefill()
    compile_products()
    compile_experts()
    compile_expert_groups()
    compile_expert_adapters()
    compile_stages()
    compile_groups()
    compile_groups_on_hopper()
    compile_all_reduce()
