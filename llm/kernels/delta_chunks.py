"""The gated delta rule for prompts, a chunk of 64 tokens at once (Yang et al. 2024, arXiv:2412.06464, section 3.3).

Within a chunk the tokens' corrections depend on each other and on the memory S before it. With the decay g from the
chunk's beginning, the shares b and A = b (k kᵀ) exp(gᵢ - gⱼ) below the diagonal, they are U - W S, where

    (1 + A) U = b v        (1 + A) W = b exp(g) k

Neither needs S, so one kernel solves these for all chunks side by side. The other walks from chunk to chunk with S, a
block of the head's values in each program, by products on tensor cores. Sums are float32 throughout.
"""

import torch
import triton
import triton.language as tl

from llm.core.recurrent_state import DeltaSpec
from llm.kernels.attention.work import StepParts
from llm.kernels.delta_rule import DecayOperand
from llm.kernels.launch import launch_options, triton_type, wait_for_inputs

CHUNK = 64
LEAST_TOKENS = 32
"""Of a part that is worked out so: a shorter one is walked through as fast."""
_ROWS = 16
"""Tokens whose corrections are solved together: tensor cores take no fewer."""
_VALUES = 32
"""Of a head, in a program that walks through the chunks."""
_ROW_BYTES = 256
"""Of a token's query or key, for which every chip has room: compiled, 90 KB a program, and twice as much 189 KB."""
_MUCH_SHARED_MEMORY = 200 << 10
_CHUNK, _NORM_EPS = tl.constexpr(CHUNK), tl.constexpr(1e-6)
"""The second as in `llm.attention.delta_rule`."""


