"""Prefill of long chunks on Hopper, over contexts that lie in a row.

FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608) in Gluon: one warp fetches keys and values by bulk copies, two
groups of four warps compute, each half of a tile's rows, and each multiplies by one block's values while it weighs the
next block's scores. Triton's own products are waited for one by one, which is why `prefill` cannot. As there, the query
heads that share a key/value head are rows of one tile.
"""

import numpy as np
import numpy.typing as npt
import torch
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

from llm.kernels.attention.gather import GatheredContexts
from llm.kernels.attention.work import Scoring, StepParts, WorkItems, num_prefill_items, plan_prefills

_TILE_ROWS = 128
_BLOCK_TOKENS = 128
"""Of context at once."""
_NUM_STAGES = 2
_HEAD_DIMS = 64, 128
_CONSUMER_REGISTERS, _PRODUCER_REGISTERS = 240, 24
_MOST_BYTES = 1 << 30
"""Of the copies of contexts; longer ones are read from their pages."""
_MIN_TILES = 128
"""Fewer do not fill the chip."""
_MIN_PAIRS_A_TOKEN = 512
"""Pairs of query and key for each token of context from which on its copy pays."""
_MANY_TOKENS, _MANY_PAIRS = 4096, 1 << 26
"""Tokens, or pairs of query and key, of a step from which on it is worth a graph of its own, or none at all."""


def can_run(dtype: torch.dtype, head_dim: int, device: torch.device) -> bool:
    """Whether this device and kernel can compute such attention."""
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    return is_hopper and head_dim in _HEAD_DIMS and dtype in (torch.bfloat16, torch.float16)


