"""The draw of a step: equal to `llm.sampling.draw`, without sorting, waiting or allocating.

1. `_prepare`, a program a row: the key of the row's noise, and the lowest logit that top-k, top-p and min-p leave in.
2. `_best_of_blocks`, a program for each block of each row: the best score of the block by the Gumbel-max trick.
3. `_best_of_rows`, a program a row: the best of its blocks.

Where a step has rows with penalties, biases, bans or bits of allowed ids, `adjust_logits` comes before, which writes
the logits of these in float32, and the first two kernels run twice: over the logits as they are, for the other rows,
and over those. So a plain row's token is the same, bit by bit, whatever is beside it. `find_logprobs` comes last.

Every sum has a fixed order and every other reduction is exact, so a row's token does not depend on the rows beside it
or on their number.
"""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
import triton
import triton.language as tl

from llm.config import MAX_TOP_LOGPROBS
from llm.core.row_tensors import RowTensors
from llm.kernels.adjust import adjust_logits
from llm.kernels.cuts import KEY_SHIFT, row_threshold, softmax_stats
from llm.kernels.logprobs import LogprobWorkspace, find_logprobs
from llm.kernels.row_fields import KIND, MIN_P, PENALISED, TEMPERATURE, TOP_K, TOP_P, float_field, int_field, seed_field

_GREEDY_BELOW = tl.constexpr(1e-5)
_LOG2_E = tl.constexpr(1.4426950408889634)
_NO_ID = tl.constexpr(2**31 - 1)

_PREPARE_WARPS = 16
"""The same for small steps and large, because the order of sums depends on it."""
_PREPARE_REGISTERS = 64
"""A thread, so that two programs fit on a multiprocessor; what is spilled is scalars, outside the loops over logits."""
_PREPARE_TILE_BYTES = 32 * 32 * _PREPARE_WARPS
"""Two loads of 16 bytes a thread."""
_TILE = 1024
_MIN_BLOCK, _MAX_BLOCK = 1024, 8192
_MOST_ADJUSTED = 256
"""Draws whose adjusted logits there is memory for; more draws take turns."""
_ALL, _PLAIN, _SPECIAL = 0, 1, 2
"""Rows that a launch is about: all; those of no kind; the others."""
_MAX_PROGRAMS = 132 * 16 * 4
"""A few times as many programs of 4 warps as an H200 holds at once (16 a multiprocessor at most)."""


