"""Products of few rows together with the rows' own low-rank adapters, in one launch.

Shrinking and expanding by kernels of their own (`llm.kernels.adapters`) makes three launches of every product, which
wait for one another. Here the factors A of the step's adapters are further rows of the weight: the first programs
multiply these, write the shrunk numbers down and raise a flag. The others multiply the weight, wait for the flags,
which are up by then because all programs have sums of one length, and add what B makes of the shrunk numbers to their
own tile before they write it.

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
from llm.kernels.tiles import MAX_FEW_ROWS, MULTIPROCESSORS, OUTPUTS, TILE_K, Tile, few_tile

_MAX_FLAGS = tl.constexpr(128)
"""Programs of a launch that shrink, for one block of rows, at most."""
_MAX_ROW_BLOCKS = 4
_MAX_SHARES = 4
"""Programs that share a sum that shrinks at most, unless the product's sums have more."""
_CHUNK, _GATED_CHUNK = tl.constexpr(128), tl.constexpr(64)
"""Shrunk numbers that are expanded at once, of gate and of up each: as many as fit the registers."""
_AHEAD_LINES = tl.constexpr(256)
"""Lines of 128 bytes of B that a program fetches before it begins."""


class LowRankShape(NamedTuple):
    """Sizes of a product's adapters.

    Attributes:
        num_slots: adapters that may be active.
        num_numbers: that an adapter shrinks a row's inputs to, `rank` for each of the product's parts.
        num_shares: programs that share each sum of these.
    """

    num_slots: int
    num_numbers: int
    rank: int
    num_shares: int


