"""Products of few rows together with the rows' own low-rank adapters, in one launch.

Shrinking and expanding by kernels of their own (`llm.kernels.adapters`) makes three launches of every product, which
wait for one another. Here the factors A of the step's adapters are further rows of the weight: the first programs
multiply these, write the shrunk numbers down and raise a flag. The others multiply the weight, wait for the flags,
which are up by then because their own sums are no shorter, and add what B makes of the shrunk numbers to their own tile
before they write it. They read B before they begin, when nothing else is to be done: a load that is waited for at the
end, with nobody to hide it, costs as much as a tenth of the whole product.

Programs that wait for others of their launch are safe only if those are sure to run. They are: a device starts programs
in the order of their numbers, as Merrill and Garland's scan relies on (2016, "Single-pass Parallel Prefix Scan with
Decoupled Look-back"), and those that shrink come first and wait for nobody in the launch.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from llm.config import Activation
from llm.kernels.activation import gated
from llm.kernels.adapters import AdapterEntries, AdapterFactors
from llm.kernels.few_rows import shared_sum, sum_of_products
from llm.kernels.launch import launch_options, most_stages, prefetch, wait_for_inputs
from llm.kernels.linear import Linear, Weights
from llm.kernels.tiles import MAX_FEW_ROWS, OUTPUTS, TILE_K, few_tile

_MAX_FLAGS = tl.constexpr(128)
"""Programs of a launch that shrink, for one block of rows, at most."""
_MAX_ROW_BLOCKS = 4
_UNIT, _UNITS = tl.constexpr(16), tl.constexpr(8)
"""Shrunk numbers of one adapter that lie one behind the other, and how many such units are expanded at once: as many as
fit the registers. The rank of slots is a multiple of the first."""


class LowRankShape(NamedTuple):
    """Sizes of a product's adapters.

    Attributes:
        num_slots: adapters that may be active.
        num_numbers: that an adapter shrinks a row's inputs to, `rank` for each of the product's parts.
    """

    num_slots: int
    num_numbers: int
    rank: int


class AdapterOperand(NamedTuple):
    """Adapters as the kernel takes them.

    Attributes:
        factor_a: (slots, numbers, inputs), each slot contiguous; likewise `factor_b`, (slots, outputs, rank).
        a_stride, b_stride: from slot to slot.
        slots: (rows,) int32, the slot of each row's adapter, -1 for none.
        active: (1 + slots,) int32: how many adapters the rows have, then their slots.
        step: (1,) int32, a number that no other step of late has had.
        parts: (blocks,) int32, the part that adds to each block of `OUTPUTS` outputs, -1 for none.
        shrunk: (shares of a sum, rows, numbers) in 16 bits, of each row by its own adapter.
        flags: int32, one for each program that shrinks.
        num_products: products of a step that wait for these flags.
    """

    factor_a: torch.Tensor
    factor_b: torch.Tensor
    a_stride: int
    b_stride: int
    slots: torch.Tensor
    active: torch.Tensor
    step: torch.Tensor
    parts: torch.Tensor
    shrunk: torch.Tensor
    flags: torch.Tensor
    num_products: int


@dataclass(frozen=True, slots=True)
class AdaptedProduct:
    """A product whose rows have adapters, with what its launches need beside the tensors of a step.

    Attributes:
        number, num_products: launches of one step have different numbers, below this.
        flags: what `new_flags` gave, shared by all products on a stream.
    """

    weights: Weights
    factors: AdapterFactors
    number: int
    num_products: int
    flags: torch.Tensor

    def takes(self, num_rows: int, dtype: torch.dtype, *, swiglu: bool = False) -> bool:
        """Whether the kernel is for so many rows of this format: those that `Linear` multiplies by tiles of its own."""
        weights, num_inputs = self.weights, self.weights.num_inputs
        parts, num_outputs = self.factors.block_parts, len(weights) // (2 if swiglu else 1)
        if parts is None or dtype.itemsize != 2 or weights.scales is not None or weights.groups is not None:
            return False
        if swiglu and (weights.bias is not None or self.factors.halves is None):
            return False
        if num_rows > MAX_FEW_ROWS or num_outputs % OUTPUTS or num_inputs % TILE_K:
            return False
        tile = few_tile(num_rows, num_outputs, num_inputs, weights.is_large, swiglu)
        return bool(self._num_tiles * tile.num_parts <= _MAX_FLAGS.value)

    @property
    def num_outputs(self) -> int:
        """Outputs, gate's and up's together."""
        return len(self.weights)

    @property
    def _num_tiles(self) -> int:
        num_slots, num_numbers, _ = self.factors.a.shape
        return int(triton.cdiv(num_slots * num_numbers, OUTPUTS))

    def run(
        self,
        linear: Linear,
        x: torch.Tensor,
        which: AdapterEntries,
        output: torch.Tensor,
        *,
        gated_by: Activation | None = None,
        adds: bool = False,
    ) -> torch.Tensor:
        """Write the product to `output`, or add it.

        Args:
            linear: lends its memory for sums that programs share.
            x: (rows, inputs), contiguous; `takes` says yes to it.
            which: the rows' adapters.
            output: (rows, outputs), contiguous; half the outputs if `gated_by` an activation: gate first, then up.

        Returns:
            `output`.
        """
        weights, factors = self.weights, self.factors
        assert factors.block_parts is not None, "asked by `takes`"
        swiglu = gated_by is not None
        (num_rows, num_inputs), num_outputs = x.shape, output.shape[1]
        num_slots, num_numbers, _ = factors.a.shape
        tile = few_tile(num_rows, num_outputs, num_inputs, weights.is_large, swiglu)
        num_row_blocks = triton.cdiv(num_rows, tile.rows)
        shrunk = torch.empty(tile.num_parts, num_rows, num_numbers, dtype=x.dtype, device=x.device)
        operand = AdapterOperand(
            factors.a, factors.b, factors.a.stride(0), factors.b.stride(0), which.slots, which.active, which.step,
            factors.block_parts, shrunk, self.flags, self.num_products,
        )  # fmt: skip
        num_programs = (self._num_tiles + num_outputs // OUTPUTS) * tile.num_parts
        bytes_a_stage = ((2 if swiglu else 1) * OUTPUTS + tile.rows) * tile.k * x.dtype.itemsize
        on_gpu = x.device.type == "cuda"
        _adapted_product[(num_programs * num_row_blocks,)](
            x, weights.operand, operand, output, *linear.scratch, num_rows, num_outputs, num_inputs,
            num_inputs // tile.num_parts, self.number,
            SHAPE=LowRankShape(num_slots, num_numbers, factors.rank),
            TILE=tile, SWIGLU=swiglu, GELU=gated_by is Activation.GELU_TANH, ADDS=adds, ON_GPU=on_gpu,
            num_warps=tile.num_warps, num_stages=min(tile.num_stages, most_stages(x.device, bytes_a_stage)),
            **launch_options(x.device),
        )  # fmt: skip
        return output


def new_flags(device: torch.device) -> torch.Tensor:
    """Flags for all products on a stream, one after the other."""
    return torch.full((_MAX_ROW_BLOCKS * _MAX_FLAGS.value,), -1, dtype=torch.int32, device=device)


@triton.jit
def _prefetch_first(rows, begin, TILE: tl.constexpr):
    """Ask for the first two tiles of rows, (outputs, 1) pointers to 16-bit numbers, from input `begin` on."""
    line = begin + tl.arange(0, 2 * TILE.k // 64) * 64  # of 128 bytes
    prefetch(rows + line[None, :])


@triton.jit
def _wait_for_flags(flags, num_flags, raised, ON_GPU: tl.constexpr):
    """Wait until the first `num_flags` are `raised`, and what was written before is seen."""
    flag = flags + tl.minimum(tl.arange(0, _MAX_FLAGS), tl.maximum(num_flags, 1) - 1)
    num_missing = num_flags
    while num_missing > 0:
        if ON_GPU:
            seen = tl.inline_asm_elementwise("ld.acquire.gpu.global.s32 $0, [$1];", "=r,l", [flag], tl.int32, False, 1)
        else:
            seen = tl.load(flag, volatile=True)
        num_missing = tl.sum((seen != raised).to(tl.int32), 0)
    tl.debug_barrier()


@triton.jit
def _factors(adapters, first_unit, out, part, count, SHAPE: tl.constexpr):
    """B of the active adapters for `_UNITS` units of shrunk numbers: (outputs, units, numbers), zeros past the last."""
    units_of_one: tl.constexpr = SHAPE.rank // _UNIT
    unit = first_unit + tl.arange(0, _UNITS)
    exists = (unit < count * units_of_one) & (part >= 0)
    slot = tl.load(adapters.active + 1 + unit // units_of_one, mask=exists, other=0).to(tl.int64)
    place = (unit % units_of_one)[None, :, None] * _UNIT + tl.arange(0, _UNIT)[None, None, :]
    rows = adapters.factor_b + out.to(tl.int64)[:, None, None] * SHAPE.rank
    return tl.load(rows + slot[None, :, None] * adapters.b_stride + place, mask=exists[None, :, None], other=0.0)


@triton.jit
def _expanded(
    acc, factors, adapters, first_unit, token, row_slot, num_tokens, part, count, SHAPE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Add to a tile, (outputs, rows) float32, what `_factors` of these units make of the rows' shrunk numbers."""
    units_of_one: tl.constexpr = SHAPE.rank // _UNIT
    num_shares: tl.constexpr = TILE.num_parts
    rows: tl.constexpr = TILE.rows
    unit = first_unit + tl.arange(0, _UNITS)
    exists = (unit < count * units_of_one) & (part >= 0)
    slot = tl.load(adapters.active + 1 + unit // units_of_one, mask=exists, other=-2)
    place = (unit % units_of_one)[:, None] * _UNIT + tl.arange(0, _UNIT)[None, :]
    place += tl.maximum(part, 0) * SHAPE.rank
    pointers = adapters.shrunk + token[None, None, :] * SHAPE.num_numbers + place[:, :, None]
    is_own = (slot[:, None] == row_slot[None, :])[:, None, :]
    numbers = tl.zeros([_UNITS, _UNIT, rows], tl.float32)
    for share in tl.static_range(num_shares):
        # Past the first-level cache, which does not see other multiprocessors' writes.
        shares = pointers + share * num_tokens * SHAPE.num_numbers
        numbers += tl.load(shares, mask=is_own, other=0.0, cache_modifier=".cg").to(tl.float32)
    numbers = tl.reshape(numbers.to(factors.dtype), [_UNITS * _UNIT, rows])
    factors = tl.reshape(factors, [acc.shape[0], _UNITS * _UNIT])
    return tl.dot(factors, numbers, acc, input_precision="ieee")


@triton.jit
def _shrink(
    x, adapters, program, num_row_blocks, num_rows, num_inputs, raised, flags,
    SHAPE: tl.constexpr, TILE: tl.constexpr, ON_GPU: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write the numbers of a tile of active A, a share of their sums, of rows with these adapters. Raise its flag."""
    num_tiles: tl.constexpr = (SHAPE.num_slots * SHAPE.num_numbers + TILE.outputs - 1) // TILE.outputs
    row_block, block = program % num_row_blocks, program // num_row_blocks % num_tiles
    share = program // num_row_blocks // num_tiles
    count = tl.load(adapters.active)
    if block * TILE.outputs < count * SHAPE.num_numbers:
        number = block * TILE.outputs + tl.arange(0, TILE.outputs)
        adapter, place = number // SHAPE.num_numbers, number % SHAPE.num_numbers
        slot = tl.load(adapters.active + 1 + tl.minimum(adapter, count - 1))
        factor_row = (adapters.factor_a + slot.to(tl.int64) * adapters.a_stride + place * num_inputs)[:, None]
        size = num_inputs // (TILE.num_parts * TILE.k) * TILE.k  # whole tiles, which says that loads are aligned
        begin = share * size
        if ON_GPU:
            _prefetch_first(factor_row, begin, TILE)
        wait_for_inputs(PDL)
        row = tl.arange(0, TILE.rows)
        token = row_block * TILE.rows + row
        rows_of_block = x + row_block.to(tl.int64) * TILE.rows * num_inputs
        acc, _ = sum_of_products(
            rows_of_block, factor_row, factor_row, row, num_rows - row_block * TILE.rows, num_inputs, begin,
            begin + size, TILE, False, True,
        )  # fmt: skip
        row_slot = tl.load(adapters.slots + token, mask=token < num_rows, other=-1)
        is_own = (slot[:, None] == row_slot[None, :]) & (adapter < count)[:, None]
        numbers = adapters.shrunk + share * num_rows * SHAPE.num_numbers
        pointers = numbers + token[None, :] * SHAPE.num_numbers + place[:, None]
        tl.store(pointers, acc.to(adapters.shrunk.dtype.element_ty), mask=is_own)
        tl.debug_barrier()  # every thread's numbers are written before the flag goes up
        # Flags of active tiles come first: only these are waited for.
        flag = (row_block * num_tiles + block) * TILE.num_parts + share
        tl.atomic_xchg(flags + flag, raised, sem="release")


@triton.jit(do_not_specialize=["num_rows", "number"])
def _adapted_product(
    x, weights, adapters, output, partial, arrivals, num_rows, num_outputs, num_inputs, inputs_per_part,
    number, SHAPE: tl.constexpr, TILE: tl.constexpr, SWIGLU: tl.constexpr, GELU: tl.constexpr, ADDS: tl.constexpr,
    ON_GPU: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (part of a sum, block of outputs or of shrunk numbers, block of rows), those that shrink first."""
    rows: tl.constexpr = TILE.rows
    outputs: tl.constexpr = TILE.outputs
    num_tiles: tl.constexpr = (SHAPE.num_slots * SHAPE.num_numbers + outputs - 1) // outputs
    num_row_blocks = tl.cdiv(num_rows, rows)
    num_shrinking = num_tiles * TILE.num_parts * num_row_blocks
    program = tl.program_id(0)
    # The adapters of the rows and their factors are what the step began with: no kernel of the step writes them.
    raised = tl.load(adapters.step) * adapters.num_products + number
    if program < num_shrinking:
        _shrink(
            x, adapters, program, num_row_blocks, num_rows, num_inputs, raised, adapters.flags, SHAPE, TILE, ON_GPU, PDL
        )
        return
    program -= num_shrinking
    num_blocks = num_outputs // outputs
    row_block, block = program % num_row_blocks, program // num_row_blocks % num_blocks
    part = program // num_row_blocks // num_blocks
    row = tl.arange(0, rows)
    out = block * outputs + tl.arange(0, outputs)
    gate_row = (weights.numbers + out.to(tl.int64) * num_inputs)[:, None]
    up_row = gate_row + num_outputs.to(tl.int64) * num_inputs
    begin = part * inputs_per_part
    if ON_GPU:
        _prefetch_first(gate_row, begin, TILE)
        if SWIGLU:
            _prefetch_first(up_row, begin, TILE)
    count = tl.load(adapters.active)
    gate_part = tl.load(adapters.parts + block)
    gate_factors = _factors(adapters, 0, out, gate_part, count, SHAPE)
    up_part, up_factors = gate_part, gate_factors
    if SWIGLU:
        up_part = tl.load(adapters.parts + num_blocks + block)
        up_factors = _factors(adapters, 0, num_outputs + out, up_part, count, SHAPE)
    wait_for_inputs(PDL)
    rows_left = num_rows - row_block * rows
    rows_of_block = x + row_block.to(tl.int64) * rows * num_inputs
    acc, up = sum_of_products(
        rows_of_block, gate_row, up_row, row, rows_left, num_inputs, begin, begin + inputs_per_part, TILE, SWIGLU, True
    )
    is_last = True
    if TILE.is_shared:
        place = row_block * num_blocks + block
        acc, up, is_last = shared_sum(acc, up, partial, arrivals, place, part, row, TILE, SWIGLU)
    if is_last:
        dtype: tl.constexpr = output.dtype.element_ty
        flags = adapters.flags + row_block * num_tiles * TILE.num_parts
        token = row_block * rows + row
        row_slot = tl.load(adapters.slots + token, mask=row < rows_left, other=-1)
        num_flags = tl.cdiv(count * SHAPE.num_numbers, outputs) * TILE.num_parts
        _wait_for_flags(flags, num_flags, raised, ON_GPU)
        acc = _expanded(
            acc, gate_factors, adapters, 0, token, row_slot, num_rows, gate_part, count, SHAPE, TILE
        )  # fmt: skip
        if SWIGLU:
            up = _expanded(up, up_factors, adapters, 0, token, row_slot, num_rows, up_part, count, SHAPE, TILE)
        for unit in tl.range(_UNITS, count * (SHAPE.rank // _UNIT), _UNITS, num_stages=1):  # of many adapters, or wide
            factors = _factors(adapters, unit, out, gate_part, count, SHAPE)
            acc = _expanded(acc, factors, adapters, unit, token, row_slot, num_rows, gate_part, count, SHAPE, TILE)
            if SWIGLU:
                factors = _factors(adapters, unit, num_outputs + out, up_part, count, SHAPE)
                up = _expanded(up, factors, adapters, unit, token, row_slot, num_rows, up_part, count, SHAPE, TILE)
        if weights.bias is not None:
            acc += tl.load(weights.bias + out).to(tl.float32)[:, None]
        result = gated(acc, up, dtype, GELU) if SWIGLU else acc.to(dtype)
        offsets = token[None, :].to(tl.int64) * num_outputs + out[:, None]
        mask = (row < rows_left)[None, :]
        if ADDS:
            result += tl.load(output + offsets, mask=mask, other=0.0)
        tl.store(output + offsets, result, mask=mask)