def num_gathered_tokens(
    query_lens: npt.NDArray[np.int32],
    context_lens: npt.NDArray[np.int32],
    num_heads: int,
    *,
    few_tokens: int,
    max_tokens: int,
) -> int:
    """Tokens of context to copy in a step of such parts.

    0 where it does not pay or there are more than `max_tokens`. Up to `few_tokens` of them are padded to `few_tokens`,
    so that one graph does for all; more only where the step takes so long that kernel after kernel may be launched.
    """
    is_prefill = query_lens > 1
    queries, contexts = (lens[is_prefill].astype(np.int64) for lens in (query_lens, context_lens))
    num_new, num_context_tokens = int(queries.sum()), int(contexts.sum())
    num_pairs = int((queries * (contexts - queries // 2)).sum())
    if num_new * num_heads < _MIN_TILES * _TILE_ROWS or num_pairs < _MIN_PAIRS_A_TOKEN * num_context_tokens:
        return 0
    if num_context_tokens <= few_tokens:
        return few_tokens if num_new >= _MANY_TOKENS or num_pairs >= _MANY_PAIRS else 0
    return num_context_tokens if num_pairs >= _MANY_PAIRS and num_context_tokens <= max_tokens else 0


class HopperPrefill:
    """Attention of the parts with 2 new tokens or more, in steps that are worth it (see `num_gathered_tokens`).

    Args:
        num_heads, num_kv_heads, head_dim: shape of the model's attention.
        max_context: tokens of context for which there is to be room, if they fit into a gigabyte.
        max_tokens: most new tokens of a step.
        max_parts: most parts of a step.
        dtype: of queries.
        device: where all tensors live.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        max_context: int,
        max_tokens: int,
        max_parts: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._num_heads = num_heads
        self._tile_tokens = _TILE_ROWS // (num_heads // num_kv_heads)
        room = min(max_context, _MOST_BYTES // (2 * num_kv_heads * head_dim * dtype.itemsize))
        self.few_tokens = min(max_tokens, room)
        """Tokens of context that whole prompts have together, as many as a step can have."""
        self._contexts = GatheredContexts(room, max_parts, num_kv_heads, head_dim, dtype, device)
        layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
        self._descriptors = [
            TensorDescriptor.from_tensor(copies.flatten(1), [_BLOCK_TOKENS, head_dim], layout)
            for copies in (self._contexts.keys, self._contexts.values)
        ]

    def num_gathered_tokens(self, query_lens: npt.NDArray[np.int32], context_lens: npt.NDArray[np.int32]) -> int:
        """Tokens of context that a step of such parts is to give to `plan`; 0 for a step that is not worth it."""
        return num_gathered_tokens(
            query_lens, context_lens, self._num_heads, few_tokens=self.few_tokens, max_tokens=self._contexts.max_tokens
        )

    def plan(
        self, parts: StepParts, page_tables: torch.Tensor, page_size: int, num_gathered: int, items: WorkItems
    ) -> None:
        """Plan a step: where its contexts are, and into `items` its tiles."""
        plan_prefills(parts, items, self._tile_tokens)
        self._contexts.plan(parts, page_tables, page_size, num_gathered)

    def __call__(
        self,
        query: torch.Tensor,
        kv_pages: torch.Tensor,
        parts: StepParts,
        items: WorkItems,
        num_gathered: int,
        output: torch.Tensor,
        scale: float | None = None,
    ) -> None:
        """Write attention output of the parts that were planned; other tokens' output is left alone.

        Args:
            query: (tokens, num_heads, head_dim), RoPE applied, contiguous.
            kv_pages: (2, pages, page_size, num_kv_heads, head_dim), the new tokens' stored already.
            items, num_gathered: as planned.
            output: (tokens, num_heads, head_dim), contiguous.
            scale: of the softmax; None for `head_dim ** -0.5`.
        """
        self._contexts.copy(kv_pages, num_gathered)
        num_tokens, num_heads, head_dim = query.shape
        num_kv_heads = kv_pages.shape[3]
        scale_log2 = Scoring(scale or head_dim**-0.5).factors.scale_log2
        num_items = num_prefill_items(num_tokens, parts.num_parts, self._tile_tokens)
        _hopper_prefill[(num_items, num_kv_heads)](
            query, *self._descriptors, self._contexts.starts, parts, items, output, scale_log2,
            NUM_KV_HEADS=num_kv_heads, GROUP=num_heads // num_kv_heads, TILE_TOKENS=self._tile_tokens,
            HEAD_DIM=head_dim, BLOCK=_BLOCK_TOKENS, STAGES=_NUM_STAGES, ROWS=_TILE_ROWS // 2,
            CONSUMER_REGISTERS=_CONSUMER_REGISTERS, PRODUCER_REGISTERS=_PRODUCER_REGISTERS, num_warps=4,
        )  # fmt: skip


@gluon.jit
def _hopper_prefill(
    query, keys, values, kv_starts, parts, items, output, scale_log2, NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr,
    TILE_TOKENS: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Program (item, kv head): a tile of one part's new tokens, all heads of a group, against what they see."""
    # One head's keys and values at a time are all that programs which run together read: they find them in the cache.
    item = gl.program_id(0)
    kv_head = gl.program_id(1)
    if item >= gl.load(items.summary):
        return
    part = gl.load(items.parts + item)
    query_len = gl.load(parts.query_lens + part)
    context_len = gl.load(parts.context_lens + part)
    # The last tiles see most: they start first.
    tile_first = (gl.cdiv(query_len, TILE_TOKENS) - 1 - gl.load(items.chunks + item)) * TILE_TOKENS
    first_position = context_len - query_len + tile_first
    num_blocks = gl.cdiv(gl.minimum(first_position + TILE_TOKENS, context_len), BLOCK)
    num_masked = gl.maximum(num_blocks - (first_position + 1) // BLOCK, 1)

    dtype: gl.constexpr = query.dtype.element_ty
    q_tiles = gl.allocate_shared_memory(dtype, [2, ROWS, HEAD_DIM], keys.layout)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, HEAD_DIM], keys.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, HEAD_DIM], values.layout)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), count=1)
        mbarrier.init(v_ready.index(stage), count=1)
        mbarrier.init(k_free.index(stage), count=2)
        mbarrier.init(v_free.index(stage), count=2)
    ring = k_tiles, v_tiles, k_ready, v_ready, k_free, v_free

    first_token = gl.load(parts.query_starts + part) + tile_first
    num_rows = gl.minimum(query_len - tile_first, TILE_TOKENS) * GROUP
    num_heads: gl.constexpr = NUM_KV_HEADS * GROUP
    tile = first_token, num_rows, kv_head * GROUP
    first: gl.constexpr = 0
    second: gl.constexpr = ROWS
    _load_query(query, q_tiles.index(0), tile, first, GROUP, num_heads)
    _load_query(query, q_tiles.index(1), tile, second, GROUP, num_heads)
    fence_async_shared()
    gl.thread_barrier()
    blocks = num_blocks, num_masked, first_position
    kv_first = gl.load(kv_starts + part)
    gl.warp_specialize(
        [
            (_attend, (q_tiles.index(0), ring, tile, blocks, output, scale_log2, first, GROUP, num_heads)),
            (_attend, (q_tiles.index(1), ring, tile, blocks, output, scale_log2, second, GROUP, num_heads)),
            (_fetch, (keys, values, ring, kv_first, kv_head * HEAD_DIM, num_blocks)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@gluon.jit
def _load_query(
    query, q_tile, tile, FIRST_ROW: gl.constexpr, GROUP: gl.constexpr, NUM_HEADS: gl.constexpr
):  # fmt: skip
    """Rows of the tile from FIRST_ROW on, zeros behind its last."""
    ROWS: gl.constexpr = q_tile.shape[0]
    HEAD_DIM: gl.constexpr = q_tile.shape[1]
    THREADS: gl.constexpr = HEAD_DIM // 8
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // THREADS, THREADS], [4, 1], [1, 0])
    offsets, exists = _row_offsets(tile, FIRST_ROW, ROWS, GROUP, NUM_HEADS, HEAD_DIM, layout)
    q_tile.store(gl.load(query + offsets, mask=exists, other=0.0))


@gluon.jit
def _row_offsets(
    tile, FIRST_ROW: gl.constexpr, ROWS: gl.constexpr, GROUP: gl.constexpr, NUM_HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Where the tile's rows from FIRST_ROW on are in queries and outputs, (ROWS, HEAD_DIM), and which there are."""
    first_token, num_rows, first_head = tile
    row = FIRST_ROW + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, LAYOUT))
    offset = ((first_token + row // GROUP).to(gl.int64) * NUM_HEADS + first_head + row % GROUP) * HEAD_DIM
    return offset[:, None] + dim[None, :], (row < num_rows)[:, None]


@gluon.jit
def _fetch(keys, values, ring, first_row, first_column, num_blocks):
    """The warp that fetches: keys and values, the last block first, as soon as both groups have read what is there."""
    k_tiles, v_tiles, k_ready, v_ready, k_free, v_free = ring
    STAGES: gl.constexpr = k_tiles.shape[0]
    BLOCK: gl.constexpr = k_tiles.shape[1]
    for i in range(num_blocks):
        stage = i % STAGES
        is_free = (i // STAGES & 1) ^ 1
        row = first_row + (num_blocks - 1 - i) * BLOCK
        mbarrier.wait(k_free.index(stage), is_free)
        mbarrier.expect(k_ready.index(stage), keys.block_type.nbytes)
        tma.async_copy_global_to_shared(keys, [row, first_column], k_ready.index(stage), k_tiles.index(stage))
        mbarrier.wait(v_free.index(stage), is_free)
        mbarrier.expect(v_ready.index(stage), values.block_type.nbytes)
        tma.async_copy_global_to_shared(values, [row, first_column], v_ready.index(stage), v_tiles.index(stage))


@gluon.jit
def _attend(
    q, ring, tile, blocks, output, scale_log2, FIRST_ROW: gl.constexpr, GROUP: gl.constexpr, NUM_HEADS: gl.constexpr
):  # fmt: skip
    """A group of warps that computes: the tile's rows from FIRST_ROW on."""
    k_tiles, v_tiles, k_ready, v_ready, k_free, _ = ring
    num_blocks, num_masked, first_position = blocks
    ROWS: gl.constexpr = q.shape[0]
    HEAD_DIM: gl.constexpr = q.shape[1]
    STAGES: gl.constexpr = k_tiles.shape[0]
    BLOCK: gl.constexpr = k_tiles.shape[1]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    position = first_position + (FIRST_ROW + gl.arange(0, ROWS, S_ROWS)) // GROUP

    mbarrier.wait(k_ready.index(0), 0)
    scores = gl.zeros([ROWS, BLOCK], gl.float32, S_LAYOUT)
    scores = warpgroup_mma(q, k_tiles.index(0).permute((1, 0)), scores, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(k_free.index(0))
    scores = _hide(scores, num_blocks - 1, position, S_LAYOUT)
    highest = gl.full([ROWS], -1.0e30, gl.float32, S_ROWS)
    weight = gl.zeros([ROWS], gl.float32, S_ROWS)
    probability, _, highest, weight = _weigh(scores, highest, weight, scale_log2)
    probability = gl.convert_layout(probability.to(q.dtype), gl.DotOperandLayout(0, O_LAYOUT, 2))
    acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, O_LAYOUT)

    state = acc, probability, highest, weight
    begin = gl.minimum(num_masked, num_blocks)
    state = _attend_blocks(state, q, ring, 1, begin, num_blocks, position, scale_log2, S_LAYOUT, O_LAYOUT, True)
    state = _attend_blocks(
        state, q, ring, begin, num_blocks, num_blocks, position, scale_log2, S_LAYOUT, O_LAYOUT, False
    )
    acc, probability, highest, weight = state
    last = num_blocks - 1
    mbarrier.wait(v_ready.index(last % STAGES), last // STAGES & 1)
    acc = warpgroup_mma(probability, v_tiles.index(last % STAGES), acc, is_async=True)
    acc, probability = warpgroup_mma_wait(0, deps=[acc, probability])

    acc = acc / gl.convert_layout(weight, gl.SliceLayout(1, O_LAYOUT))[:, None]
    offsets, exists = _row_offsets(tile, FIRST_ROW, ROWS, GROUP, NUM_HEADS, HEAD_DIM, O_LAYOUT)
    gl.store(output + offsets, acc.to(output.dtype.element_ty), mask=exists)


@gluon.jit
def _attend_blocks(
    state, q, ring, begin, end, num_blocks, position, scale_log2, S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """Online softmax over blocks `begin` to `end`, counted from the last one; MASKED where some rows see not all.

    While a block is weighed, the values of the one before it, whose probabilities `state` holds, are summed.
    """
    k_tiles, v_tiles, k_ready, v_ready, k_free, v_free = ring
    STAGES: gl.constexpr = k_tiles.shape[0]
    ROWS: gl.constexpr = q.shape[0]
    BLOCK: gl.constexpr = k_tiles.shape[1]
    acc, probability, highest, weight = state
    zeros = gl.zeros([ROWS, BLOCK], gl.float32, S_LAYOUT)
    for i in range(begin, end):
        stage = i % STAGES
        stage_before = (i - 1) % STAGES
        mbarrier.wait(k_ready.index(stage), i // STAGES & 1)
        scores = warpgroup_mma(q, k_tiles.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
        mbarrier.wait(v_ready.index(stage_before), (i - 1) // STAGES & 1)
        acc = warpgroup_mma(probability, v_tiles.index(stage_before), acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores])
        mbarrier.arrive(k_free.index(stage))
        if MASKED:
            scores = _hide(scores, num_blocks - 1 - i, position, S_LAYOUT)
        next_probability, rescale, highest, weight = _weigh(scores, highest, weight, scale_log2)
        # Named here as well, the old probabilities keep their registers until they are multiplied.
        acc, probability = warpgroup_mma_wait(0, deps=[acc, probability])
        mbarrier.arrive(v_free.index(stage_before))
        acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, O_LAYOUT))[:, None]
        probability = gl.convert_layout(next_probability.to(q.dtype), gl.DotOperandLayout(0, O_LAYOUT, 2))
    return acc, probability, highest, weight


@gluon.jit
def _hide(scores, block, position, S_LAYOUT: gl.constexpr):
    """Scores of what comes behind a row's position are made to weigh nothing."""
    BLOCK: gl.constexpr = scores.shape[1]
    key_position = block * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(0, S_LAYOUT))
    return gl.where(key_position[None, :] <= position[:, None], scores, -float("inf"))


@gluon.jit
def _weigh(scores, highest, weight, scale_log2):
    """One block's probabilities up to a factor, how much that of the blocks before shrinks, and the new state."""
    # Scaled after the maximum, so that scaling and subtraction are one instruction.
    new_highest = gl.maximum(highest, gl.max(scores, 1) * scale_log2)
    rescale = gl.exp2(highest - new_highest)
    probability = gl.exp2(scores * scale_log2 - new_highest[:, None])
    weight = weight * rescale + gl.sum(probability, 1)
    return probability, rescale, new_highest, weight