class AdapterOperand(NamedTuple):
    """Adapters as the kernel takes them.

    Attributes:
        factor_a: (slots, numbers, inputs), each slot contiguous; likewise `factor_b`, (slots, outputs, rank).
        a_stride, b_stride: from slot to slot.
        slots: (rows,) int32, the slot of each row's adapter, -1 for none.
        active: (1 + slots,) int32: how many adapters the rows have, then their slots.
        step: (1,) int32, a number that no other step of late has had.
        parts: (blocks,) int32, the part that adds to each block of `OUTPUTS` outputs, -1 for none.
        shrunk: (shares of a sum, rows, numbers) float32, of each row by its own adapter.
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
        num_flags = self._num_tiles * self._num_shares(tile, num_outputs)
        return bool(num_flags <= _MAX_FLAGS.value)

    @property
    def num_outputs(self) -> int:
        """Outputs, gate's and up's together."""
        return len(self.weights)

    @property
    def _num_tiles(self) -> int:
        num_slots, num_numbers, _ = self.factors.a.shape
        return int(triton.cdiv(num_slots * num_numbers, OUTPUTS))

    def _num_shares(self, tile: Tile, num_outputs: int) -> int:
        """How many programs share a sum of those that shrink: more than of the others where these leave room.

        Each multiprocessor runs one program at a time.
        """
        num_shares, num_programs = tile.num_parts, num_outputs // OUTPUTS * tile.num_parts
        num_turns = triton.cdiv(num_programs + num_shares * self._num_tiles, MULTIPROCESSORS)
        while self.weights.num_inputs % (2 * num_shares * tile.k) == 0 and num_shares < _MAX_SHARES:
            if num_programs + 2 * num_shares * self._num_tiles > num_turns * MULTIPROCESSORS:
                break
            num_shares *= 2
        return num_shares

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
        num_shares = self._num_shares(tile, num_outputs)
        shrunk = torch.empty(num_shares, num_rows, num_numbers, dtype=torch.float32, device=x.device)
        operand = AdapterOperand(
            factors.a, factors.b, factors.a.stride(0), factors.b.stride(0), which.slots, which.active, which.step,
            factors.block_parts, shrunk, self.flags, self.num_products,
        )  # fmt: skip
        num_programs = self._num_tiles * num_shares + num_outputs // OUTPUTS * tile.num_parts
        bytes_a_stage = ((2 if swiglu else 1) * OUTPUTS + tile.rows) * tile.k * x.dtype.itemsize
        on_gpu = x.device.type == "cuda"
        _adapted_product[(num_programs * num_row_blocks,)](
            x, weights.operand, operand, output, *linear.scratch, num_rows, num_outputs, num_inputs,
            num_inputs // tile.num_parts, self.number,
            SHAPE=LowRankShape(num_slots, num_numbers, factors.rank, num_shares),
            TILE=tile, SWIGLU=swiglu, GELU=gated_by is Activation.GELU_TANH, ADDS=adds, ON_GPU=on_gpu,
            num_warps=tile.num_warps, num_stages=min(tile.num_stages, most_stages(x.device, bytes_a_stage)),
            **launch_options(x.device),
        )  # fmt: skip
        return output


def new_flags(device: torch.device) -> torch.Tensor:
    """Flags for all products on a stream, one after the other."""
    return torch.full((_MAX_ROW_BLOCKS * _MAX_FLAGS.value,), -1, dtype=torch.int32, device=device)


@triton.jit
def _wait_for_flags(flags, num_flags, raised, ON_GPU: tl.constexpr):
    """Wait until the first `num_flags` are `raised`, and what was written before is seen."""
    flag = tl.arange(0, _MAX_FLAGS)
    num_missing = num_flags
    while num_missing > 0:
        seen = tl.load(flags + flag, mask=flag < num_flags, other=raised, volatile=True)
        num_missing = tl.sum((seen != raised).to(tl.int32), 0)
    if ON_GPU:
        tl.inline_asm_elementwise("fence.acq_rel.gpu; mov.u32 $0, $1;", "=r,r", [flag], tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()


@triton.jit
def _expanded(
    acc, up, adapters, block, num_blocks, row, row_block, num_rows, num_outputs, count,
    TILE: tl.constexpr, SWIGLU: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """Add what the rows' B make of their shrunk numbers to a tile, (OUTPUTS, rows) float32: of gate and of up."""
    rows: tl.constexpr = TILE.rows
    num_numbers: tl.constexpr = SHAPE.num_numbers
    rank: tl.constexpr = SHAPE.rank
    num_shares: tl.constexpr = SHAPE.num_shares
    chunk: tl.constexpr = _GATED_CHUNK if SWIGLU else _CHUNK
    out = block * TILE.outputs + tl.arange(0, TILE.outputs)
    token = row_block * rows + row
    row_slot = tl.load(adapters.slots + token, mask=row < num_rows, other=-1)
    part = tl.load(adapters.parts + block)
    up_part = part
    if SWIGLU:
        up_part = tl.load(adapters.parts + num_blocks + block)
    num_tokens = num_rows + row_block * rows
    for start in tl.range(0, count * rank, chunk, num_stages=1):  # stages of it would be memory that the product has
        number = start + tl.arange(0, chunk)
        adapter, place = number // rank, number % rank
        exists = adapter < count
        slot = tl.load(adapters.active + 1 + adapter, mask=exists, other=-2)
        columns = adapters.factor_b + slot.to(tl.int64) * adapters.b_stride + place
        factors = columns[None, :] + out[:, None].to(tl.int64) * rank
        is_own = slot[:, None] == row_slot[None, :]
        offsets = token[None, :] * num_numbers + place[:, None]
        factor = tl.load(factors, mask=(exists & (part >= 0))[None, :], other=0.0)
        if SWIGLU:
            up_factor = tl.load(
                factors + num_outputs.to(tl.int64) * rank, mask=(exists & (up_part >= 0))[None, :], other=0.0
            )
        shrunk = tl.zeros([chunk, rows], tl.float32)
        up_shrunk = tl.zeros([chunk, rows], tl.float32)
        for share in tl.static_range(num_shares):
            # Past the first-level cache, which does not see other multiprocessors' writes.
            pointers = adapters.shrunk + share * num_tokens * num_numbers + offsets
            shrunk += tl.load(pointers + part * rank, mask=is_own & (part >= 0), other=0.0, cache_modifier=".cg")
            if SWIGLU:
                mask = is_own & (up_part >= 0)
                up_shrunk += tl.load(pointers + up_part * rank, mask=mask, other=0.0, cache_modifier=".cg")
        acc = tl.dot(factor, shrunk.to(factor.dtype), acc, input_precision="ieee")
        if SWIGLU:
            up = tl.dot(up_factor, up_shrunk.to(factor.dtype), up, input_precision="ieee")
    return acc, up


