"""Matrix products, y = x Wᵀ: kernels of our own for up to 64 rows, the vendor's library for more.

Few rows with big weights are bound by reading the weights. The vendor's kernels leave a fifth of the bandwidth unused
there; these leave a tenth. Which one runs, and how it is cut up, is a rule of the shape alone, found by measuring (see
docs/decisions/0006): nothing to tune at start, and the same rows always take the same path.

Weights may be 8-bit floats (E4M3, Micikevicius et al. 2022, arXiv:2209.05433) with a scale for each output: our kernels
widen them to the activations' format, the vendor's library multiplies them with activations made 8 bits wide too.

Where results must not depend on the batch (He et al. 2025, "Defeating Nondeterminism in LLM Inference"), our kernels
take every product. There the weight's shape alone says how each sum is cut; the number of rows says only how much of it
one program does.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from llm.kernels.activation import silu_mul
from llm.kernels.launch import launch_options, wait_for_inputs
from llm.kernels.quantization import eight_bit_product

MAX_FEW_ROWS = 64
_OUTPUTS, _TILE_K = 64, 128
_MIN_PROGRAMS, _MIN_TILES = 64, 4
"""Below this many programs the sum is cut too, while this many tiles of it are left for each."""
_GOOD_PROGRAMS, _GOOD_TILES = 80, 8
"""The same where sums are long enough for another cut to pay."""
_MANY_BLOCKS = 264
"""From here on several programs wait for each multiprocessor: two at once with fewer stages beat one with more."""
_LARGE_WEIGHT = 1 << 24
"""Numbers of a weight from which on a tile has 32 rows at least."""
_SINGLE_OUTPUTS = 4
_MULTIPROCESSORS = 132
"""Of the chip that the rules for deterministic products are made for. A constant: on every chip sums are cut alike."""
_LEAST_ROWS, _MOST_ROWS = 16, 256
"""Rows of a deterministic tile. How a tensor core adds up one output does not depend on the width of its instruction,
which tests/gpu/test_deterministic_gpu.py checks bit by bit; on a chip where it does, these have to be equal."""
_SHARING_TILES, _SHARING_ROW_BLOCKS = 96, 2
"""With fewer tiles and at most so many blocks of rows, each part of a deterministic sum has a program of its own."""
_ROW_BLOCKS_IN_TURN = 4
"""So many blocks of rows come one after another for the same weights, which the second-level cache then still has."""


class Linear:
    """Products on one device, with their scratch memory. Not thread-safe, like the stream it runs on.

    Args:
        device: of all tensors.
        max_rows_few: most rows that go through our own kernels; 0 for none.
        deterministic: a row's result, bit by bit, depends on nothing but that row and the weights.
    """

    def __init__(self, device: torch.device, max_rows_few: int = MAX_FEW_ROWS, *, deterministic: bool = False) -> None:
        self._device = device
        self._max_rows_few = 0 if deterministic else max_rows_few
        self._deterministic = deterministic
        # At most twice _GOOD_PROGRAMS programs ever share sums, each with at most two tiles.
        num_partial, num_arrivals = 4 * _GOOD_PROGRAMS * _OUTPUTS * MAX_FEW_ROWS, _GOOD_PROGRAMS
        if deterministic:
            num_partial = _SHARING_ROW_BLOCKS * _MULTIPROCESSORS * 2 * _OUTPUTS * _MOST_ROWS
            num_arrivals = _SHARING_TILES
        self._partial = torch.empty(num_partial, device=device)
        self._arrivals = torch.zeros(num_arrivals, dtype=torch.int32, device=device)

    def __call__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        scales: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x (rows, in) and weight (out, in), both contiguous, give (rows, out).

        `scales` (out,) float32 come with weights of 8 bits and multiply their rows. For these `in` and `out` are
        multiples of 16.
        """
        if self._deterministic:
            return self._fixed(x, weight, bias, scales)
        if self._is_few(x, weight, len(weight)):
            output = x.new_empty(len(x), len(weight))
            self._few(x, weight, bias, scales, output, swiglu=False)
            return output
        if scales is None:
            return torch.nn.functional.linear(x, weight, bias)
        return eight_bit_product(x, weight, scales, bias)

    def swiglu(
        self,
        x: torch.Tensor,
        gate_up: torch.Tensor,
        bias: torch.Tensor | None = None,
        scales: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """silu(x Wgᵀ) * (x Wuᵀ), (rows, size), for `gate_up` (2 size, in): the rows of Wg, then those of Wu."""
        size = len(gate_up) // 2
        output = x.new_empty(len(x), size)
        if bias is None and self._is_few(x, gate_up, size):
            self._few(x, gate_up, None, scales, output, swiglu=True)
        else:
            silu_mul(self(x, gate_up, bias, scales), output)
        return output

    def _is_few(self, x: torch.Tensor, weight: torch.Tensor, num_outputs: int) -> bool:
        """Whether our kernels take this product: they have no masks for odd shapes, and no tensor cores for float32."""
        return (
            len(x) <= self._max_rows_few
            and x.dtype.itemsize == 2
            and num_outputs % _OUTPUTS == 0
            and weight.shape[1] % _TILE_K == 0
        )

    def _few(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        scales: torch.Tensor | None,
        output: torch.Tensor,
        *,
        swiglu: bool,
    ) -> None:
        num_rows, num_outputs = output.shape
        num_inputs = weight.shape[1]
        options = launch_options(self._device)
        if num_rows == 1:
            _single_row[(num_outputs // _SINGLE_OUTPUTS,)](
                x, weight, _or(scales, output), _or(bias, output), output, num_outputs, num_inputs,
                OUTPUTS=_SINGLE_OUTPUTS, TILE_K=min(1024, num_inputs & -num_inputs), SWIGLU=swiglu,
                HAS_SCALES=scales is not None, HAS_BIAS=bias is not None, num_warps=4, **options,
            )  # fmt: skip
            return
        num_blocks = num_outputs // _OUTPUTS
        num_splits = _num_splits(num_blocks, num_inputs // _TILE_K)
        # The wider tile is 1 to 7% faster for few rows too: 30.8 instead of 32.4 µs for 8 of the 8B shape's `down`.
        rows = max(16 if swiglu or weight.numel() < _LARGE_WEIGHT else 32, triton.next_power_of_2(num_rows))
        has_fewer_stages = swiglu or num_splits > 2 or num_blocks >= _MANY_BLOCKS
        _tile[(1, num_blocks, num_splits)](
            x, weight, _or(scales, output), _or(bias, output), output, self._partial, self._arrivals, num_rows,
            num_outputs, num_inputs, num_inputs // num_splits,
            ROWS=rows, OUTPUTS=_OUTPUTS, TILE_K=_TILE_K, NUM_PARTS=num_splits,
            IS_SHARED=num_splits > 1, SWIGLU=swiglu, HAS_SCALES=scales is not None, HAS_BIAS=bias is not None,
            IS_EVEN=True, CAN_PREFETCH=self._device.type == "cuda", num_warps=4,
            num_stages=4 if has_fewer_stages else 5, **options,
        )  # fmt: skip

    def _fixed(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scales: torch.Tensor | None
    ) -> torch.Tensor:
        """The product with every sum in an order that depends on the weight's shape alone."""
        num_rows, num_inputs = x.shape
        num_outputs = len(weight)
        output = x.new_empty(num_rows, num_outputs)
        tile = _fixed_tile(num_rows, num_outputs, num_inputs, x.dtype.itemsize)
        num_blocks, num_row_blocks = triton.cdiv(num_outputs, tile.outputs), triton.cdiv(num_rows, tile.rows)
        is_even = num_outputs % tile.outputs == 0 and num_inputs % tile.k == 0
        in_turn = min(num_row_blocks, _ROW_BLOCKS_IN_TURN)
        num_programs = triton.cdiv(num_row_blocks, in_turn) * (tile.num_parts if tile.is_shared else 1)
        _tile[(in_turn, num_blocks, num_programs)](
            x, weight, _or(scales, output), _or(bias, output), output, self._partial, self._arrivals, num_rows,
            num_outputs, num_inputs, triton.cdiv(num_inputs, tile.k) // tile.num_parts * tile.k,
            ROWS=tile.rows, OUTPUTS=tile.outputs, TILE_K=tile.k, NUM_PARTS=tile.num_parts, IS_SHARED=tile.is_shared,
            SWIGLU=False, HAS_SCALES=scales is not None, HAS_BIAS=bias is not None, IS_EVEN=is_even,
            CAN_PREFETCH=is_even and self._device.type == "cuda", num_warps=tile.num_warps, num_stages=tile.num_stages,
            **launch_options(self._device),
        )  # fmt: skip
        return output


class _Tile(NamedTuple):
    """How a deterministic product is cut up.

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


@cache
def _fixed_tile(num_rows: int, num_outputs: int, num_inputs: int, itemsize: int) -> _Tile:
    """`k` and `num_parts`, which order the sums, by the weight's shape; the rest by what is fast."""
    if itemsize == 4:  # without tensor cores: no shape is fast
        return _Tile(32, 32, 32, 1, False, 4, 2)
    k = 64
    is_wide = num_outputs >= 8192 or num_inputs >= 8192
    outputs = 2 * _OUTPUTS if is_wide else _OUTPUTS
    num_blocks, num_tiles_left, num_parts = triton.cdiv(num_outputs, outputs), triton.cdiv(num_inputs, k), 1
    while 2 * num_parts * num_blocks <= _MULTIPROCESSORS and num_tiles_left % 2 == 0 and num_tiles_left >= 16:
        num_parts, num_tiles_left = 2 * num_parts, num_tiles_left // 2
    rows = min(max(triton.next_power_of_2(num_rows), _LEAST_ROWS), _MOST_ROWS)
    num_row_blocks = triton.cdiv(num_rows, rows)
    is_shared = num_parts > 1 and num_row_blocks <= _SHARING_ROW_BLOCKS and num_row_blocks * num_blocks < _SHARING_TILES
    if num_parts > 1 and not is_shared and rows * outputs > 128 * 128:
        rows = max(128, _LEAST_ROWS)  # one sum of a part and one of the whole have to fit the registers
    num_warps = 8 if rows * outputs >= 128 * 128 else 4
    num_stages = 4 if rows * outputs >= 128 * 64 else 5
    return _Tile(rows, outputs, k, num_parts, is_shared, num_warps, num_stages)


def _or(tensor: torch.Tensor | None, stand_in: torch.Tensor) -> torch.Tensor:
    """A kernel's argument; one that is None is not read, but some pointer has to be there."""
    return stand_in if tensor is None else tensor


def _num_splits(num_blocks: int, num_tiles: int) -> int:
    """How many programs share each sum of `num_tiles` tiles: a power of two."""
    num_splits = 1
    while num_tiles % (2 * num_splits) == 0:
        num_programs, num_tiles_left = num_blocks * num_splits, num_tiles // (2 * num_splits)
        is_short_of_programs = num_programs < _MIN_PROGRAMS and num_tiles_left >= _MIN_TILES
        is_worth_it = num_programs < _GOOD_PROGRAMS and num_tiles_left >= _GOOD_TILES
        if not (is_short_of_programs or is_worth_it):
            break
        num_splits *= 2
    return num_splits


@triton.jit
def _swiglu(gate, up, dtype: tl.constexpr):
    """silu(gate) * up, rounded where the unfused product and activation round."""
    gate = gate.to(dtype).to(tl.float32)
    silu = (gate / (1 + tl.exp(-gate))).to(dtype)
    return silu * up.to(dtype)


@triton.jit
def _prefetch(pointers):
    """Ask for the 128-byte lines at `pointers` to be brought to the second-level cache."""
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], tl.int32, False, 1)


@triton.jit
def _sum_of_products(
    x, gate_row, up_row, row, num_rows, num_inputs, begin, end,
    OUTPUTS: tl.constexpr, TILE_K: tl.constexpr, SWIGLU: tl.constexpr, IS_EVEN: tl.constexpr,
):  # fmt: skip
    """Weights times rows over the inputs from `begin` to `end`: (OUTPUTS, rows) float32, of gate and of up."""
    k = tl.arange(0, TILE_K)
    acc = tl.zeros([OUTPUTS, row.shape[0]], tl.float32)
    up = tl.zeros([OUTPUTS, row.shape[0]], tl.float32)
    for start in range(begin, end, TILE_K):
        column = start + k
        pointers = x + row[None, :] * num_inputs + column[:, None]
        if IS_EVEN:
            columns = tl.load(pointers, mask=row[None, :] < num_rows, other=0.0)
            gate = tl.load(gate_row + column[None, :])
        else:
            exists = column < num_inputs
            columns = tl.load(pointers, mask=(row[None, :] < num_rows) & exists[:, None], other=0.0)
            gate = tl.load(gate_row + column[None, :], mask=exists[None, :], other=0.0)
        acc = tl.dot(gate.to(columns.dtype), columns, acc, input_precision="ieee")
        if SWIGLU:
            up = tl.dot(tl.load(up_row + column[None, :]).to(columns.dtype), columns, up, input_precision="ieee")
    return acc, up


@triton.jit(do_not_specialize=["num_rows"])
def _tile(
    x, weight, scales, bias, output, partial, arrivals, num_rows, num_outputs, num_inputs, inputs_per_part,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, TILE_K: tl.constexpr, NUM_PARTS: tl.constexpr, IS_SHARED: tl.constexpr,
    SWIGLU: tl.constexpr, HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, IS_EVEN: tl.constexpr,
    CAN_PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (block of rows in its turn, block of outputs, turn and part of the sum).

    The weights are the left factor: a tensor-core product has at least 64 rows on its left, but as few as 8 columns on
    its right. Where the sum's parts are shared out, the program that arrives last adds them up, always in the same
    order; where not, each program adds up all parts in that order.
    """
    num_shares: tl.constexpr = NUM_PARTS if IS_SHARED else 1
    row_block = tl.program_id(2) // num_shares * tl.num_programs(0) + tl.program_id(0)
    block = tl.program_id(1)
    part = tl.program_id(2) % num_shares
    num_rows -= row_block * ROWS
    if num_rows <= 0:
        return
    out = block * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.arange(0, ROWS)
    begin = part * inputs_per_part
    # Outputs past the last one read its weights, and are not written.
    weight_row = out if IS_EVEN else tl.minimum(out, num_outputs - 1)
    gate_row = weight + weight_row[:, None].to(tl.int64) * num_inputs
    up_row = gate_row + num_outputs.to(tl.int64) * num_inputs
    if CAN_PREFETCH:  # weights depend on nobody: fetch the first two tiles while the kernel before drains
        line = begin + tl.arange(0, TILE_K // 32) * 64
        _prefetch(gate_row + line[None, :])
        if SWIGLU:
            _prefetch(up_row + line[None, :])
    wait_for_inputs(PDL)
    x += row_block.to(tl.int64) * ROWS * num_inputs
    if NUM_PARTS == 1 or IS_SHARED:
        acc, up = _sum_of_products(
            x, gate_row, up_row, row, num_rows, num_inputs, begin, begin + inputs_per_part,
            OUTPUTS, TILE_K, SWIGLU, IS_EVEN,
        )  # fmt: skip
    else:
        tl.static_assert(not SWIGLU)
        acc = tl.zeros([OUTPUTS, ROWS], tl.float32)
        for other in range(NUM_PARTS):
            start = other * inputs_per_part
            share, up = _sum_of_products(
                x, gate_row, up_row, row, num_rows, num_inputs, start, start + inputs_per_part,
                OUTPUTS, TILE_K, SWIGLU, IS_EVEN,
            )  # fmt: skip
            acc += share
    is_last = True
    if IS_SHARED:
        size: tl.constexpr = 2 * OUTPUTS * ROWS if SWIGLU else OUTPUTS * ROWS
        tile = tl.arange(0, OUTPUTS)[:, None] * ROWS + row[None, :]
        place = row_block * tl.num_programs(1) + block
        tiles = partial + place.to(tl.int64) * (NUM_PARTS * size)
        tl.store(tiles + part * size + tile, acc)
        if SWIGLU:
            tl.store(tiles + part * size + OUTPUTS * ROWS + tile, up)
        tl.debug_barrier()  # every thread's share is written before this program counts as arrived
        is_last = tl.atomic_add(arrivals + place, 1, sem="acq_rel") == NUM_PARTS - 1
        if is_last:
            tl.store(arrivals + place, 0)
            acc = tl.zeros([OUTPUTS, ROWS], tl.float32)
            up = tl.zeros([OUTPUTS, ROWS], tl.float32)
            for other in range(NUM_PARTS):
                # Past the first-level cache, which does not see other multiprocessors' writes.
                acc += tl.load(tiles + other * size + tile, cache_modifier=".cg")
                if SWIGLU:
                    up += tl.load(tiles + other * size + OUTPUTS * ROWS + tile, cache_modifier=".cg")
    if is_last:
        dtype: tl.constexpr = output.dtype.element_ty
        if HAS_SCALES:
            acc *= tl.load(scales + weight_row)[:, None]
            if SWIGLU:
                up *= tl.load(scales + num_outputs + weight_row)[:, None]
        if HAS_BIAS:
            acc += tl.load(bias + weight_row).to(tl.float32)[:, None]
        result = _swiglu(acc, up, dtype) if SWIGLU else acc.to(dtype)
        offsets = row[None, :] * num_outputs.to(tl.int64) + out[:, None]
        mask = row[None, :] < num_rows
        if not IS_EVEN:
            mask &= out[:, None] < num_outputs
        tl.store(output + row_block.to(tl.int64) * ROWS * num_outputs + offsets, result, mask=mask)


@triton.jit
def _single_row(
    x, weight, scales, bias, output, num_outputs, num_inputs,
    OUTPUTS: tl.constexpr, TILE_K: tl.constexpr, SWIGLU: tl.constexpr, HAS_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: a block of outputs of one row, without tensor cores, which would idle."""
    out = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    k = tl.arange(0, TILE_K)
    gate_row = weight + out[:, None].to(tl.int64) * num_inputs
    up_row = gate_row + num_outputs.to(tl.int64) * num_inputs
    wait_for_inputs(PDL)
    acc = tl.zeros([OUTPUTS, TILE_K], tl.float32)
    up = tl.zeros([OUTPUTS, TILE_K], tl.float32)
    for start in tl.range(0, num_inputs, TILE_K, num_stages=3):
        column = start + k
        values = tl.load(x + column).to(tl.float32)[None, :]
        acc += tl.load(gate_row + column[None, :]).to(tl.float32) * values
        if SWIGLU:
            up += tl.load(up_row + column[None, :]).to(tl.float32) * values
    result, up_result = tl.sum(acc, 1), tl.sum(up, 1)
    dtype: tl.constexpr = output.dtype.element_ty
    if HAS_SCALES:
        result *= tl.load(scales + out)
        if SWIGLU:
            up_result *= tl.load(scales + num_outputs + out)
    if HAS_BIAS:
        result += tl.load(bias + out).to(tl.float32)
    if SWIGLU:
        tl.store(output + out, _swiglu(result, up_result, dtype))
    else:
        tl.store(output + out, result.to(dtype))
