"""Mixtures of experts: each expert's products with the tokens that it gets, all experts in one launch.

One token's products read each chosen expert's weights once, without tensor cores. Of more tokens the pairs of token and
expert are ordered by expert, and a tile of pairs is multiplied with a block of one expert's outputs; the kernel finds
out which by itself, so that shapes of launches depend on nothing but the number of tokens. Few tokens make tiles that
are as good as empty: these are bound by reading weights, like products of few rows.

What a token gets depends on nothing but that token as long as sums are cut alike: each pair's result is written by
itself, and added up in the order of the token's experts.
"""

import torch
import triton
import triton.language as tl

from llm.core.weight_groups import WeightGroups
from llm.kernels.adapters import AdapterEntries, AdapterFactors, expand, shrink
from llm.kernels.expert_adapters import (
    ExpertFactors,
    MixtureAdapters,
    PairAdapters,
    PairRule,
    add_adapters,
    shrink_pairs,
)
from llm.kernels.expert_groups import groups_tile_product
from llm.kernels.expert_many_pairs import many_pairs_product
from llm.kernels.expert_pairs import find_tile, load_pairs, store_pairs
from llm.kernels.expert_tiles import (
    MAX_SUMMED_ROWS,
    WRITTEN_OUT_PAIRS,
    WRITTEN_OUT_PAIRS_OF_MXFP4,
    ExpertTile,
    expert_group_tile,
    expert_tile,
)
from llm.kernels.few_rows import single_row_product
from llm.kernels.launch import launch_options, most_stages, prefetch, wait_for_inputs
from llm.kernels.linear import Weights
from llm.kernels.mxfp4 import TILE_K as TILE_K_OF_MXFP4
from llm.kernels.norm import Norm, ResidualStream, rms_norm
from llm.kernels.routing import ExpertShape, Routes, route

_SINGLE_LEAST_TILE_K, _SINGLE_MOST_TILE_K = 256, 1024
_GATE_UP_CUT, _DOWN_CUT = (4, 4), (4, 4)
"""Of the products of one token: outputs of a program, and its warps."""
_SUM_BLOCK = 1024
_MANY_ROWS = 128
"""Pairs of a tile from which on tokens are the left factor, where nobody asks that sums have one order."""