def can_run(spec: DeltaSpec, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a chip has room for the tiles: every one has for 128 keys in 16 bits, Hopper in float32 too."""
    if device.type != "cuda":
        return True
    row_bytes = triton.next_power_of_2(spec.key_dim) * dtype.itemsize
    if row_bytes <= _ROW_BYTES:
        return True
    room = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    return row_bytes <= 2 * _ROW_BYTES and room >= _MUCH_SHARED_MEMORY


def gated_delta_chunks(
    spec: DeltaSpec,
    convolved: torch.Tensor,
    decay: torch.Tensor,
    log_rates: torch.Tensor,
    decay_bias: torch.Tensor,
    matrices: torch.Tensor,
    parts: StepParts,
    output: torch.Tensor,
    least_tokens: int = LEAST_TOKENS,
    num_values: int = _VALUES,
) -> None:
    """`gated_delta_rule` for the parts of `least_tokens` and more; the others are left alone.

    A token's output depends, in its last bits, on where its part begins.
    """
    num_tokens, dtype = len(convolved), convolved.dtype
    solved = convolved.new_empty(num_tokens, spec.num_value_heads, spec.key_dim + spec.value_dim)
    key_block, value_block = (max(triton.next_power_of_2(size), 16) for size in (spec.key_dim, spec.value_dim))
    values = min(value_block, num_values)
    num_chunks = num_tokens // CHUNK + parts.num_parts  # no step of this size has more
    sizes = {"SPEC": spec, "KEY_BLOCK": key_block, "LEAST": least_tokens, "IS_EXACT": dtype == torch.float32}
    options = launch_options(output.device)
    decays = DecayOperand(decay, log_rates, decay_bias, decay.stride(0))
    _solve_chunks[(spec.num_value_heads, num_chunks)](
        convolved, decays, parts, solved, parts.num_parts, **sizes, VALUE_BLOCK=value_block, ROWS=_ROWS,
        PARTS_BLOCK=triton.next_power_of_2(parts.num_parts), num_warps=4, **options,
    )  # fmt: skip
    num_blocks = triton.cdiv(spec.value_dim, values)
    _walk_chunks[(spec.num_value_heads * num_blocks, parts.num_parts)](
        convolved, decays, matrices, parts, solved, output, spec.key_dim**-0.5, **sizes, VALUES=values,
        NUM_BLOCKS=num_blocks, DTYPE=triton_type(dtype), num_warps=4, num_stages=2, **options,
    )  # fmt: skip


@triton.jit
def _load_unit(convolved, token, first_column, exists, SPEC: tl.constexpr, BLOCK: tl.constexpr):
    """Queries or keys of some tokens from `first_column` on, (tokens, BLOCK) float32, brought to length 1."""
    dim = tl.arange(0, BLOCK)
    mask = exists[:, None] & (dim < SPEC.key_dim)[None, :]
    x = tl.load(convolved + token[:, None] * SPEC.conv_size + first_column + dim[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32)
    return x * tl.rsqrt(tl.sum(x * x, 1) + _NORM_EPS)[:, None]


@triton.jit
def _load_decay(decay, token, head, exists, SPEC: tl.constexpr):
    """Share and log of the decay of some tokens, float32: 0 each for those that do not exist."""
    source = decay.inputs + token * decay.stride + head
    share = tl.load(source, mask=exists, other=0.0).to(tl.float32)
    rate = tl.load(source + SPEC.num_value_heads, mask=exists, other=0.0).to(tl.float32)
    rate += tl.load(decay.bias + head).to(tl.float32)
    softplus = tl.where(rate > 20, rate, tl.log(1 + tl.exp(tl.minimum(rate, 20.0))))
    log_decay = -tl.exp(tl.load(decay.log_rates + head).to(tl.float32)) * softplus
    return tl.where(exists, 1 / (1 + tl.exp(-share)), 0.0), tl.where(exists, log_decay, 0.0)


@triton.jit
def _system(key, other_key, share, faded, other_faded, is_before, IS_EXACT: tl.constexpr):
    """A of some rows and some columns: shares times products of keys times decays, 0 where not before."""
    decayed = tl.exp(tl.where(is_before, faded[:, None] - other_faded[None, :], -float("inf")))
    return share[:, None] * tl.dot(key, tl.trans(other_key), input_precision="ieee" if IS_EXACT else "tf32") * decayed


@triton.jit
def _invert(system, ROWS: tl.constexpr):
    """The inverse of 1 + a matrix that has numbers below its diagonal alone, row by row."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, ROWS)[None, :]
    inverse = (row == column).to(tl.float32)
    for i in range(1, ROWS):
        factors = tl.sum(tl.where(row == i, system, 0.0), 0)
        line = tl.sum(factors[:, None] * inverse, 0)
        inverse -= tl.where(row == i, line[None, :], 0.0)
    return inverse


@triton.jit(do_not_specialize=["num_parts"])
def _solve_chunks(
    convolved, decay, parts, solved, num_parts,
    SPEC: tl.constexpr, KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr, LEAST: tl.constexpr,
    ROWS: tl.constexpr, PARTS_BLOCK: tl.constexpr, IS_EXACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (head, chunk): W and U of its tokens, one behind the other, by blocks of ROWS tokens.

    A block's right-hand sides are freed of what the blocks before it have solved, then multiplied with the inverse of
    the block on the diagonal. Which part a chunk is of, each program counts out.
    """
    wait_for_inputs(PDL)
    head, chunk = tl.program_id(0), tl.program_id(1)
    part = tl.arange(0, PARTS_BLOCK)
    lens = tl.load(parts.query_lens + part, mask=part < num_parts, other=0)
    lens = tl.where(lens >= LEAST, lens, 0)
    ends = tl.cumsum((lens + _CHUNK - 1) // _CHUNK, 0)  # chunks of the parts so far
    is_own = (ends > chunk) & (ends - (lens + _CHUNK - 1) // _CHUNK <= chunk)
    own_len = tl.sum(tl.where(is_own, lens, 0), 0)
    if own_len > 0:
        first = chunk - tl.sum(tl.where(is_own, ends - (lens + _CHUNK - 1) // _CHUNK, 0), 0)
        starts = tl.load(parts.query_starts + part, mask=part < num_parts, other=0)
        start = (tl.sum(tl.where(is_own, starts, 0), 0) + first * _CHUNK).to(tl.int64)
        num_tokens = tl.minimum(own_len - first * _CHUNK, _CHUNK)
        dtype: tl.constexpr = solved.dtype.element_ty
        row = tl.arange(0, ROWS)
        key_dim, value_dim = tl.arange(0, KEY_BLOCK), tl.arange(0, VALUE_BLOCK)
        key_column = (SPEC.num_key_heads + head // (SPEC.num_value_heads // SPEC.num_key_heads)) * SPEC.key_dim
        value_column = 2 * SPEC.num_key_heads * SPEC.key_dim + head * SPEC.value_dim + value_dim
        total = 0.0
        # Of the last three blocks, the nearest first.
        key_0 = tl.zeros([ROWS, KEY_BLOCK], tl.float32)
        values_0, faded_0 = tl.zeros([ROWS, VALUE_BLOCK], tl.float32), tl.zeros([ROWS], tl.float32)
        key_1, faded_1, values_1, keys_1 = key_0, faded_0, values_0, key_0
        key_2, faded_2, values_2, keys_2, keys_0 = key_0, faded_0, values_0, key_0, key_0
        is_before = tl.full([ROWS, ROWS], True, tl.int1)
        for block in tl.static_range(0, _CHUNK // ROWS):
            token = start + block * ROWS + row
            exists = block * ROWS + row < num_tokens
            share, log_decay = _load_decay(decay, token, head, exists, SPEC)
            faded = total + tl.cumsum(log_decay, 0)
            total += tl.sum(log_decay, 0)
            key = _load_unit(convolved, token, key_column, exists, SPEC, KEY_BLOCK)
            place = convolved + token[:, None] * SPEC.conv_size + value_column[None, :]
            mask = exists[:, None] & (value_dim < SPEC.value_dim)[None, :]
            values = share[:, None] * tl.load(place, mask=mask, other=0.0).to(tl.float32)
            keys = (share * tl.exp(faded))[:, None] * key
            if block > 0:
                system = _system(key, key_0, share, faded, faded_0, is_before, IS_EXACT)
                values -= tl.dot(system, values_0, input_precision="ieee" if IS_EXACT else "tf32")
                keys -= tl.dot(system, keys_0, input_precision="ieee" if IS_EXACT else "tf32")
            if block > 1:
                system = _system(key, key_1, share, faded, faded_1, is_before, IS_EXACT)
                values -= tl.dot(system, values_1, input_precision="ieee" if IS_EXACT else "tf32")
                keys -= tl.dot(system, keys_1, input_precision="ieee" if IS_EXACT else "tf32")
            if block > 2:
                system = _system(key, key_2, share, faded, faded_2, is_before, IS_EXACT)
                values -= tl.dot(system, values_2, input_precision="ieee" if IS_EXACT else "tf32")
                keys -= tl.dot(system, keys_2, input_precision="ieee" if IS_EXACT else "tf32")
            system = _system(key, key, share, faded, faded, row[:, None] > row[None, :], IS_EXACT)
            inverse = _invert(system, ROWS)
            values = tl.dot(inverse, values, input_precision="ieee" if IS_EXACT else "tf32")
            keys = tl.dot(inverse, keys, input_precision="ieee" if IS_EXACT else "tf32")
            target = solved + (token * SPEC.num_value_heads + head)[:, None] * (SPEC.key_dim + SPEC.value_dim)
            key_mask = exists[:, None] & (key_dim < SPEC.key_dim)[None, :]
            tl.store(target + key_dim[None, :], keys.to(dtype), mask=key_mask)
            tl.store(target + SPEC.key_dim + value_dim[None, :], values.to(dtype), mask=mask)
            key_2, faded_2, values_2, keys_2 = key_1, faded_1, values_1, keys_1
            key_1, faded_1, values_1, keys_1 = key_0, faded_0, values_0, keys_0
            key_0, faded_0, values_0, keys_0 = key, faded, values, keys


@triton.jit
def _walk_chunks(
    convolved, decay, matrices, parts, solved, output, scale, SPEC: tl.constexpr,
    KEY_BLOCK: tl.constexpr, VALUES: tl.constexpr, NUM_BLOCKS: tl.constexpr, LEAST: tl.constexpr, DTYPE: tl.constexpr,
    IS_EXACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (head and block of its values, part): these columns of the memory, through all chunks of the part."""
    wait_for_inputs(PDL)
    head, part = tl.program_id(0) // NUM_BLOCKS, tl.program_id(1)
    num_new = tl.load(parts.query_lens + part)
    if num_new >= LEAST:
        dim, row = tl.arange(0, KEY_BLOCK), tl.arange(0, _CHUNK)
        value = (tl.program_id(0) % NUM_BLOCKS) * VALUES + tl.arange(0, VALUES)
        key_mask, value_mask = dim < SPEC.key_dim, value < SPEC.value_dim
        query_column = head // (SPEC.num_value_heads // SPEC.num_key_heads) * SPEC.key_dim
        state_row = tl.load(parts.rows + part).to(tl.int64) * SPEC.num_value_heads + head
        places = matrices + (state_row * SPEC.value_dim + value[None, :]) * SPEC.key_dim + dim[:, None]
        mask = key_mask[:, None] & value_mask[None, :]
        is_begun = tl.load(parts.context_lens + part) > num_new
        memory = tl.load(places, mask=mask & is_begun, other=0.0)
        start = tl.load(parts.query_starts + part).to(tl.int64)
        for first in range(0, num_new, _CHUNK):
            token, exists = start + first + row, first + row < num_new
            _, log_decay = _load_decay(decay, token, head, exists, SPEC)
            faded = tl.cumsum(log_decay, 0)
            total = tl.sum(log_decay, 0)
            query = _load_unit(convolved, token, query_column, exists, SPEC, KEY_BLOCK) * scale
            key_column = SPEC.num_key_heads * SPEC.key_dim + query_column
            key = _load_unit(convolved, token, key_column, exists, SPEC, KEY_BLOCK)
            source = solved + (token * SPEC.num_value_heads + head)[:, None] * (SPEC.key_dim + SPEC.value_dim)
            weights = tl.load(source + dim[None, :], mask=exists[:, None] & key_mask[None, :], other=0.0)
            value_tile = exists[:, None] & value_mask[None, :]
            wanted = tl.load(source + SPEC.key_dim + value[None, :], mask=value_tile, other=0.0).to(tl.float32)
            held = memory.to(DTYPE)
            correction = wanted - tl.dot(weights, held, input_precision="ieee" if IS_EXACT else "tf32")
            narrow = correction.to(DTYPE)
            is_before = row[:, None] >= row[None, :]
            decayed = tl.exp(tl.where(is_before, faded[:, None] - faded[None, :], -float("inf")))
            query_rows, key_rows = query.to(DTYPE), key.to(DTYPE)
            scores = tl.dot(query_rows, tl.trans(key_rows), input_precision="ieee" if IS_EXACT else "tf32") * decayed
            result = tl.exp(faded)[:, None] * tl.dot(query_rows, held, input_precision="ieee" if IS_EXACT else "tf32")
            result += tl.dot(scores.to(DTYPE), narrow, input_precision="ieee" if IS_EXACT else "tf32")
            output_row = output + token[:, None] * (SPEC.num_value_heads * SPEC.value_dim)
            target = output_row + head * SPEC.value_dim + value[None, :]
            tl.store(target, result.to(output.dtype.element_ty), mask=value_tile)
            left = (key * tl.exp(total - faded)[:, None]).to(DTYPE)
            memory = tl.exp(total) * memory + tl.dot(
                tl.trans(left), narrow, input_precision="ieee" if IS_EXACT else "tf32"
            )
        tl.store(places, memory, mask=mask)
