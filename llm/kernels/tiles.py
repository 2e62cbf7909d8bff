"""How products of few rows are cut into tiles, and deterministic ones of any number.

Rules of the shape alone, found by measuring: docs/decisions/0006 and 0015 have the measurements.
"""

from functools import cache
from typing import NamedTuple

import triton

MAX_FEW_ROWS, MAX_SOME_ROWS = 64, 128
"""Most rows that our kernels take: of any product, and of small weights and of most SwiGLUs."""
MAX_GROUP_ROWS, MAX_SUMMED_ROWS = 256, 64
"""The same of weights in groups of 4 bits, and most rows of a tile that makes each group's part of a sum by itself;
with more, sums have units."""
_GROUP_PROGRAMS, _WIDE_GROUP_PROGRAMS, _MOST_GROUP_PARTS = 220, 128, 4
"""With fewer programs, of wide and low tiles the second, the sum of weights in groups is cut, into so many parts at
most."""
_MOST_WIDE_OUTPUTS = 4096
"""Of products of 33 to 64 rows whose tiles are wide: others have enough programs without."""
_LEAST_GROUP_ROWS, _MOST_GROUP_ROWS = 32, 128
"""Rows of a tile with weights in groups. With 16, copies to shared memory are of 8 bytes, which takes longer."""
HOPPER_OUTPUTS, HOPPER_SPAN = 256, 128
"""Rows of the weight and inputs that `group_hopper` multiplies at once."""
MAX_HOPPER_ROWS, _LEAST_HOPPER_ROWS = 512, 33
"""Rows that it takes; with fewer only gated products, which have more of the weight to read."""
_LEAST_HOPPER_BUSY, _LEAST_HOPPER_BUSY_OF_FEW, _LEAST_HOPPER_SPANS = 0.54, 0.75, 16
"""Share of the multiprocessors that it keeps busy at least, one program on each, until the last is done; the same up to
MAX_FEW_ROWS; spans of a part of a sum. With less smaller tiles are faster."""
OUTPUTS, TILE_K = 64, 128
"""Of a tile, in most cases. Our kernels take no weight whose sizes are not multiples of these."""
_WIDE_OUTPUTS, _SHORT_TILE_K = 128, 64
"""Of a SwiGLU with more than MAX_FEW_ROWS rows: one program multiplies large weights with all of them, so that they are
read once, and more and shorter tiles are on their way at once."""
_MIN_PROGRAMS, _MIN_TILES = 64, 4
"""Below this many programs the sum is cut too, while this many tiles of it are left for each."""
_GOOD_PROGRAMS, _GOOD_TILES = 80, 8
"""The same where sums are long enough for another cut to pay."""
_MANY_BLOCKS = 264
"""From here on several programs wait for each multiprocessor: two at once with fewer stages beat one with more."""
_SMALL_WEIGHT_ROWS = 32
"""A tile of a small weight has so many rows at most, and twice as many where there are more than MAX_FEW_ROWS: more
programs share its short sums, in place of cuts. What two of them read is in the second-level cache."""
MULTIPROCESSORS = 132
"""Of the chip that the rules are made for. A constant: on every chip deterministic sums are cut alike."""
_LEAST_BUSY = 0.8
"""Share of the multiprocessors that wide tiles keep busy at least, one on each, until the last is done."""
_LEAST_ROWS, _MOST_ROWS = 16, 256
"""Rows of a deterministic tile. How a tensor core adds up one output does not depend on the width of its instruction,
which tests/gpu/test_deterministic_gpu.py checks bit by bit; on a chip where it does, these have to be equal."""
_SHARING_TILES, _SHARING_ROW_BLOCKS = 96, 2
"""With fewer tiles and at most so many blocks of rows, each part of a deterministic sum has a program of its own."""


class Tile(NamedTuple):
    """How a product is cut up.

    Attributes:
        rows, outputs, k: size of a tile.
        num_parts: equal parts of each sum, added up in order.
        is_shared: each part is another program's.
    """

    rows: int
    outputs: int
    k: int
    num_parts: int
    is_shared: bool
    num_warps: int
    num_stages: int


class HopperTile(NamedTuple):
    """How a product of `group_hopper` is cut up.

    Attributes:
        rows: of a tile, which has 256 of the weight.
        num_parts: equal parts of each sum, each another program's.
        num_stages: spans of inputs that shared memory has room for.
    """

    rows: int
    num_parts: int
    num_stages: int


