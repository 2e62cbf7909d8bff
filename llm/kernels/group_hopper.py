"""Products of 33 to 512 rows with weights in groups of 4 bits on Hopper, in Gluon.

One warp fetches rows and codes by bulk copies. Two groups of four warps widen the codes and multiply, each 2 × 64
outputs of a tile: while the tensor cores work for one of its halves, a group widens the numbers of the other, and
changes the unit of its sum. Triton's own products are waited for one by one, which is why `groups` cannot.
"""

from functools import cache

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llm.config import Activation
from llm.core.weight_groups import WeightGroups
from llm.kernels.activation import gated
from llm.kernels.group_codes import quarters, scale_in, zero_in
from llm.kernels.groups import behind, unit_of
from llm.kernels.launch import launch_options
from llm.kernels.operands import WeightOperand
from llm.kernels.tiles import HOPPER_OUTPUTS, HOPPER_SPAN, HopperTile

_BLOCK = gl.constexpr(64)
"""Outputs that a group of warps multiplies at once."""
_BOX = gl.constexpr(32)
"""Rows of a bulk copy: where no row is left, nothing is copied."""
_WORDS = gl.constexpr(32)
"""Of 16 bits that hold one output's codes of a span."""
_PANEL = gl.constexpr(64)
"""Inputs in the 128 bytes of a row by which shared memory is swizzled."""
_CONSUMER_REGISTERS, _PRODUCER_REGISTERS = gl.constexpr(240), gl.constexpr(24)


def runs_on_hopper(groups: WeightGroups, device: torch.device) -> bool:
    """Whether this kernel takes such weights: on Hopper, with a scale and a zero in a word, for whole spans."""
    return (
        groups.scales.dtype == torch.int32
        and groups.span == HOPPER_SPAN
        and groups.size % HOPPER_SPAN == 0
        and _is_hopper(device)
    )


@cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def hopper_product(
    x: torch.Tensor, weights: WeightOperand, groups: WeightGroups, output: torch.Tensor,
    scratch: tuple[torch.Tensor, torch.Tensor], tile: HopperTile, gated_by: Activation | None, *, adds: bool,
) -> torch.Tensor:  # fmt: skip
    """Write or add the product of x, (rows, in), to `output`, (rows, out).

    Args:
        weights: codes, without scales.
        scratch: see `Linear.scratch`.
    """
    (num_rows, num_inputs), num_outputs = x.shape, output.shape[1]
    rows = TensorDescriptor.from_tensor(x, [_BOX.value, _PANEL.value], layout_of(128))
    codes = TensorDescriptor.from_tensor(
        weights.numbers.view(torch.int16), [_BLOCK.value, _WORDS.value], layout_of(2 * _WORDS.value)
    )
    swiglu = gated_by is not None
    num_blocks = num_outputs * (2 if swiglu else 1) // HOPPER_OUTPUTS
    groups_product[(triton.cdiv(num_rows, tile.rows), num_blocks, tile.num_parts)](
        rows, codes, groups.scales, weights.bias, output, *scratch, num_rows, num_outputs,
        num_inputs // HOPPER_SPAN // tile.num_parts, TILE=tile, GROUP=groups.size, SWIGLU=swiglu,
        GELU=gated_by is Activation.GELU_TANH, ADDS=adds, num_warps=4, **launch_options(x.device),
    )  # fmt: skip
    return output


def layout_of(swizzled_bytes: int) -> gl.NVMMASharedLayout:
    """Of numbers of 16 bits in shared memory, whose order changes within so many bytes from row to row."""
    return gl.NVMMASharedLayout(swizzle_byte_width=swizzled_bytes, element_bitwidth=16, rank=2)


