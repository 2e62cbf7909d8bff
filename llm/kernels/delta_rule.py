"""The gated delta rule over a step's parts, with the short convolution in front of it and the gated norm behind.

See `llm.attention.delta_rule` for what is computed. Each row's state is read once and written once a step. The rule
walks through a part's tokens one by one, with a few rows of a head's matrix in the registers of one warp, so that its
two sums a token cross no warp; heads, rows of the matrix and parts run side by side. A token's output depends, bit by
bit, on the tokens before it in its sequence alone: not on the steps in which those came.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from llm.core.recurrent_state import DeltaSpec
from llm.kernels.attention.work import StepParts
from llm.kernels.launch import launch_options, wait_for_inputs
from llm.kernels.quantization import ScaledProduct, load_product, scale_arguments, unscaled

_CHANNELS = 512
"""Of a program of the convolution."""
_VALUES = 8
"""Rows of a head's matrix that a warp of the rule keeps: with 128 columns 32 registers of each thread."""
_NUM_WARPS = 1
_ANY = 2**31 - 1
"""More tokens than any part has."""
_NORM_EPS = tl.constexpr(1e-6)
"""As in `llm.attention.delta_rule`."""


class DecayOperand(NamedTuple):
    """What decides how much of its memory each head of values keeps, see `DeltaMixer`.

    Attributes:
        inputs: (tokens, 2 num_value_heads or more): what decides each head's share, then its decay.
        log_rates, bias: (num_value_heads,).
        stride: elements between two tokens of `inputs`.
    """

    inputs: torch.Tensor
    log_rates: torch.Tensor
    bias: torch.Tensor
    stride: int


def short_convolution(
    mixed: torch.Tensor | ScaledProduct,
    weight: torch.Tensor,
    tails: torch.Tensor,
    token_rows: torch.Tensor,
    positions: torch.Tensor,
    output: torch.Tensor,
) -> None:
    """Write SiLU of the causal convolution of the first channels, and the tails of rows with one token in the step.

    Args:
        mixed: (tokens, channels and more), contiguous. Tokens of a row are adjacent.
        weight: (channels, 1, kernel_size), contiguous.
        tails: (rows, kernel_size - 1, channels), what came in before; not looked at where a sequence begins.
        token_rows, positions: (tokens,) int32, row and position of each token's sequence.
        output: (tokens, channels), contiguous.
    """
    num_tokens, num_channels = output.shape
    _short_convolution[(num_tokens, triton.cdiv(num_channels, _CHANNELS))](
        unscaled(mixed), weight, tails, token_rows, positions, output, num_tokens, unscaled(mixed).stride(0),
        **scale_arguments(mixed), NUM_CHANNELS=num_channels, KERNEL_SIZE=weight.shape[-1], BLOCK=_CHANNELS, num_warps=4,
        **launch_options(output.device),
    )  # fmt: skip


def store_tails(mixed: torch.Tensor | ScaledProduct, tails: torch.Tensor, parts: StepParts) -> None:
    """Write the tails of parts with several tokens; the arguments are those of `short_convolution`, which ran before.

    Args:
        parts: of the step.
    """
    _, tail_len, num_channels = tails.shape
    _store_tails[(parts.num_parts, triton.cdiv(num_channels, _CHANNELS))](
        unscaled(mixed), tails, parts, unscaled(mixed).stride(0), **scale_arguments(mixed),
        NUM_CHANNELS=num_channels, TAIL_LEN=tail_len,
        BLOCK=_CHANNELS, num_warps=4, **launch_options(tails.device),
    )  # fmt: skip


