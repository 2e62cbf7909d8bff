"""The draw of a step in three launches: equal to `llm.sampling.draw`, without sorting, waiting or allocating.

1. `_prepare`, a program a row: the key of the row's noise, and the lowest logit that top-k, top-p and min-p leave in.
2. `_best_of_blocks`, a program for each block of each row: the best score of the block by the Gumbel-max trick.
3. `_best_of_rows`, a program a row: the best of its blocks.

Every sum has a fixed order and every other reduction is exact, so a row's token does not depend on the rows beside it
or on their number.
"""

from dataclasses import dataclass
from typing import Self

import torch
import triton
import triton.language as tl

from llm.kernels.cuts import KEY_SHIFT, row_threshold, softmax_stats

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
_MAX_PROGRAMS = 132 * 16 * 4
"""A few times as many programs of 4 warps as an H200 holds at once (16 a multiprocessor at most)."""


@dataclass(frozen=True, slots=True)
class RowSampling:
    """How each row's tokens are drawn: device tensors, contiguous, by row.

    Attributes:
        temperature: (rows,) float32; below 1e-5 for greedy, whatever the others say.
        top_k: (rows,) int32; 0 for off.
        top_p: (rows,) float32 in (0, 1]; 1 for off.
        min_p: (rows,) float32 in [0, 1]; 0 for off.
        seed: (rows,) int64.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seed: torch.Tensor


@dataclass(frozen=True, slots=True)
class SamplingWorkspace:
    """What the kernels of one draw hand on to one another. Its content means nothing between draws.

    Attributes:
        scales: (max_draws,) float32, log2(e) / temperature; 0 for greedy.
        keys: (max_draws,) int64, of the noise.
        thresholds: (max_draws,) float32, the lowest logit that may be drawn; -inf for any.
        candidates: (max_draws, capacity) float32, logits among which a cut is sought; capacity is a power of two.
        best_scores: (max_draws * max_blocks,) float32.
        best_ids: (max_draws * max_blocks,) int32.
    """

    scales: torch.Tensor
    keys: torch.Tensor
    thresholds: torch.Tensor
    candidates: torch.Tensor
    best_scores: torch.Tensor
    best_ids: torch.Tensor

    @classmethod
    def allocate(cls, max_draws: int, vocab_size: int, device: torch.device | str, *, capacity: int = 4096) -> Self:
        """Memory for up to `max_draws` draws a call, about `max_draws` × (4 `capacity` + `vocab_size` / 128) bytes."""
        num_best = max_draws * triton.cdiv(vocab_size, _MIN_BLOCK)
        return cls(
            scales=torch.empty(max_draws, device=device),
            keys=torch.empty(max_draws, dtype=torch.int64, device=device),
            thresholds=torch.empty(max_draws, device=device),
            candidates=torch.empty(max_draws, capacity, device=device),
            best_scores=torch.empty(num_best, device=device),
            best_ids=torch.empty(num_best, dtype=torch.int32, device=device),
        )


def draw_tokens(
    logits: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    params: RowSampling,
    workspace: SamplingWorkspace,
    out_token_ids: torch.Tensor,
    last_token_ids: torch.Tensor,
) -> None:
    """Draw a token for each row of logits, as `llm.sampling.draw.sample` does where a row asks for nothing else.

    The same hash makes the noise, in float32 here and in float64 there, and what the cuts keep is decided in float32
    by either: tokens differ only where two scores, or a cut's probability and `top_p`, are equal up to rounding. Of
    equal logits or scores the lowest id is taken. Logits may be -inf, which is never drawn (where all are, token 0
    is); for NaN or +inf the token is some id of the vocabulary. Three launches, whose grids depend on the shapes
    alone: fit for a CUDA graph.

    Args:
        logits: (draws, vocab_size), bfloat16, float16 or float32; each row contiguous. Not changed.
        rows: (draws,) int32, index of each into `params` and `last_token_ids`; different, but for rows nobody reads.
        positions: (draws,) int32, of the token to be drawn.
        workspace: allocated for at least as many draws and this vocabulary.
        out_token_ids: (draws or more,) int32, written up to `draws`.
        last_token_ids: (rows,) int32; written at `rows`.
    """
    num_draws, vocab_size = logits.shape
    on_gpu = logits.is_cuda
    find_thresholds(logits, rows, positions, params, workspace)
    block = _block_size(num_draws, vocab_size)
    num_blocks = triton.cdiv(vocab_size, block)
    _best_of_blocks[(num_blocks, num_draws)](
        logits, logits.stride(0), vocab_size, block, workspace.scales, workspace.keys, workspace.thresholds,
        workspace.best_scores, workspace.best_ids, TILE=_TILE, FAST_LOG=on_gpu, num_warps=4,
    )  # fmt: skip
    _best_of_rows[(num_draws,)](
        workspace.best_scores, workspace.best_ids, num_blocks, rows, out_token_ids, last_token_ids,
        BLOCKS=triton.next_power_of_2(triton.cdiv(vocab_size, _MIN_BLOCK)), num_warps=1,
    )  # fmt: skip


def find_thresholds(
    logits: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    params: RowSampling,
    workspace: SamplingWorkspace,
) -> None:
    """Fill `scales`, `keys` and `thresholds` of the workspace: the first launch of `draw_tokens`, same arguments.

    A row without cuts is not read, one with min-p alone is read once. With top-k or top-p it is read three times (its
    softmax, the number of its candidates, the candidates), and between them as often as it takes to leave no more than
    `capacity` candidates: once or twice as logits are; 32 times (16 for 16-bit logits) for either cut at worst. Where
    top-k leaves few, top-p reads nothing more.
    """
    _prepare[(logits.shape[0],)](
        logits, logits.stride(0), logits.shape[1], rows, positions,
        params.temperature, params.top_k, params.top_p, params.min_p, params.seed,
        workspace.scales, workspace.keys, workspace.thresholds, workspace.candidates,
        CAPACITY=workspace.candidates.shape[1], TILE=_PREPARE_TILE_BYTES // logits.element_size(),
        VEC=16 // logits.element_size(), SHIFT=KEY_SHIFT[logits.dtype], num_warps=_PREPARE_WARPS,
        maxnreg=_PREPARE_REGISTERS,
    )  # fmt: skip


def mask_logits(logits: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """A copy of the logits with -inf where a token is not allowed.

    Args:
        logits: (draws, vocab_size), contiguous.
        allowed: (draws or more, vocab_size / 32) int32, contiguous: a bit a token, the lowest of the first word first.
    """
    num_draws, vocab_size = logits.shape
    masked = torch.empty_like(logits)
    grid = triton.cdiv(vocab_size, _MAX_BLOCK), num_draws
    _mask_logits[grid](logits, allowed, masked, vocab_size, allowed.shape[1], BLOCK=_MAX_BLOCK, num_warps=8)
    return masked


def _block_size(num_draws: int, vocab_size: int) -> int:
    """Logits for each program: as few as keep the number of programs in bounds."""
    block = _MIN_BLOCK
    while block < _MAX_BLOCK and num_draws * triton.cdiv(vocab_size, block) > _MAX_PROGRAMS:
        block *= 2
    return block


@triton.jit
def _mask_logits(logits, allowed, masked, vocab_size, num_words, BLOCK: tl.constexpr):
    """Program (block, draw)."""
    draw = tl.program_id(1).to(tl.int64)
    token_id = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = token_id < vocab_size
    word = tl.load(allowed + draw * num_words + token_id // 32, mask=exists, other=0)
    is_allowed = ((word >> (token_id % 32)) & 1) != 0
    x = tl.load(logits + draw * vocab_size + token_id, mask=exists & is_allowed, other=-float("inf"))
    tl.store(masked + draw * vocab_size + token_id, x, mask=exists)


@triton.jit
def _prepare(
    logits, row_stride, vocab_size, rows, positions, temperatures, top_ks, top_ps, min_ps, seeds,
    scales, keys, thresholds, candidates,
    CAPACITY: tl.constexpr, TILE: tl.constexpr, VEC: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Program: one row's noise key, scale and threshold."""
    draw = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + draw).to(tl.int64)
    temperature = tl.load(temperatures + row)
    is_greedy = temperature < _GREEDY_BELOW
    key = _splitmix64(tl.load(seeds + row).to(tl.uint64)) ^ tl.load(positions + draw).to(tl.uint64)
    tl.store(keys + draw, _splitmix64(key).to(tl.int64))
    tl.store(scales + draw, tl.where(is_greedy, 0.0, _LOG2_E / temperature))
    top_k = tl.load(top_ks + row)
    top_p = tl.load(top_ps + row)
    min_p = tl.load(min_ps + row)
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
    logits, row_stride, vocab_size, block, scales, keys, thresholds, best_scores, best_ids,
    TILE: tl.constexpr, FAST_LOG: tl.constexpr,
):  # fmt: skip
    """Program (block, row): best score of the block and the lowest id that has it."""
    draw = tl.program_id(1).to(tl.int64)
    scale = tl.load(scales + draw)
    threshold = tl.load(thresholds + draw)
    key = tl.load(keys + draw)
    logits += draw * row_stride
    begin = tl.program_id(0) * block
    end = tl.minimum(begin + block, vocab_size)
    best = tl.full([TILE], -float("inf"), tl.float32)
    best_id = tl.full([TILE], _NO_ID, tl.int32)
    for start in range(begin, end, TILE):
        token_id = start + tl.arange(0, TILE)
        x = tl.load(logits + token_id, mask=token_id < end, other=-float("inf")).to(tl.float32)
        score = x
        if scale > 0:
            score = x * scale - _log2_noise(token_id, key, FAST_LOG)
        is_better = (score > best) & (x >= threshold)
        best = tl.where(is_better, score, best)
        best_id = tl.where(is_better, token_id, best_id)
    highest = tl.max(best, 0)
    place = draw * tl.num_programs(0) + tl.program_id(0)
    tl.store(best_scores + place, highest)
    tl.store(best_ids + place, tl.min(tl.where(best == highest, best_id, _NO_ID), 0))


@triton.jit
def _best_of_rows(best_scores, best_ids, num_blocks, rows, out_token_ids, last_token_ids, BLOCKS: tl.constexpr):
    """Program: one row's token."""
    draw = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    place = draw * num_blocks + block
    score = tl.load(best_scores + place, mask=block < num_blocks, other=-float("inf"))
    token_id = tl.load(best_ids + place, mask=block < num_blocks, other=_NO_ID)
    token_id = tl.min(tl.where(score == tl.max(score, 0), token_id, _NO_ID), 0)
    token_id = tl.where(token_id == _NO_ID, 0, token_id)
    tl.store(out_token_ids + draw, token_id)
    tl.store(last_token_ids + tl.load(rows + draw), token_id)


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