@gluon.jit(do_not_specialize=["num_rows", "num_turns"])
def groups_product(
    rows, words, scales, bias, output, partial, arrivals, num_rows, num_outputs, num_turns, TILE: gl.constexpr,
    GROUP: gl.constexpr, SWIGLU: gl.constexpr, GELU: gl.constexpr, ADDS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Program (block of rows, block of outputs, part of the sum)."""
    ROWS: gl.constexpr = TILE.rows
    STAGES: gl.constexpr = TILE.num_stages
    if PDL:
        gdc_launch_dependents()
    first_row = gl.program_id(0) * ROWS
    first_turn = gl.program_id(2) * num_turns
    HALF: gl.constexpr = _BLOCK if SWIGLU else 2 * _BLOCK
    first_out = gl.program_id(1) * 2 * HALF
    second_block = num_outputs if SWIGLU else _BLOCK

    x_tiles = gl.allocate_shared_memory(rows.dtype, [STAGES, ROWS, 2 * _PANEL], rows.layout)
    code_tiles = gl.allocate_shared_memory(gl.int16, [STAGES * 4, _BLOCK, _WORDS], words.layout)
    have_codes = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    have_rows = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(have_codes.index(stage), count=1)
        mbarrier.init(have_rows.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    fence_async_shared()
    gl.thread_barrier()
    ring = x_tiles, code_tiles, have_codes, have_rows, free
    turns = first_turn, num_turns
    rows_left = num_rows - first_row
    place = gl.program_id(1) * gl.num_programs(0) + gl.program_id(0)
    first: gl.constexpr = 0
    second: gl.constexpr = 1
    tile = first_row, rows_left, first_out, second_block, num_outputs, place
    memory = scales, bias, output, partial, arrivals
    gl.warp_specialize(
        [
            (_multiply, (ring, turns, tile, memory, first, HALF, GROUP, TILE, SWIGLU, GELU, ADDS, PDL)),
            (_multiply, (ring, turns, tile, memory, second, HALF, GROUP, TILE, SWIGLU, GELU, ADDS, PDL)),
            (_fetch, (rows, words, ring, turns, tile, HALF, PDL)),
        ],
        [4, 1],
        [_CONSUMER_REGISTERS, _PRODUCER_REGISTERS],
    )


@gluon.jit
def _fetch_codes(words, ring, stage, turn, tile, HALF: gl.constexpr):
    """Ask for the codes of one span."""
    _, code_tiles, have_codes, _, _ = ring
    _, _, first_out, second_block, _, _ = tile
    mbarrier.expect(have_codes.index(stage), 4 * words.block_type.nbytes)
    for block in gl.static_range(4):
        out = first_out + block // 2 * HALF + block % 2 * second_block
        tma.async_copy_global_to_shared(
            words, [out, turn * _WORDS], have_codes.index(stage), code_tiles.index(stage * 4 + block)
        )


@gluon.jit
def _fetch_rows(rows, ring, stage, turn, tile, num_boxes):
    """Ask for the rows' numbers at the inputs of one span."""
    x_tiles, _, _, have_rows, _ = ring
    STAGES: gl.constexpr = x_tiles.shape[0]
    MOST: gl.constexpr = x_tiles.shape[1] // _BOX
    for count in gl.static_range(1, MOST + 1):
        mbarrier.expect(have_rows.index(stage), count * 2 * rows.block_type.nbytes, count == num_boxes)
    boxes = x_tiles._reinterpret(x_tiles.dtype, [STAGES * 2 * MOST, _BOX, _PANEL], rows.layout)
    for panel in gl.static_range(2):
        for box in gl.static_range(MOST):
            tma.async_copy_global_to_shared(
                rows, [tile[0] + box * _BOX, turn * (2 * _PANEL) + panel * _PANEL], have_rows.index(stage),
                boxes.index((stage * 2 + panel) * MOST + box), box < num_boxes,
            )  # fmt: skip


@gluon.jit
def _fetch(rows, words, ring, turns, tile, HALF: gl.constexpr, PDL: gl.constexpr):
    """The warp that fetches, as soon as both groups have read what is there."""
    x_tiles, _, _, _, free = ring
    first_turn, num_turns = turns
    STAGES: gl.constexpr = x_tiles.shape[0]
    MOST: gl.constexpr = x_tiles.shape[1] // _BOX
    num_boxes = gl.minimum((tile[1] + _BOX - 1) // _BOX, MOST)
    num_early = gl.minimum(num_turns, STAGES)
    for i in range(num_early):  # weights depend on nobody: these come while the kernel before drains
        _fetch_codes(words, ring, i, first_turn + i, tile, HALF)
    if PDL:
        gdc_wait()
    for i in range(num_early):
        _fetch_rows(rows, ring, i, first_turn + i, tile, num_boxes)
    for i in range(num_early, num_turns):
        stage = i % STAGES
        mbarrier.wait(free.index(stage), (i // STAGES & 1) ^ 1)
        _fetch_codes(words, ring, stage, first_turn + i, tile, HALF)
        _fetch_rows(rows, ring, stage, first_turn + i, tile, num_boxes)


@gluon.jit
def _unit(word):
    """The scale in a joined word, as the unit of a sum."""
    return unit_of(scale_in(word))


@gluon.jit
def _widened(words, word, DTYPE: gl.constexpr, LAYOUT: gl.constexpr):
    """The codes of a span less their zeros, (64, 128), as the tensor cores' left operand."""
    zero = gl.convert_layout(zero_in(word).to(gl.uint8), gl.SliceLayout(1, LAYOUT), assert_trivial=True)[:, None]
    one, two, three, four = quarters(words, zero, zero, zero, zero, DTYPE, True)
    numbers = behind(behind(one, two), behind(three, four))
    return gl.convert_layout(numbers, LAYOUT, assert_trivial=True)


@gluon.jit
def _multiply(
    ring, turns, tile, memory, SELF: gl.constexpr, HALF: gl.constexpr, GROUP: gl.constexpr, TILE: gl.constexpr,
    SWIGLU: gl.constexpr, GELU: gl.constexpr, ADDS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """A group of warps that multiplies: two blocks of 64 outputs."""
    NUM_PARTS: gl.constexpr = TILE.num_parts
    sum_0, sum_1 = _sums(ring, turns, tile, memory[0], SELF, HALF, GROUP, SWIGLU)
    if PDL:
        gdc_wait()
    if NUM_PARTS == 1:
        _write(sum_0, sum_1, tile, memory, SELF, HALF, SWIGLU, GELU, ADDS)
    else:
        sum_0, sum_1, is_last = _shared(sum_0, sum_1, memory, tile[5] * 2 + SELF, NUM_PARTS)
        if is_last:
            _write(sum_0, sum_1, tile, memory, SELF, HALF, SWIGLU, GELU, ADDS)


@gluon.jit
def _joined_at(scale_row, turn, size, second_block, SPANS_A_GROUP: gl.constexpr):
    """Scales and zeros, joined, of both blocks in the group of a span."""
    offset = turn // SPANS_A_GROUP * size
    return gl.load(scale_row + offset), gl.load(scale_row + offset + second_block)


@gluon.jit
def _sums(ring, turns, tile, scales, SELF: gl.constexpr, HALF: gl.constexpr, GROUP: gl.constexpr, SWIGLU: gl.constexpr):
    """The sums of two blocks of 64 outputs over all turns, (64, rows) float32 each.

    At the end of each turn no product is under way: the compiler would wait behind every single one otherwise.
    """
    x_tiles, code_tiles, have_codes, have_rows, free = ring
    first_turn, num_turns = turns
    _, _, first_out, second_block, num_outputs, _ = tile
    STAGES: gl.constexpr = x_tiles.shape[0]
    ROWS: gl.constexpr = x_tiles.shape[1]
    DTYPE: gl.constexpr = x_tiles.dtype
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUM, 2)
    SPANS_A_GROUP: gl.constexpr = GROUP // (2 * _PANEL)
    size = 2 * num_outputs if SWIGLU else num_outputs
    scale_row = scales + (first_out + SELF * HALF + gl.arange(0, _BLOCK, gl.SliceLayout(1, SUM)))
    last_turn = first_turn + num_turns - 1
    word_0, word_1 = _joined_at(scale_row, first_turn, size, second_block, SPANS_A_GROUP)
    next_turn = gl.minimum(first_turn + 1, last_turn)
    next_0, next_1 = _joined_at(scale_row, next_turn, size, second_block, SPANS_A_GROUP)
    unit_0, unit_1 = _unit(word_0), _unit(word_1)
    sum_0 = gl.zeros([_BLOCK, ROWS], gl.float32, SUM)
    sum_1 = gl.zeros([_BLOCK, ROWS], gl.float32, SUM)
    mbarrier.wait(have_codes.index(0), 0)
    left_0 = _widened(code_tiles.index(2 * SELF).load(LEFT), word_0, DTYPE, LEFT)
    mbarrier.wait(have_rows.index(0), 0)
    for i in range(num_turns):
        stage = i % STAGES
        columns = x_tiles.index(stage).permute((1, 0))
        product_0 = warpgroup_mma(left_0, columns, sum_0, is_async=True)
        codes_1 = code_tiles.index(stage * 4 + 2 * SELF + 1).load(LEFT)
        left_1 = _widened(codes_1, word_1, DTYPE, LEFT)
        product_1 = warpgroup_mma(left_1, columns, sum_1, is_async=True)
        word_0, word_1 = next_0, next_1
        next_turn = gl.minimum(first_turn + i + 2, last_turn)
        next_0, next_1 = _joined_at(scale_row, next_turn, size, second_block, SPANS_A_GROUP)
        old_unit_0, old_unit_1 = unit_0, unit_1
        unit_0, unit_1 = _unit(word_0), _unit(word_1)
        then = gl.minimum(i + 1, num_turns - 1)  # the last turn looks at its own codes again
        next_stage = then % STAGES
        mbarrier.wait(have_codes.index(next_stage), then // STAGES & 1)
        codes_0 = code_tiles.index(next_stage * 4 + 2 * SELF).load(LEFT)
        sum_0, left_0 = warpgroup_mma_wait(1, deps=[product_0, left_0])
        left_0 = _widened(codes_0, word_0, DTYPE, LEFT)
        sum_0 = sum_0 * gl.fdiv(old_unit_0, unit_0)[:, None]
        mbarrier.wait(have_rows.index(next_stage), then // STAGES & 1)
        sum_1, left_1 = warpgroup_mma_wait(0, deps=[product_1, left_1])
        mbarrier.arrive(free.index(stage))
        sum_1 = sum_1 * gl.fdiv(old_unit_1, unit_1)[:, None]
    return sum_0 * unit_0[:, None], sum_1 * unit_1[:, None]


@gluon.jit
def _shared(sum_0, sum_1, memory, place, NUM_PARTS: gl.constexpr):
    """Put a part of two sums to the others: the whole sums, and whether this group arrived last, as otherwise there are
    none."""
    _, _, _, partial, arrivals = memory
    SUM: gl.constexpr = sum_0.type.layout
    ROWS: gl.constexpr = sum_0.shape[1]
    SIZE: gl.constexpr = _BLOCK * ROWS
    out = gl.arange(0, _BLOCK, gl.SliceLayout(1, SUM))[:, None]
    row = gl.arange(0, ROWS, gl.SliceLayout(0, SUM))[None, :]
    # What the threads hold in one register lies together: a warp writes and reads whole lines.
    register = row // 8 * 4 + out // 8 % 2 * 2 + row % 2
    thread = out // 16 * 32 + out % 8 * 4 + row % 8 // 2
    tile = register * 128 + thread
    parts = partial + place.to(gl.int64) * (2 * NUM_PARTS * SIZE)
    own = parts + gl.program_id(2) * (2 * SIZE)
    gl.store(own + tile, sum_0)
    gl.store(own + SIZE + tile, sum_1)
    gl.thread_barrier()  # every thread's share is written before this group counts as arrived
    is_last = gl.atomic_add(arrivals + place, 1, sem="acq_rel") == NUM_PARTS - 1
    if is_last:
        gl.store(arrivals + place, 0)
        sum_0 = gl.zeros([_BLOCK, ROWS], gl.float32, SUM)
        sum_1 = gl.zeros([_BLOCK, ROWS], gl.float32, SUM)
        for part in gl.static_range(NUM_PARTS):
            # Past the first-level cache, which does not see other multiprocessors' writes.
            sum_0 += gl.load(parts + part * (2 * SIZE) + tile, cache_modifier=".cg")
            sum_1 += gl.load(parts + part * (2 * SIZE) + SIZE + tile, cache_modifier=".cg")
    return sum_0, sum_1, is_last


@gluon.jit
def _write(
    sum_0, sum_1, tile, memory, SELF: gl.constexpr, HALF: gl.constexpr, SWIGLU: gl.constexpr, GELU: gl.constexpr,
    ADDS: gl.constexpr,
):  # fmt: skip
    """Write or add what came out: of gate and up, or of two blocks of outputs."""
    first_row, rows_left, first_out, second_block, num_outputs, _ = tile
    _, bias, output, _, _ = memory
    SUM: gl.constexpr = sum_0.type.layout
    DTYPE: gl.constexpr = output.dtype.element_ty
    first = first_out + SELF * HALF
    pointers = output + first_row.to(gl.int64) * num_outputs + first
    if bias is not None:
        biases = bias + first + gl.arange(0, _BLOCK, gl.SliceLayout(1, SUM))
        sum_0 += gl.load(biases).to(gl.float32)[:, None]
        sum_1 += gl.load(biases + second_block).to(gl.float32)[:, None]
    if SWIGLU:
        _write_block(gated(sum_0, sum_1, DTYPE, GELU), pointers, rows_left, num_outputs, ADDS)
    else:
        _write_block(sum_0.to(DTYPE), pointers, rows_left, num_outputs, ADDS)
        _write_block(sum_1.to(DTYPE), pointers + _BLOCK, rows_left, num_outputs, ADDS)


@gluon.jit
def _write_block(result, pointers, rows_left, num_outputs, ADDS: gl.constexpr):
    """Write or add (64, rows) numbers, the outputs of each row together."""
    WIDE: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    result = gl.convert_layout(result, WIDE)
    out = gl.arange(0, _BLOCK, gl.SliceLayout(1, WIDE))
    row = gl.arange(0, result.shape[1], gl.SliceLayout(0, WIDE))
    places = pointers + row[None, :].to(gl.int64) * num_outputs + out[:, None]
    exists = row[None, :] < rows_left
    if ADDS:
        result += gl.load(places, mask=exists, other=0.0)
    gl.store(places, result, mask=exists)