def gated_delta_rule(
    spec: DeltaSpec,
    convolved: torch.Tensor,
    decay: torch.Tensor,
    log_rates: torch.Tensor,
    decay_bias: torch.Tensor,
    matrices: torch.Tensor,
    parts: StepParts,
    output: torch.Tensor,
    most_tokens: int | None = None,
) -> None:
    """Write the rule's outputs for the tokens of all parts, and the rows' next matrices.

    Args:
        convolved: (tokens, conv_size), contiguous.
        decay: (tokens, 2 num_value_heads or more): what decides each head's share, then its decay.
        log_rates, decay_bias: (num_value_heads,), see `DeltaMixer`.
        matrices: (rows, num_value_heads, value_dim, key_dim) float32; not looked at where a sequence begins.
        parts: of the step; a row is in one of them at most.
        output: (tokens, output_size), contiguous.
        most_tokens: parts of more are left alone; None for none.
    """
    num_values = _VALUES * _NUM_WARPS
    num_blocks = triton.cdiv(spec.value_dim, num_values)
    _gated_delta_rule[(spec.num_value_heads * num_blocks, parts.num_parts)](
        convolved, DecayOperand(decay, log_rates, decay_bias, decay.stride(0)), matrices, parts, output,
        spec.key_dim**-0.5, SPEC=spec, KEY_BLOCK=triton.next_power_of_2(spec.key_dim), VALUES=num_values,
        NUM_BLOCKS=num_blocks, MOST=most_tokens or _ANY,
        num_warps=_NUM_WARPS, **launch_options(output.device),
    )  # fmt: skip


def gate_by_norm(
    spec: DeltaSpec,
    mixed: torch.Tensor | ScaledProduct,
    weight: torch.Tensor,
    eps: float,
    output: torch.Tensor,
) -> None:
    """Normalise each head's output and scale it by SiLU of its gate, in place.

    Args:
        mixed: (tokens, conv_size + output_size), contiguous: the gates are the last.
        weight: (value_dim,), of the norm.
        eps: of the norm.
        output: (tokens, output_size), contiguous.
    """
    _gate_by_norm[(len(output), spec.num_value_heads)](
        unscaled(mixed), weight, output, eps, **scale_arguments(mixed), CONV_SIZE=spec.conv_size,
        OUTPUT_SIZE=spec.output_size, VALUE_DIM=spec.value_dim, BLOCK=triton.next_power_of_2(spec.value_dim),
        num_warps=1, **launch_options(output.device),
    )  # fmt: skip


@triton.jit
def silu(x):
    """x sigmoid(x), float32."""
    return x / (1 + tl.exp(-x))