@cache
def few_tile(num_rows: int, num_outputs: int, num_inputs: int, is_large: bool, swiglu: bool) -> Tile:
    """What is fast for 2 to MAX_SOME_ROWS rows."""
    num_blocks, rows = num_outputs // OUTPUTS, max(16, triton.next_power_of_2(num_rows))
    num_parts = _num_splits(2 * num_blocks if swiglu else num_blocks, num_inputs // TILE_K)
    is_some = num_rows > MAX_FEW_ROWS
    k = _SHORT_TILE_K if swiglu and is_some else TILE_K
    if not is_large:
        rows = min(rows, 2 * _SMALL_WEIGHT_ROWS if is_some else _SMALL_WEIGHT_ROWS)
        return Tile(rows, OUTPUTS, k, num_parts, num_parts > 1, 4, 6 if is_some else 5)
    if is_some:
        return Tile(MAX_SOME_ROWS, _WIDE_OUTPUTS, k, 1, False, 8, 4)
    # The wider tile is 1 to 7% faster for few rows too: 30.8 instead of 32.4 µs for 8 of the 8B shape's `down`.
    rows = max(16 if swiglu else 32, rows)
    num_stages = 4 if swiglu or num_parts > 2 or num_blocks >= _MANY_BLOCKS else 5
    return Tile(rows, OUTPUTS, k, num_parts, num_parts > 1, 4, num_stages)


@cache
def group_tile(num_rows: int, num_outputs: int, num_inputs: int, k: int, swiglu: bool) -> Tile:
    """What is fast for up to MAX_GROUP_ROWS rows of weights in groups, `k` inputs at a time.

    Found by `benchmarks.group_tiles`.
    """
    rows = min(max(_LEAST_GROUP_ROWS, triton.next_power_of_2(num_rows)), _MOST_GROUP_ROWS)
    least_wide = MAX_FEW_ROWS // 2 if num_outputs <= _MOST_WIDE_OUTPUTS else MAX_FEW_ROWS
    is_wide = num_rows > least_wide and num_outputs % _WIDE_OUTPUTS == 0 and not swiglu
    if num_rows <= MAX_SOME_ROWS and not swiglu:
        rows = min(rows, MAX_FEW_ROWS)
    outputs, num_warps = (_WIDE_OUTPUTS, 8) if is_wide else (OUTPUTS, 4)
    num_programs = _WIDE_GROUP_PROGRAMS if is_wide and rows <= MAX_FEW_ROWS else _GROUP_PROGRAMS
    num_blocks, num_tiles, num_parts = num_outputs // outputs * triton.cdiv(num_rows, rows), num_inputs // k, 1
    while num_parts < _MOST_GROUP_PARTS and num_tiles % (2 * num_parts) == 0:
        if num_parts * num_blocks >= num_programs:
            break
        num_parts *= 2
    return Tile(rows, outputs, k, num_parts, num_parts > 1, num_warps, 3)


@cache
def hopper_tile(num_rows: int, num_outputs: int, num_inputs: int, swiglu: bool) -> HopperTile | None:
    """What is fast for weights in groups on Hopper, of the rows and shapes where it is; None for others.

    Found by measuring: one row of the table in docs/decisions/0015 for each case.
    """
    num_blocks, rest = divmod(num_outputs * (2 if swiglu else 1), HOPPER_OUTPUTS)
    least_rows = _LEAST_HOPPER_ROWS if swiglu else MAX_FEW_ROWS + 1
    if rest or num_inputs % HOPPER_SPAN or not least_rows <= num_rows <= MAX_HOPPER_ROWS:
        return None
    # A high tile widens fewer codes for as many products; a low one has fewer numbers to share in a sum's parts.
    is_high = num_rows > (MAX_FEW_ROWS if swiglu else MAX_GROUP_ROWS)
    least_busy = _LEAST_HOPPER_BUSY_OF_FEW if num_rows <= MAX_FEW_ROWS else _LEAST_HOPPER_BUSY
    num_spans = num_inputs // HOPPER_SPAN
    for rows, num_stages in ((2 * MAX_FEW_ROWS, 4), (MAX_FEW_ROWS, 6)) if is_high else ((MAX_FEW_ROWS, 6),):
        num_programs, num_parts = num_blocks * triton.cdiv(num_rows, rows), 1
        most_parts = 1 if swiglu else num_spans // _LEAST_HOPPER_SPANS
        while 2 * num_parts <= most_parts and 2 * num_programs <= MULTIPROCESSORS and num_spans % (2 * num_parts) == 0:
            num_programs, num_parts = 2 * num_programs, 2 * num_parts
        if num_programs >= least_busy * MULTIPROCESSORS * triton.cdiv(num_programs, MULTIPROCESSORS):
            return HopperTile(rows, num_parts, num_stages)
    return None


@cache
def fits_wide_tiles(num_outputs: int) -> bool:
    """Whether a large SwiGLU's wide tiles keep the chip busy."""
    num_blocks, rest = divmod(num_outputs, _WIDE_OUTPUTS)
    return rest == 0 and num_blocks >= _LEAST_BUSY * MULTIPROCESSORS * triton.cdiv(num_blocks, MULTIPROCESSORS)


@cache
def fixed_tile(num_rows: int, num_outputs: int, num_inputs: int, itemsize: int, group_k: int | None) -> Tile:
    """Deterministic: `k` and `num_parts`, which order the sums, by the weight's shape; the rest by what is fast.

    Args:
        group_k: what `k` has to be for weights in groups; None for others.
    """
    if itemsize == 4:  # without tensor cores: no shape is fast
        return Tile(32, 32, group_k or 32, 1, False, 4, 2)
    k = group_k or 64
    is_wide = num_outputs >= 8192 or num_inputs >= 8192
    outputs = 2 * OUTPUTS if is_wide else OUTPUTS
    num_blocks, num_tiles_left, num_parts = triton.cdiv(num_outputs, outputs), triton.cdiv(num_inputs, k), 1
    while 2 * num_parts * num_blocks <= MULTIPROCESSORS and num_tiles_left % 2 == 0 and num_tiles_left >= 16:
        num_parts, num_tiles_left = 2 * num_parts, num_tiles_left // 2
    rows = min(max(triton.next_power_of_2(num_rows), _LEAST_ROWS), _MOST_ROWS if group_k is None else MAX_FEW_ROWS)
    num_row_blocks = triton.cdiv(num_rows, rows)
    is_shared = num_parts > 1 and num_row_blocks <= _SHARING_ROW_BLOCKS and num_row_blocks * num_blocks < _SHARING_TILES
    if num_parts > 1 and not is_shared and rows * outputs > 128 * 128:
        rows = max(128, _LEAST_ROWS)  # one sum of a part and one of the whole have to fit the registers
    num_warps = 8 if rows * outputs >= 128 * 128 else 4
    num_stages = 4 if rows * outputs >= 128 * 64 else 5
    return Tile(rows, outputs, k, num_parts, is_shared, num_warps, num_stages)


def _num_splits(num_blocks: int, num_tiles: int) -> int:
    """How many programs share each sum of `num_tiles` tiles: a power of two. A block of SwiGLU counts as two."""
    num_splits = 1
    while num_tiles % (2 * num_splits) == 0:
        num_programs, num_tiles_left = num_blocks * num_splits, num_tiles // (2 * num_splits)
        is_short_of_programs = num_programs < _MIN_PROGRAMS and num_tiles_left >= _MIN_TILES
        is_worth_it = num_programs < _GOOD_PROGRAMS and num_tiles_left >= _GOOD_TILES
        if not (is_short_of_programs or is_worth_it):
            break
        num_splits *= 2
    return num_splits


def scratch_sizes(deterministic: bool) -> tuple[int, int]:
    """What programs that share sums need at most: numbers for parts of sums, and counters of programs that are done."""
    if deterministic:
        return _SHARING_ROW_BLOCKS * MULTIPROCESSORS * 2 * OUTPUTS * _MOST_ROWS, _SHARING_TILES
    num_arrivals = max(_GOOD_PROGRAMS * MAX_FEW_ROWS // _SMALL_WEIGHT_ROWS, _GROUP_PROGRAMS)
    # At most twice as many programs ever share sums, each with at most two tiles.
    num_grouped = 2 * _GROUP_PROGRAMS * max(_WIDE_OUTPUTS * _MOST_GROUP_ROWS, 2 * OUTPUTS * _MOST_GROUP_ROWS)
    return max(4 * _GOOD_PROGRAMS * OUTPUTS * MAX_SOME_ROWS, num_grouped), num_arrivals