@triton.jit(do_not_specialize=["num_rows", "number"])
def _adapted_product(
    x, weights, adapters, output, partial, arrivals, num_rows, num_outputs, num_inputs, inputs_per_part,
    number, SHAPE: tl.constexpr, TILE: tl.constexpr, SWIGLU: tl.constexpr, GELU: tl.constexpr, ADDS: tl.constexpr,
    ON_GPU: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (part of a sum, block of outputs or of shrunk numbers, block of rows), those that shrink first."""
    rows: tl.constexpr = TILE.rows
    outputs: tl.constexpr = TILE.outputs
    num_numbers: tl.constexpr = SHAPE.num_numbers
    rank: tl.constexpr = SHAPE.rank
    num_shares: tl.constexpr = SHAPE.num_shares
    num_tiles: tl.constexpr = (SHAPE.num_slots * num_numbers + outputs - 1) // outputs
    num_row_blocks = tl.cdiv(num_rows, rows)
    num_shrinking = num_tiles * num_shares * num_row_blocks
    program = tl.program_id(0)
    shrinks = program < num_shrinking
    work = tl.where(shrinks, program, program - num_shrinking)
    num_blocks = tl.where(shrinks, num_tiles, num_outputs // outputs)
    row_block, block = work % num_row_blocks, work // num_row_blocks % num_blocks
    part = work // num_row_blocks // num_blocks
    num_rows -= row_block * rows
    # The adapters of the rows and their factors are what the step began with: no kernel of the step writes them.
    count = tl.load(adapters.active)
    if shrinks & (block * outputs >= count * num_numbers):
        return
    raised = tl.load(adapters.step) * adapters.num_products + number
    row = tl.arange(0, rows)
    out = block * outputs + tl.arange(0, outputs)
    adapter = out // num_numbers
    slot = tl.load(adapters.active + 1 + tl.minimum(adapter, count - 1), mask=shrinks, other=0).to(tl.int64)
    factor_row = adapters.factor_a + slot * adapters.a_stride + (out % num_numbers) * num_inputs
    weight_row = weights.numbers + out.to(tl.int64) * num_inputs
    gate_row = tl.where(shrinks, factor_row, weight_row)[:, None]
    up_row = gate_row
    if SWIGLU:
        up_row = tl.where(shrinks, factor_row, weight_row + num_outputs.to(tl.int64) * num_inputs)[:, None]
    inputs_per_part = tl.where(shrinks, num_inputs // num_shares, inputs_per_part)
    begin = part * inputs_per_part
    if ON_GPU:
        line_size: tl.constexpr = 1024 // weights.numbers.dtype.element_ty.primitive_bitwidth
        line = begin + tl.arange(0, 2 * TILE.k // line_size) * line_size
        prefetch(gate_row + line[None, :])
        if SWIGLU:
            prefetch(up_row + line[None, :])
        # What a program expands by comes to the second-level cache meanwhile.
        line = tl.arange(0, _AHEAD_LINES)
        place = tl.where((line < count * rank) & (not shrinks), line, 0)
        lines = adapters.factor_b + tl.load(adapters.active + 1 + place // rank).to(tl.int64) * adapters.b_stride
        lines += tl.where(shrinks, 0, block) * outputs * rank + place % rank * 64
        prefetch(lines)
        if SWIGLU:
            prefetch(lines + num_outputs * rank)
    wait_for_inputs(PDL)
    rows_of_block = x + row_block.to(tl.int64) * rows * num_inputs
    acc, up = sum_of_products(
        rows_of_block, gate_row, up_row, row, num_rows, num_inputs, begin, begin + inputs_per_part, TILE, SWIGLU, True
    )
    flags = adapters.flags + row_block * num_tiles * num_shares
    if shrinks:
        token = row_block * rows + row
        is_own = slot[:, None] == tl.load(adapters.slots + token, mask=row < num_rows, other=-1)[None, :]
        numbers = adapters.shrunk + part * (num_rows + row_block * rows) * num_numbers
        pointers = numbers + token[None, :] * num_numbers + (out % num_numbers)[:, None]
        tl.store(pointers, acc, mask=is_own & (adapter < count)[:, None])
        tl.debug_barrier()  # every thread's numbers are written before the flag goes up
        # Flags of active tiles come first: only these are waited for.
        tl.atomic_xchg(flags + block * num_shares + part, raised, sem="release")
        return
    is_last = True
    if TILE.is_shared:
        place = row_block * (num_outputs // outputs) + block
        acc, up, is_last = shared_sum(acc, up, partial, arrivals, place, part, row, TILE, SWIGLU)
    if is_last:
        dtype: tl.constexpr = output.dtype.element_ty
        _wait_for_flags(flags, tl.cdiv(count * num_numbers, outputs) * num_shares, raised, ON_GPU)
        acc, up = _expanded(
            acc, up, adapters, block, num_blocks, row, row_block, num_rows, num_outputs, count,
            TILE, SWIGLU, SHAPE,
        )  # fmt: skip
        if weights.bias is not None:
            acc += tl.load(weights.bias + out).to(tl.float32)[:, None]
        result = gated(acc, up, dtype, GELU) if SWIGLU else acc.to(dtype)
        offsets = (row_block.to(tl.int64) * rows + row[None, :]) * num_outputs + out[:, None]
        mask = row[None, :] < num_rows
        if ADDS:
            result += tl.load(output + offsets, mask=mask, other=0.0)
        tl.store(output + offsets, result, mask=mask)