@dataclass(frozen=True, slots=True)
class SamplingWorkspace:
    """What the kernels of one draw hand on to one another. Its content means nothing between draws.

    Attributes:
        scales: (max_draws,) float32, log2(e) / temperature; 0 for greedy.
        keys: (max_draws,) int64, of the noise.
        thresholds: (max_draws,) float32, the lowest logit that may be drawn; -inf for any.
        candidates: (max_draws, capacity) float32, logits among which a cut is sought; capacity is a power of two.
        best_scores: (max_draws, max_blocks) float32.
        best_ids: (max_draws, max_blocks) int32.
        adjusted: (some draws, vocab_size) float32, logits of rows of any kind.
        logprobs: for the rows that want them.
    """

    scales: torch.Tensor
    keys: torch.Tensor
    thresholds: torch.Tensor
    candidates: torch.Tensor
    best_scores: torch.Tensor
    best_ids: torch.Tensor
    adjusted: torch.Tensor
    logprobs: LogprobWorkspace

    @classmethod
    def allocate(cls, max_draws: int, vocab_size: int, device: torch.device | str, *, capacity: int = 4096) -> Self:
        """Memory for up to `max_draws` draws a call: for each about 4 `capacity` + `vocab_size` / 12 bytes, and for the
        first 256 another 4 `vocab_size`."""
        max_blocks = triton.cdiv(vocab_size, _MIN_BLOCK)
        return cls(
            scales=torch.empty(max_draws, device=device),
            keys=torch.empty(max_draws, dtype=torch.int64, device=device),
            thresholds=torch.empty(max_draws, device=device),
            candidates=torch.empty(max_draws, capacity, device=device),
            best_scores=torch.empty(max_draws, max_blocks, device=device),
            best_ids=torch.empty(max_draws, max_blocks, dtype=torch.int32, device=device),
            adjusted=torch.empty(min(max_draws, _MOST_ADJUSTED), vocab_size, device=device),
            logprobs=LogprobWorkspace.allocate(max_draws, vocab_size, device),
        )

    def part(self, first: int, last: int) -> "SamplingWorkspace":
        """That of draws `first` to `last - 1`, no more than `adjusted` has room for."""
        part = slice(first, last)
        return replace(
            self, scales=self.scales[part], keys=self.keys[part], thresholds=self.thresholds[part],
            candidates=self.candidates[part], best_scores=self.best_scores[part], best_ids=self.best_ids[part],
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class DrawnTokens:
    """What the kernels of a draw leave behind, for as many draws as there is room.

    Attributes:
        token_ids: (max_draws,) int32; -1 where nothing can be drawn: the logits hold NaN or +inf, or all are -inf.
        logprobs: (max_draws, 1 + 2 * MAX_TOP_LOGPROBS) int32, see `find_logprobs`.
    """

    token_ids: torch.Tensor
    logprobs: torch.Tensor

    @classmethod
    def allocate(cls, max_draws: int, device: torch.device | str, *, pin_memory: bool = False) -> Self:
        """Memory for up to `max_draws` draws."""
        shapes = (max_draws,), (max_draws, 1 + 2 * MAX_TOP_LOGPROBS)
        return cls(*(torch.zeros(s, dtype=torch.int32, device=device, pin_memory=pin_memory) for s in shapes))

    def logprobs_of(self, index: int, num_top: int) -> tuple[float, tuple[tuple[int, float], ...]]:
        """Log probabilities of one draw on the host: of its token; and of the likeliest, beside their ids.

        Args:
            num_top: how many of the likeliest, as many as the vocabulary has at most.
        """
        words = self.logprobs[index].numpy()
        numbers = words.view(np.float32)
        top_ids, top = words[1 : 1 + num_top].tolist(), numbers[1 + MAX_TOP_LOGPROBS :][:num_top].tolist()
        return float(numbers[0]), tuple(zip(top_ids, top, strict=True))


def draw_tokens(
    logits: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    state: RowTensors,
    workspace: SamplingWorkspace,
    output: DrawnTokens,
    last_token_ids: torch.Tensor,
    *,
    are_plain: bool = False,
) -> None:
    """Draw a token for each row of logits, as `llm.sampling.draw` does, and count it where the row has penalties.

    The same hash makes the noise, in float32 here and in float64 there, and what the cuts keep is decided in float32
    by either: tokens differ only where two scores, or a cut's probability and `top_p`, are equal up to rounding. Of
    equal logits or scores the lowest id is taken. Grids depend on the shapes alone: fit for a CUDA graph.

    Args:
        logits: (draws, vocab_size), bfloat16, float16 or float32; each row contiguous. Not changed.
        rows: (draws,) int32, index of each into `state` and `last_token_ids`. Those with penalties differ.
        positions: (draws,) int32, of the token to be drawn.
        workspace: allocated for at least as many draws and this vocabulary.
        output: written up to `draws`.
        last_token_ids: (rows,) int32; written at `rows`, 0 where nothing can be drawn.
        are_plain: that no row is of any kind or wants log probabilities is known. Three launches are enough then.
    """
    if are_plain:
        _draw(logits, rows, positions, state, workspace, output.token_ids, last_token_ids, which=_ALL)
        return
    size = len(workspace.adjusted)
    for first in range(0, len(logits), size):
        part = slice(first, min(first + size, len(logits)))
        _draw(
            logits[part], rows[part], positions[part], state, workspace.part(part.start, part.stop),
            output.token_ids[part], last_token_ids, which=_PLAIN,
        )  # fmt: skip
    find_logprobs(logits, rows, output.token_ids, state, workspace.logprobs, output.logprobs)


def _draw(
    logits: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    state: RowTensors,
    workspace: SamplingWorkspace,
    token_ids: torch.Tensor,
    last_token_ids: torch.Tensor,
    *,
    which: int,
) -> None:
    """Draw once all rows are known to be plain (`_ALL`), or for either sort of rows (`_PLAIN`)."""
    num_draws, vocab_size = logits.shape
    find_thresholds(logits, rows, positions, state, workspace, which=which)
    _find_best(logits, rows, state, workspace, which)
    if which != _ALL:
        adjusted = workspace.adjusted[:num_draws]
        adjust_logits(logits, rows, positions, state, adjusted)
        find_thresholds(adjusted, rows, positions, state, workspace, which=_SPECIAL)
        _find_best(adjusted, rows, state, workspace, _SPECIAL)
    num_blocks = triton.cdiv(vocab_size, _block_size(num_draws, vocab_size))
    _best_of_rows[(num_draws,)](
        workspace.best_scores, workspace.best_ids, workspace.best_ids.stride(0), num_blocks, rows, token_ids,
        last_token_ids, state.fields, state.counts, vocab_size,
        BLOCKS=triton.next_power_of_2(workspace.best_ids.shape[1]), COUNTS=which != _ALL, num_warps=1,
    )  # fmt: skip


def find_thresholds(
    logits: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    state: RowTensors,
    workspace: SamplingWorkspace,
    *,
    which: int = 0,
) -> None:
    """Fill `scales`, `keys` and `thresholds` of the workspace: the first launch of `draw_tokens`, same arguments.

    A row without cuts is not read, one with min-p alone is read once. With top-k or top-p it is read three times (its
    softmax, the number of its candidates, the candidates), and between them as often as it takes to leave no more than
    `capacity` candidates: once or twice as logits are; 32 times (16 for 16-bit logits) for either cut at worst. Where
    top-k leaves few, top-p reads nothing more.
    """
    _prepare[(logits.shape[0],)](
        logits, logits.stride(0), logits.shape[1], rows, positions, state.fields,
        workspace.scales, workspace.keys, workspace.thresholds, workspace.candidates, WHICH=which,
        CAPACITY=workspace.candidates.shape[1], TILE=_PREPARE_TILE_BYTES // logits.element_size(),
        VEC=16 // logits.element_size(), SHIFT=KEY_SHIFT[logits.dtype], num_warps=_PREPARE_WARPS,
        maxnreg=_PREPARE_REGISTERS,
    )  # fmt: skip


def _find_best(
    logits: torch.Tensor, rows: torch.Tensor, state: RowTensors, workspace: SamplingWorkspace, which: int
) -> None:
    num_draws, vocab_size = logits.shape
    block = _block_size(num_draws, vocab_size)
    _best_of_blocks[(triton.cdiv(vocab_size, block), num_draws)](
        logits, logits.stride(0), vocab_size, block, rows, state.fields, workspace.scales, workspace.keys,
        workspace.thresholds, workspace.best_scores, workspace.best_ids, workspace.best_ids.stride(0),
        WHICH=which, TILE=_TILE, FAST_LOG=logits.is_cuda, num_warps=4,
    )  # fmt: skip


def _block_size(num_draws: int, vocab_size: int) -> int:
    """Logits for each program: as few as keep the number of programs in bounds."""
    block = _MIN_BLOCK
    while block < _MAX_BLOCK and num_draws * triton.cdiv(vocab_size, block) > _MAX_PROGRAMS:
        block *= 2
    return block


@triton.jit
def _is_left_out(fields, row, WHICH: tl.constexpr):
    """Whether this launch is not about the row."""
    return (WHICH != 0) & ((int_field(fields, row, KIND) != 0) != (WHICH == 2))


@triton.jit
def _prepare(
    logits, row_stride, vocab_size, rows, positions, fields, scales, keys, thresholds, candidates,
    WHICH: tl.constexpr, CAPACITY: tl.constexpr, TILE: tl.constexpr, VEC: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Program: one row's noise key, scale and threshold."""
    draw = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + draw).to(tl.int64)
    if _is_left_out(fields, row, WHICH):
        return
    temperature = float_field(fields, row, TEMPERATURE)
    is_greedy = temperature < _GREEDY_BELOW
    key = _splitmix64(seed_field(fields, row)) ^ tl.load(positions + draw).to(tl.uint64)
    tl.store(keys + draw, _splitmix64(key).to(tl.int64))
    tl.store(scales + draw, tl.where(is_greedy, 0.0, _LOG2_E / temperature))
    top_k = int_field(fields, row, TOP_K)
    top_p = float_field(fields, row, TOP_P)
    min_p = float_field(fields, row, MIN_P)
    has_cut = ((top_k > 0) & (top_k < vocab_size)) | (top_p < 1) | (min_p > 0)
    threshold = -float("inf")
    if has_cut & (temperature >= _GREEDY_BELOW):
        logits += draw * row_stride
        highest, lowest, num_finite, mass = softmax_stats(logits, vocab_size, _LOG2_E / temperature, TILE, VEC)
        if num_finite > 0:
            threshold = row_threshold(
                logits, vocab_size, temperature, top_k, top_p, min_p, highest, lowest, num_finite, mass,
                candidates + draw * CAPACITY, CAPACITY, TILE, VEC, SHIFT,
            )  # fmt: skip
    tl.store(thresholds + draw, threshold)


@triton.jit
def _best_of_blocks(
    logits, row_stride, vocab_size, block, rows, fields, scales, keys, thresholds, best_scores, best_ids, best_stride,
    WHICH: tl.constexpr, TILE: tl.constexpr, FAST_LOG: tl.constexpr,
):  # fmt: skip
    """Program (block, row): best score of the block and the lowest id that has it; +inf and -1 for NaN or +inf."""
    draw = tl.program_id(1).to(tl.int64)
    if _is_left_out(fields, tl.load(rows + draw).to(tl.int64), WHICH):
        return
    scale = tl.load(scales + draw)
    threshold = tl.load(thresholds + draw)
    key = tl.load(keys + draw)
    logits += draw * row_stride
    begin = tl.program_id(0) * block
    end = tl.minimum(begin + block, vocab_size)
    best = tl.full([TILE], -float("inf"), tl.float32)
    best_id = tl.full([TILE], _NO_ID, tl.int32)
    is_bad = tl.zeros([TILE], tl.int32)
    for start in range(begin, end, TILE):
        token_id = start + tl.arange(0, TILE)
        x = tl.load(logits + token_id, mask=token_id < end, other=-float("inf")).to(tl.float32)
        is_bad |= ((x < float("inf")) == 0).to(tl.int32)
        score = x
        if scale > 0:
            score = x * scale - _log2_noise(token_id, key, FAST_LOG)
        is_better = (score > best) & (x >= threshold)
        best = tl.where(is_better, score, best)
        best_id = tl.where(is_better, token_id, best_id)
    highest = tl.max(best, 0)
    best_id = tl.min(tl.where(best == highest, best_id, _NO_ID), 0)
    has_bad = tl.max(is_bad, 0) > 0
    place = draw * best_stride + tl.program_id(0)
    tl.store(best_scores + place, tl.where(has_bad, float("inf"), highest))
    tl.store(best_ids + place, tl.where(has_bad, -1, best_id))


@triton.jit
def _best_of_rows(
    best_scores, best_ids, best_stride, num_blocks, rows, out_token_ids, last_token_ids, fields, counts, vocab_size,
    BLOCKS: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """Program: one row's token."""
    draw = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + draw).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    place = draw * best_stride + block
    score = tl.load(best_scores + place, mask=block < num_blocks, other=-float("inf"))
    token_id = tl.load(best_ids + place, mask=block < num_blocks, other=_NO_ID)
    token_id = tl.min(tl.where(score == tl.max(score, 0), token_id, _NO_ID), 0)
    token_id = tl.where(token_id == _NO_ID, -1, token_id)
    tl.store(out_token_ids + draw, token_id)
    tl.store(last_token_ids + row, tl.maximum(token_id, 0))
    is_counted = COUNTS & ((int_field(fields, row, KIND) & PENALISED) != 0) & (token_id >= 0)
    place = counts + row * vocab_size + token_id
    tl.store(place, tl.load(place, mask=is_counted, other=0) + 2, mask=is_counted)


@triton.jit
def _log2_noise(token_id, key, FAST_LOG: tl.constexpr):
    """log2 of `exponential_noise`'s number for each token, but for a constant that all tokens share.

    The noise is -ln(1 - u), u = (bits + 0.5) / 2^32. Small noise decides the draw, and there 1 - u would have lost
    it: below u = 1/8 it is the series u + u²/2 + u³/3 + … (relative error 1e-7). Above, 1 - u comes from the
    complement of the bits, whose float32 is exact enough at both ends; `lg2.approx` is off by 2^-22 at most
    (PTX ISA), 1.2e-6 of the noise. Either is in units of ln 2.
    """
    bits = _mix32(token_id.to(tl.uint32) ^ (key & 0xFFFFFFFF).to(tl.uint32))
    bits = _mix32(bits ^ ((key >> 32) & 0xFFFFFFFF).to(tl.uint32))
    is_small = bits < 0x20000000
    u = (tl.where(is_small, bits, bits ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    series = 1.4426950408889634 / 6 + u * (1.4426950408889634 / 7)
    series = 1.4426950408889634 / 5 + u * series
    series = 1.4426950408889634 / 4 + u * series
    series = 1.4426950408889634 / 3 + u * series
    series = 1.4426950408889634 / 2 + u * series
    series = 1.4426950408889634 + u * series
    return _log2(tl.where(is_small, u * series, -_log2(u, FAST_LOG)), FAST_LOG)


@triton.jit
def _log2(x, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return tl.log2(x)


@triton.jit
def _mix32(x):
    """See `llm.sampling.draw`."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _splitmix64(x):
    """See `llm.sampling.draw`."""
    x += 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)