@triton.jit(do_not_specialize=["num_tokens"])
def _short_convolution(
    mixed, weight, tails, token_rows, positions, output, num_tokens, stride, row_scales, scales, bias,
    NUM_CHANNELS: tl.constexpr, KERNEL_SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (token, block of channels)."""
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < NUM_CHANNELS
    dtype: tl.constexpr = output.dtype.element_ty
    row = tl.load(token_rows + token).to(tl.int64)
    position = tl.load(positions + token)
    tail = tails + row * ((KERNEL_SIZE - 1) * NUM_CHANNELS) + channel
    x = load_product(mixed, token * stride + channel, mask, token, channel, row_scales, scales, bias, dtype)
    total = x.to(tl.float32) * tl.load(weight + channel * KERNEL_SIZE + KERNEL_SIZE - 1, mask=mask).to(tl.float32)
    num_before = 0  # tokens of the row in this step that come before, as far as that is of interest
    for i in tl.static_range(1, KERNEL_SIZE):
        earlier = tl.maximum(token - i, 0)
        num_before += ((token >= i) & (tl.load(token_rows + earlier) == row)).to(tl.int32)
    for i in tl.static_range(1, KERNEL_SIZE):
        is_new = i <= num_before
        new_token = tl.maximum(token - i, 0)
        new = load_product(
            mixed, new_token * stride + channel, mask & is_new, new_token, channel, row_scales, scales, bias, dtype
        )
        is_old = (i > num_before) & (i <= position)
        place = tl.maximum(KERNEL_SIZE - 1 - i + num_before, 0) * NUM_CHANNELS
        old = tl.load(tail + place, mask=mask & is_old, other=0.0)
        before = tl.where(is_new, new, old)
        factor = tl.load(weight + channel * KERNEL_SIZE + KERNEL_SIZE - 1 - i, mask=mask).to(tl.float32)
        total += before.to(tl.float32) * factor
    tl.store(output + token * NUM_CHANNELS + channel, silu(total).to(dtype), mask=mask)
    is_last = (token + 1 >= num_tokens) | (tl.load(token_rows + tl.minimum(token + 1, num_tokens - 1)) != row)
    if is_last & (num_before == 0):
        for i in tl.static_range(0, KERNEL_SIZE - 2):
            moved = tl.load(tail + (i + 1) * NUM_CHANNELS, mask=mask & (KERNEL_SIZE - 2 - i <= position), other=0.0)
            tl.store(tail + i * NUM_CHANNELS, moved, mask=mask)
        tl.store(tail + (KERNEL_SIZE - 2) * NUM_CHANNELS, x, mask=mask)


@triton.jit
def _store_tails(
    mixed, tails, parts, stride, row_scales, scales, bias,
    NUM_CHANNELS: tl.constexpr, TAIL_LEN: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (part, block of channels). A tail's places are written in order; what moves comes from later ones."""
    wait_for_inputs(PDL)
    part = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < NUM_CHANNELS
    num_new = tl.load(parts.query_lens + part)
    if num_new > 1:
        end = (tl.load(parts.query_starts + part) + num_new).to(tl.int64)
        context_len = tl.load(parts.context_lens + part)
        tail = tails + tl.load(parts.rows + part).to(tl.int64) * (TAIL_LEN * NUM_CHANNELS) + channel
        for i in tl.static_range(0, TAIL_LEN):
            num_back = TAIL_LEN - i
            is_new = num_back <= num_new
            token = tl.where(is_new, end - num_back, 0)
            new = load_product(
                mixed, token * stride + channel, mask & is_new, token, channel, row_scales, scales, bias,
                tails.dtype.element_ty,
            )  # fmt: skip
            is_old = (num_back > num_new) & (num_back <= context_len)
            place = tl.minimum(i + num_new, TAIL_LEN - 1) * NUM_CHANNELS
            old = tl.load(tail + place, mask=mask & is_old, other=0.0)
            tl.store(tail + i * NUM_CHANNELS, tl.where(is_new, new, old), mask=mask)


@triton.jit
def _load_token(
    convolved, decay, token, query_column, key_column, value_column, key_mask, value_mask, head, SPEC: tl.constexpr
):  # fmt: skip
    """What the rule needs of one token: query and key (KEY_BLOCK,), values (VALUES,), share and decay of the head."""
    source = convolved + token * SPEC.conv_size
    query = tl.load(source + query_column, mask=key_mask, other=0.0).to(tl.float32)
    key = tl.load(source + key_column, mask=key_mask, other=0.0).to(tl.float32)
    value = tl.load(source + value_column, mask=value_mask, other=0.0).to(tl.float32)
    share = tl.load(decay.inputs + token * decay.stride + head).to(tl.float32)
    rate = tl.load(decay.inputs + token * decay.stride + SPEC.num_value_heads + head).to(tl.float32)
    return query, key, value, share, rate


@triton.jit
def _gated_delta_rule(
    convolved, decay, matrices, parts, output, scale, SPEC: tl.constexpr, KEY_BLOCK: tl.constexpr,
    VALUES: tl.constexpr, NUM_BLOCKS: tl.constexpr, MOST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (head and block of its values, part): these rows of the head's matrix, through all tokens of the part."""
    wait_for_inputs(PDL)
    head, part = tl.program_id(0) // NUM_BLOCKS, tl.program_id(1)
    num_new = tl.load(parts.query_lens + part)
    if (num_new > 0) & (num_new <= MOST):
        dim = tl.arange(0, KEY_BLOCK)
        value = (tl.program_id(0) % NUM_BLOCKS) * VALUES + tl.arange(0, VALUES)
        key_mask, value_mask = dim < SPEC.key_dim, value < SPEC.value_dim
        query_column = head // (SPEC.num_value_heads // SPEC.num_key_heads) * SPEC.key_dim + dim
        key_column = SPEC.num_key_heads * SPEC.key_dim + query_column
        value_column = 2 * SPEC.num_key_heads * SPEC.key_dim + head * SPEC.value_dim + value
        row = tl.load(parts.rows + part).to(tl.int64)
        matrix_row = (row * SPEC.num_value_heads + head) * SPEC.value_dim + value[:, None]
        places = matrices + matrix_row * SPEC.key_dim + dim[None, :]
        mask = value_mask[:, None] & key_mask[None, :]
        is_begun = tl.load(parts.context_lens + part) > num_new
        matrix = tl.load(places, mask=mask & is_begun, other=0.0)
        speed = -tl.exp(tl.load(decay.log_rates + head).to(tl.float32))
        offset = tl.load(decay.bias + head).to(tl.float32)
        token = tl.load(parts.query_starts + part).to(tl.int64)
        query, key, values, share, rate = _load_token(
            convolved, decay, token, query_column, key_column, value_column, key_mask, value_mask, head, SPEC,
        )  # fmt: skip
        for i in range(num_new):
            # The next token is on its way while this one is worked on.
            next_query, next_key, next_values, next_share, next_rate = _load_token(
                convolved, decay, token + (i + 1 < num_new).to(tl.int64), query_column, key_column, value_column,
                key_mask, value_mask, head, SPEC,
            )  # fmt: skip
            rate += offset
            softplus = tl.where(rate > 20, rate, tl.log(1 + tl.exp(tl.minimum(rate, 20.0))))
            key *= tl.rsqrt(tl.sum(key * key, 0) + _NORM_EPS)
            query *= tl.rsqrt(tl.sum(query * query, 0) + _NORM_EPS) * scale
            matrix *= tl.exp(speed * softplus)
            held = tl.sum(matrix * key[None, :], 1)
            correction = (values - held) / (1 + tl.exp(-share))
            matrix += correction[:, None] * key[None, :]
            result = tl.sum(matrix * query[None, :], 1)
            target = output + token * (SPEC.num_value_heads * SPEC.value_dim) + head * SPEC.value_dim + value
            tl.store(target, result.to(output.dtype.element_ty), mask=value_mask)
            query, key, values, share, rate = next_query, next_key, next_values, next_share, next_rate
            token += 1
        tl.store(places, matrix, mask=mask)


@triton.jit
def _gate_by_norm(
    mixed, weight, output, eps, row_scales, scales, bias,
    CONV_SIZE: tl.constexpr, OUTPUT_SIZE: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (token, head). Rounded where `DeltaMixer.gated_norm` rounds."""
    wait_for_inputs(PDL)
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dim = tl.arange(0, BLOCK)
    mask = dim < VALUE_DIM
    dtype: tl.constexpr = output.dtype.element_ty
    place = output + token * OUTPUT_SIZE + head * VALUE_DIM + dim
    x = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    normed = (x * tl.rsqrt(tl.sum(x * x, 0) / VALUE_DIM + eps)).to(dtype)
    normed = (normed * tl.load(weight + dim, mask=mask, other=0.0)).to(dtype)
    column = CONV_SIZE + head * VALUE_DIM + dim
    offsets = token * (CONV_SIZE + OUTPUT_SIZE) + column
    gate = load_product(mixed, offsets, mask, token, column, row_scales, scales, bias, dtype).to(tl.float32)
    tl.store(place, (normed.to(tl.float32) * silu(gate)).to(dtype), mask=mask)