class ExpertMixture:
    """The experts of all layers of a model on one device, with their scratch memory. Not thread-safe.

    Args:
        shape: of every layer's experts.
        max_tokens: most tokens at once.
        dtype: of the activations.
        device: of all tensors.
        deterministic: a token's result, bit by bit, depends on nothing but that token and the weights.
        held: the experts whose weights are here; None for all.
    """

    def __init__(
        self,
        shape: ExpertShape,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        deterministic: bool = False,
        held: range | None = None,
    ) -> None:
        self._shape = shape
        self._held = held
        self._deterministic = deterministic
        self._device = device
        self._routes = Routes.allocate(shape, max_tokens, device)
        num_pairs = max_tokens * shape.per_token
        self._activated = torch.empty(num_pairs, shape.size, dtype=dtype, device=device)
        """In the order of experts."""
        self._made = torch.empty(num_pairs, shape.hidden_size, dtype=dtype, device=device)
        """Of each pair, in the order of tokens."""

    def __call__(
        self,
        stream: ResidualStream,
        norm: Norm,
        router: torch.Tensor,
        gate_up: Weights,
        down: Weights,
        router_bias: torch.Tensor | None = None,
        correction: torch.Tensor | None = None,
        *,
        output: torch.Tensor | None = None,
        adapters: MixtureAdapters | None = None,
    ) -> None:
        """Add what its experts make of each token's norm to the stream.

        Args:
            router: (num_experts, hidden_size).
            gate_up: of (num_experts, 2 size, hidden_size), each expert's gate first.
            down: of (num_experts, hidden_size, size).
            router_bias, correction: see `route`.
            output: (tokens, hidden_size), what is added to in place of the stream.
            adapters: of the tokens; None for none.
        """
        total, shape = stream.total, self._shape
        output = total if output is None else output
        if self._held is None and adapters is None and self._is_single(stream, norm, gate_up, down):
            route(total, router, self._routes, norm, router_bias, correction)
            self._single(total, norm, gate_up, down, output)
            return
        num_tokens = len(total)
        normed = torch.empty_like(total)
        rms_norm(stream, norm, normed)
        more = None if adapters is None else self._more_logits(normed, adapters.which, adapters.router)
        route(normed, router, self._routes, bias=router_bias, correction=correction, more=more)
        if self._held is not None:
            self._leave_others(self._held, num_tokens)
        self._routes.order_pairs(num_tokens)
        of_gate_up = of_down = None
        if adapters is not None:
            of_gate_up = self._shrunk(normed, adapters.gate_up, adapters.which, num_tokens, swiglu=True)
        self.product(normed, gate_up, self._activated, num_tokens, swiglu=True, adapters=of_gate_up)
        if adapters is not None:
            of_down = self._shrunk(self._activated, adapters.down, adapters.which, num_tokens, swiglu=False)
        self.product(self._activated, down, self._made, num_tokens, swiglu=False, adapters=of_down)
        block = min(triton.next_power_of_2(shape.hidden_size), _SUM_BLOCK)
        _add_pairs[(num_tokens, triton.cdiv(shape.hidden_size, block))](
            self._made, output, HIDDEN=shape.hidden_size, PER_TOKEN=shape.per_token, BLOCK=block, num_warps=4,
            **launch_options(self._device),
        )  # fmt: skip

    def _more_logits(self, x: torch.Tensor, which: AdapterEntries, factors: AdapterFactors) -> torch.Tensor:
        """What the adapters of tokens add to the logits of experts: (tokens, num_experts) float32."""
        more = torch.zeros(len(x), self._shape.num_experts, dtype=torch.float32, device=self._device)
        expand(shrink(x, which, factors, deterministic=self._deterministic), which, factors, more)
        return more

    def _shrunk(
        self, x: torch.Tensor, factors: ExpertFactors, which: AdapterEntries, num_tokens: int, *, swiglu: bool
    ) -> tuple[PairAdapters, PairRule]:
        return shrink_pairs(
            x, factors, which, self._routes, num_tokens, swiglu=swiglu, deterministic=self._deterministic
        )

    def _leave_others(self, held: range, num_tokens: int) -> None:
        """Number the pairs' experts as their weights are here. What experts elsewhere make is zero here."""
        num_pairs = num_tokens * self._shape.per_token
        experts = self._routes.experts[:num_pairs]
        is_elsewhere = (experts < held.start) | (experts >= held.stop)
        experts.sub_(held.start).masked_fill_(is_elsewhere, self._shape.num_experts)  # a number that no expert has
        self._made[:num_pairs].zero_()

    def product(
        self,
        x: torch.Tensor,
        weights: Weights,
        output: torch.Tensor,
        num_tokens: int,
        *,
        swiglu: bool,
        tile: ExpertTile | None = None,
        adapters: tuple[PairAdapters, PairRule] | None = None,
    ) -> None:
        """Multiply each pair's row with its expert's weights, once the pairs are ordered.

        Args:
            x: with SwiGLU the tokens, (tokens, in); else a row for each pair in the order of experts.
            output: (pairs, out): with SwiGLU in the order of experts; else in the order of tokens, and weighted.
            tile: None for one that is fast.
            adapters: what `shrink_pairs` gives for x; None for none.
        """
        groups = weights.groups
        if groups is not None and (not weights.has_tiles or (tile is None and self._writes_out(groups, num_tokens))):
            weights, groups = weights.written_out(x.dtype), None
        shape, itemsize, device = self._shape, x.dtype.itemsize, self._device
        num_pairs, num_inputs, num_outputs = num_tokens * shape.per_token, x.shape[1], output.shape[1]
        if tile is None:
            kind = itemsize, self._deterministic, swiglu
            if groups is None:
                tile = expert_tile(num_pairs, shape.num_experts, *kind)
            else:
                tile = expert_group_tile(num_pairs, shape.num_experts, groups.span, *kind)
        inputs_a_stage = TILE_K_OF_MXFP4.value if groups is not None and groups.is_mxfp4 else tile.k
        row_bytes = inputs_a_stage * itemsize
        weight_bytes = row_bytes if groups is None else weights.bytes_of(inputs_a_stage)
        bytes_a_stage = (2 if swiglu else 1) * tile.outputs * weight_bytes + tile.rows * row_bytes
        pair_adapters, rule = adapters or (None, None)
        counts = shape.pair_counts
        grid = triton.cdiv(num_outputs, tile.outputs), counts.most_tiles(num_tokens, tile.rows)
        arguments = {
            "x": x, "weights": weights.operand, "pairs": self._routes.pairs, "output": output,
            "adapters": pair_adapters, "num_outputs": num_outputs, "num_inputs": num_inputs,
            "COUNTS": counts, "TILE": tile, "SWIGLU": swiglu, "LIMIT": shape.swiglu_limit if swiglu else None,
            "ALPHA": shape.swiglu_alpha, "RULE": rule, "num_warps": tile.num_warps,
            "num_stages": min(tile.num_stages, most_stages(device, bytes_a_stage)), **launch_options(device),
        }  # fmt: skip
        is_even = num_outputs % tile.outputs == 0
        if groups is not None:
            groups_tile_product[grid](
                groups=weights.group_operand, num_groups=groups.scales.shape[-2], GROUP=groups.size, IS_EVEN=is_even,
                IN_UNITS=tile.rows > MAX_SUMMED_ROWS and not self._deterministic,
                IN_ASSEMBLY=device.type == "cuda" and itemsize == 2, **arguments,
            )  # fmt: skip
            return
        is_even &= num_inputs % tile.k == 0
        if tile.rows >= _MANY_ROWS and is_even and not self._deterministic:
            many_pairs_product[grid](**arguments)
        else:
            _expert_product[grid](IS_EVEN=is_even, **arguments)

    def _writes_out(self, groups: WeightGroups, num_tokens: int) -> bool:
        """Whether weights in groups are written out first, which takes about as long as the product of some tokens."""
        shape = self._shape
        least = WRITTEN_OUT_PAIRS_OF_MXFP4 if groups.is_mxfp4 else WRITTEN_OUT_PAIRS
        return not self._deterministic and num_tokens * shape.per_token >= least * shape.num_experts

    def _is_single(self, stream: ResidualStream, norm: Norm, gate_up: Weights, down: Weights) -> bool:
        shape = self._shape
        return (
            len(stream.total) == 1
            and gate_up.groups is None
            and down.groups is None
            and not self._deterministic
            and stream.pending is None
            and not norm.offset
            and shape.hidden_size % 64 == 0
            and shape.size % _GATE_UP_CUT[0] == 0
        )

    def _single(self, total: torch.Tensor, norm: Norm, gate_up: Weights, down: Weights, output: torch.Tensor) -> None:
        """Add to `output` what its experts, once known, make of one token's norm; each one's weights are read once."""
        shape, routes, options = self._shape, self._routes, launch_options(self._device)
        hidden_size, size = shape.hidden_size, shape.size
        tile_k = _row_tile(hidden_size)
        outputs, warps = _GATE_UP_CUT
        single_row_product[(size // outputs, shape.per_token)](
            total, norm.weight, gate_up.operand, self._activated, routes.experts, size, hidden_size, norm.eps,
            OUTPUTS=outputs, TILE_K=tile_k, IS_EVEN=hidden_size % tile_k == 0,
            SWIGLU=True, GELU=False, OFFSET=None, ADDS=False, LIMIT=shape.swiglu_limit, ALPHA=shape.swiglu_alpha,
            CAN_PREFETCH=False, num_warps=warps, **options,
        )  # fmt: skip
        tile_k = min(_SINGLE_MOST_TILE_K, triton.next_power_of_2(size))
        outputs, warps = _DOWN_CUT
        _single_sum[(hidden_size // outputs,)](
            self._activated, down.operand, routes.experts, routes.weights, output, hidden_size,
            SIZE=size, PER_TOKEN=shape.per_token, OUTPUTS=outputs, TILE_K=tile_k,
            CAN_PREFETCH=self._device.type == "cuda" and tile_k >= 64, num_warps=warps, **options,
        )  # fmt: skip


def _row_tile(num_inputs: int) -> int:
    """Inputs that a program of one row reads at once: as many as divide all; where these are few, more, with masks."""
    dividing = num_inputs & -num_inputs
    if dividing < _SINGLE_LEAST_TILE_K and num_inputs >= _SINGLE_MOST_TILE_K:
        return _SINGLE_MOST_TILE_K
    return min(dividing, _SINGLE_MOST_TILE_K)


@triton.jit
def _expert_product(
    x, weights, pairs, output, adapters, num_outputs, num_inputs,
    COUNTS: tl.constexpr, TILE: tl.constexpr, SWIGLU: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr,
    RULE: tl.constexpr, IS_EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (block of outputs, tile of pairs of one expert). Weights are the left factor, as in `tile_product`."""
    wait_for_inputs(PDL)
    rows: tl.constexpr = TILE.rows
    outputs: tl.constexpr = TILE.outputs
    mine, first, last = find_tile(pairs.starts, tl.program_id(1), COUNTS, rows)
    if mine >= COUNTS.block:
        return
    place, is_pair, pair, source = load_pairs(pairs, first, last, rows, COUNTS.per_token, SWIGLU)
    column_of = x + source[None, :].to(tl.int64) * num_inputs
    out = tl.program_id(0) * outputs + tl.arange(0, outputs)
    # Outputs past the last one read its weights, and are not written.
    weight_row = out if IS_EVEN else tl.minimum(out, num_outputs - 1)
    num_rows = (2 if SWIGLU else 1) * num_outputs
    gate_row = weights.numbers + mine.to(tl.int64) * num_rows * num_inputs + weight_row[:, None] * num_inputs
    up_row = gate_row + num_outputs * num_inputs
    k = tl.arange(0, TILE.k)
    acc = tl.zeros([outputs, rows], tl.float32)
    up = tl.zeros([outputs, rows], tl.float32)
    for start in range(0, num_inputs, TILE.k):
        column = start + k
        if IS_EVEN:
            columns = tl.load(column_of + column[:, None])
            gate = tl.load(gate_row + column[None, :])
        else:
            is_input = column < num_inputs
            columns = tl.load(column_of + column[:, None], mask=is_input[:, None], other=0.0)
            gate = tl.load(gate_row + column[None, :], mask=is_input[None, :], other=0.0)
        acc = tl.dot(gate.to(columns.dtype), columns, acc, input_precision="ieee")
        if SWIGLU:
            if IS_EVEN:
                more = tl.load(up_row + column[None, :])
            else:
                more = tl.load(up_row + column[None, :], mask=(column < num_inputs)[None, :], other=0.0)
            up = tl.dot(more.to(columns.dtype), columns, up, input_precision="ieee")
    if weights.scales is not None:
        scale = weights.scales + mine * num_rows + weight_row
        acc *= tl.load(scale)[:, None]
        if SWIGLU:
            up *= tl.load(scale + num_outputs)[:, None]
    if adapters is not None:
        acc, up = add_adapters(
            acc, up, adapters, mine, place, is_pair, pair // COUNTS.per_token, weight_row, num_outputs, SWIGLU, RULE
        )
    store_pairs(
        acc, up, weights.bias, mine * num_rows + weight_row, place, pair, is_pair, out, pairs.weights, output,
        num_outputs, SWIGLU, LIMIT, ALPHA, IS_EVEN,
    )  # fmt: skip


@triton.jit
def _add_pairs(
    made, total, HIDDEN: tl.constexpr, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """Program (token, block of numbers): add up its pairs, from the best expert on, and add that to the stream."""
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    dim = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = dim < HIDDEN
    acc = tl.zeros([BLOCK], tl.float32)
    for slot in tl.static_range(PER_TOKEN):
        acc += tl.load(made + (token * PER_TOKEN + slot) * HIDDEN + dim, mask=mask, other=0.0).to(tl.float32)
    before = tl.load(total + token * HIDDEN + dim, mask=mask, other=0.0)
    tl.store(total + token * HIDDEN + dim, (before.to(tl.float32) + acc).to(before.dtype), mask=mask)


@triton.jit
def _single_sum(
    activated, weights, experts, shares, total, num_outputs,
    SIZE: tl.constexpr, PER_TOKEN: tl.constexpr, OUTPUTS: tl.constexpr, TILE_K: tl.constexpr,
    CAN_PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: a block of outputs of one token, which all its experts add to."""
    out = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    if CAN_PREFETCH:  # the kernel before let this one begin when the experts were known
        line = tl.minimum(tl.arange(0, TILE_K // 64) * 64, SIZE - 1)
        for slot in tl.static_range(PER_TOKEN):
            expert = tl.load(experts + slot).to(tl.int64)
            prefetch(weights.numbers + expert * num_outputs * SIZE + out[:, None] * SIZE + line[None, :])
    wait_for_inputs(PDL)
    acc = tl.zeros([OUTPUTS, TILE_K], tl.float32)
    for slot in tl.static_range(PER_TOKEN):
        expert = tl.load(experts + slot).to(tl.int64)
        share = tl.load(shares + slot)
        row = weights.numbers + expert * num_outputs * SIZE + out[:, None] * SIZE
        scale = 1.0 if weights.scales is None else tl.load(weights.scales + expert * num_outputs + out)[:, None]
        for start in tl.static_range(0, SIZE, TILE_K):
            column = start + tl.arange(0, TILE_K)
            mask = column < SIZE
            values = tl.load(activated + slot * SIZE + column, mask=mask, other=0.0).to(tl.float32)
            products = tl.load(row + column[None, :], mask=mask[None, :], other=0.0).to(tl.float32) * scale
            acc += products * (values * share)[None, :]
    before = tl.load(total + out)
    after = before.to(tl.float32) + tl.sum(acc, 1)
    if weights.bias is not None:
        for slot in tl.static_range(PER_TOKEN):
            expert = tl.load(experts + slot).to(tl.int64)
            after += tl.load(weights.bias + expert * num_outputs + out).to(tl.float32) * tl.load(shares + slot)
    tl.store(total + out, after.to(before.dtype))
