"""Matrix products, y = x Wᵀ: kernels of our own for up to 64 rows, the vendor's library for more.

Few rows with big weights are bound by reading the weights. The vendor's kernels leave a fifth of the bandwidth unused
there; these leave a tenth. Which one runs, and how it is cut up, is a rule of the shape alone, found by measuring (see
docs/decisions/0006): nothing to tune at start, and the same rows always take the same path.
"""

import torch
import triton
import triton.language as tl

from llm.kernels.activation import silu_mul
from llm.kernels.launch import launch_options, wait_for_inputs

MAX_FEW_ROWS = 64
_OUTPUTS, _TILE_K = 64, 128
_MIN_PROGRAMS, _MIN_TILES = 64, 4
"""Below this many programs the sum is cut too, while this many tiles of it are left for each."""
_GOOD_PROGRAMS, _GOOD_TILES = 80, 8
"""The same where sums are long enough for another cut to pay."""
_MANY_BLOCKS = 264
"""From here on several programs wait for each multiprocessor: two at once with fewer stages beat one with more."""
_SINGLE_OUTPUTS = 4


class Linear:
    """Products on one device, with their scratch memory. Not thread-safe, like the stream it runs on.

    Args:
        device: of all tensors.
        max_rows_few: most rows that go through our own kernels; 0 for none.
    """

    def __init__(self, device: torch.device, max_rows_few: int = MAX_FEW_ROWS) -> None:
        self._device = device
        self._max_rows_few = max_rows_few
        # At most twice _GOOD_PROGRAMS programs ever share sums, each with at most two tiles.
        self._partial = torch.empty(4 * _GOOD_PROGRAMS * _OUTPUTS * MAX_FEW_ROWS, device=device)
        self._arrivals = torch.zeros(_GOOD_PROGRAMS, dtype=torch.int32, device=device)

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x (rows, in) and weight (out, in), both contiguous, give (rows, out)."""
        if self._is_few(x, weight, len(weight)):
            output = x.new_empty(len(x), len(weight))
            self._few(x, weight, bias, output, swiglu=False)
            return output
        return torch.nn.functional.linear(x, weight, bias)

    def swiglu(self, x: torch.Tensor, gate_up: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """silu(x Wgᵀ) * (x Wuᵀ), (rows, size), for `gate_up` (2 size, in): the rows of Wg, then those of Wu."""
        size = len(gate_up) // 2
        output = x.new_empty(len(x), size)
        if bias is None and self._is_few(x, gate_up, size):
            self._few(x, gate_up, None, output, swiglu=True)
        else:
            silu_mul(self(x, gate_up, bias), output)
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
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, output: torch.Tensor, *, swiglu: bool
    ) -> None:
        num_rows, num_outputs = output.shape
        num_inputs = weight.shape[1]
        options = launch_options(self._device)
        can_prefetch = self._device.type == "cuda"
        if num_rows == 1:
            num_blocks = num_outputs // _SINGLE_OUTPUTS
            is_long = num_inputs % 1024 == 0 and num_inputs >= 4096
            _single_row[(num_blocks,)](
                x, weight, output if bias is None else bias, output, num_outputs, num_inputs,
                OUTPUTS=_SINGLE_OUTPUTS, TILE_K=1024 if is_long else min(512, num_inputs & -num_inputs),
                STAGES=3 if is_long else 4, SWIGLU=swiglu, HAS_BIAS=bias is not None,
                CAN_PREFETCH=can_prefetch and not is_long and num_blocks < 4096, num_warps=4 if is_long else 2, **options,
            )  # fmt: skip
            return
        num_blocks = num_outputs // _OUTPUTS
        num_splits = _num_splits(num_blocks, num_inputs // _TILE_K)
        has_fewer_stages = swiglu or num_splits > 2 or num_blocks >= _MANY_BLOCKS
        _few_rows[(num_blocks, num_splits)](
            x, weight, output if bias is None else bias, output, self._partial, self._arrivals, num_rows, num_outputs,
            num_inputs, num_inputs // num_splits,
            ROWS=max(16, triton.next_power_of_2(num_rows)), OUTPUTS=_OUTPUTS, TILE_K=_TILE_K,
            IS_SPLIT=num_splits > 1, SWIGLU=swiglu, HAS_BIAS=bias is not None, CAN_PREFETCH=can_prefetch,
            num_warps=4, num_stages=4 if has_fewer_stages else 5, **options,
        )  # fmt: skip


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


@triton.jit(do_not_specialize=["num_rows"])
def _few_rows(
    x, weight, bias, output, partial, arrivals, num_rows, num_outputs, num_inputs, inputs_per_split,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, TILE_K: tl.constexpr, IS_SPLIT: tl.constexpr, SWIGLU: tl.constexpr,
    HAS_BIAS: tl.constexpr, CAN_PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (block of outputs, share of the sum).

    The weights are the left factor: a tensor-core product has at least 64 rows on its left, but as few as 8 columns on
    its right. Where the sum is split, the program that arrives last adds the shares up, always in the same order.
    """
    block = tl.program_id(0)
    split = tl.program_id(1)
    out = block * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.arange(0, ROWS)
    k = tl.arange(0, TILE_K)
    begin = split * inputs_per_split
    gate_row = weight + out[:, None].to(tl.int64) * num_inputs
    up_row = gate_row + num_outputs.to(tl.int64) * num_inputs
    if CAN_PREFETCH:  # weights depend on nobody: fetch the first two tiles while the kernel before drains
        line = begin + tl.arange(0, TILE_K // 32) * 64
        _prefetch(gate_row + line[None, :])
        if SWIGLU:
            _prefetch(up_row + line[None, :])
    wait_for_inputs(PDL)
    acc = tl.zeros([OUTPUTS, ROWS], tl.float32)
    up = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for start in range(begin, begin + inputs_per_split, TILE_K):
        column = start + k
        columns = tl.load(x + row[None, :] * num_inputs + column[:, None], mask=row[None, :] < num_rows, other=0.0)
        acc = tl.dot(tl.load(gate_row + column[None, :]), columns, acc)
        if SWIGLU:
            up = tl.dot(tl.load(up_row + column[None, :]), columns, up)
    is_last = True
    if IS_SPLIT:
        num_splits = tl.num_programs(1)
        tile = tl.arange(0, OUTPUTS)[:, None] * ROWS + row[None, :]
        tiles = partial + block * num_splits * (2 * OUTPUTS * ROWS)
        tl.store(tiles + split * (2 * OUTPUTS * ROWS) + tile, acc)
        if SWIGLU:
            tl.store(tiles + (2 * split + 1) * (OUTPUTS * ROWS) + tile, up)
        tl.debug_barrier()  # every thread's share is written before this program counts as arrived
        is_last = tl.atomic_add(arrivals + block, 1, sem="acq_rel") == num_splits - 1
        if is_last:
            tl.store(arrivals + block, 0)
            acc = tl.zeros([OUTPUTS, ROWS], tl.float32)
            up = tl.zeros([OUTPUTS, ROWS], tl.float32)
            for other in range(num_splits):
                # Past the first-level cache, which does not see other multiprocessors' writes.
                acc += tl.load(tiles + other * (2 * OUTPUTS * ROWS) + tile, cache_modifier=".cg")
                if SWIGLU:
                    up += tl.load(tiles + (2 * other + 1) * (OUTPUTS * ROWS) + tile, cache_modifier=".cg")
    if is_last:
        dtype: tl.constexpr = output.dtype.element_ty
        if HAS_BIAS:
            acc += tl.load(bias + out).to(tl.float32)[:, None]
        result = _swiglu(acc, up, dtype) if SWIGLU else acc.to(dtype)
        offsets = row[None, :] * num_outputs.to(tl.int64) + out[:, None]
        tl.store(output + offsets, result, mask=row[None, :] < num_rows)


@triton.jit
def _single_row(
    x, weight, bias, output, num_outputs, num_inputs,
    OUTPUTS: tl.constexpr, TILE_K: tl.constexpr, STAGES: tl.constexpr, SWIGLU: tl.constexpr, HAS_BIAS: tl.constexpr,
    CAN_PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: a block of outputs of one row, without tensor cores, which would idle."""
    out = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    k = tl.arange(0, TILE_K)
    gate_row = weight + out[:, None].to(tl.int64) * num_inputs
    up_row = gate_row + num_outputs.to(tl.int64) * num_inputs
    if CAN_PREFETCH:
        line = tl.arange(0, TILE_K // 64) * 64
        _prefetch(gate_row + line[None, :])
        if SWIGLU:
            _prefetch(up_row + line[None, :])
    wait_for_inputs(PDL)
    acc = tl.zeros([OUTPUTS, TILE_K], tl.float32)
    up = tl.zeros([OUTPUTS, TILE_K], tl.float32)
    for start in tl.range(0, num_inputs, TILE_K, num_stages=STAGES):
        column = start + k
        values = tl.load(x + column).to(tl.float32)[None, :]
        acc += tl.load(gate_row + column[None, :]).to(tl.float32) * values
        if SWIGLU:
            up += tl.load(up_row + column[None, :]).to(tl.float32) * values
    result = tl.sum(acc, 1)
    dtype: tl.constexpr = output.dtype.element_ty
    if HAS_BIAS:
        result += tl.load(bias + out).to(tl.float32)
    if SWIGLU:
        tl.store(output + out, _swiglu(result, tl.sum(up, 1), dtype))
    else:
        tl.store(output + out, result.to(dtype))
