"""Matrix products, y = x Wᵀ: kernels of our own for few rows, up to 64 or 128, the vendor's library for more.

Few rows with big weights are bound by reading the weights. The vendor's kernels leave a fifth of the bandwidth unused
there; these leave a tenth. Which one runs, and how it is cut up, is a rule of the shape alone, found by measuring (see
docs/decisions/0006): nothing to tune at start, and the same rows always take the same path.

Weights may be 8-bit floats (E4M3, Micikevicius et al. 2022, arXiv:2209.05433) with a scale for each output: the
vendor's library multiplies them with activations made 8 bits wide too, and the kernel for a single row widens them to
the activations' format. Or they are codes of 8 or 4 bits with a scale for each output and group of inputs: our kernels
widen these, too, for more rows, and for still more they are written out in the activations' format.

What stands before and behind a product is done in passing where that is possible: a single row is normalised as it is
read, our kernels and the library add to the residual stream themselves, norms and activations round to 8 bits.

Where results must not depend on the batch (He et al. 2025, "Defeating Nondeterminism in LLM Inference"), our kernels
take every product. There the weight's shape alone says how each sum is cut; the number of rows says only how much of it
one program does.
"""

from dataclasses import dataclass

import torch
import triton

from llm.config import Activation
from llm.core.partition import Exchange
from llm.core.weight_groups import WeightGroups
from llm.kernels.activation import activate_gated
from llm.kernels.few_rows import single_row_product, tile_product
from llm.kernels.group_hopper import hopper_product, runs_on_hopper
from llm.kernels.group_numbers import written_out
from llm.kernels.group_row import single_row_of_groups
from llm.kernels.launch import launch_options, most_stages
from llm.kernels.norm import Norm, ResidualStream, rms_norm
from llm.kernels.operands import NO_GROUPS, GroupOperand, WeightOperand
from llm.kernels.quantization import EightBitRows, ScaledProduct, eight_bit_product, quantize_rows, scaled_product
from llm.kernels.tiles import (
    MAX_FEW_ROWS,
    MAX_GROUP_ROWS,
    MAX_HOPPER_ROWS,
    MAX_SOME_ROWS,
    MAX_SUMMED_ROWS,
    OUTPUTS,
    TILE_K,
    HopperTile,
    few_tile,
    fits_wide_tiles,
    fixed_tile,
    group_tile,
    hopper_tile,
    scratch_sizes,
)

_LEAST_INPUTS = 16
_LARGE_WEIGHT = 1 << 23
"""Numbers of a weight from which on a tile has all rows, 32 at least, and the library takes more than MAX_FEW_ROWS."""
_SINGLE_OUTPUTS = 4
_GROUP_CUT, _LONG_GROUP_CUT, _GATED_GROUP_CUT = (8, 256), (4, 128), (4, 64)
"""Of a program of one row of weights in groups: half of its rows of the weight, and pieces of 8 bytes of each that it
reads at once. The second one is for more than _MANY_OUTPUTS."""
_MANY_OUTPUTS = 4096
_ROW_BLOCKS_IN_TURN = 4
"""So many blocks of rows come one after another for the same weights, which the second-level cache then still has."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Of a product y = x Wᵀ + bias.

    Attributes:
        weight: (out, in), contiguous; of experts (experts, out, in), and what follows has their dimension in front too.
        bias: (out,), or None for none.
        scales: (out,) float32, what the rows of 8-bit weights are multiplied by; None for other weights. With them `in`
            and `out` are multiples of 16.
        groups: what the codes in `weight` mean; None for other weights.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    groups: WeightGroups | None = None

    def __len__(self) -> int:
        return len(self.weight)

    @property
    def operand(self) -> WeightOperand:
        """The weight as kernels take it."""
        return WeightOperand(self.weight, self.scales, self.bias)

    @property
    def group_operand(self) -> GroupOperand:
        """What its codes mean, as kernels take it."""
        groups = self.groups
        return NO_GROUPS if groups is None else GroupOperand(groups.scales, groups.zeros, groups.order)

    @property
    def num_inputs(self) -> int:
        """Inputs of the product."""
        return self.weight.shape[1] * (2 if self.weight.dtype == torch.uint8 else 1)

    @property
    def is_large(self) -> bool:
        """Whether reading it is long beside all that stands around a product."""
        return len(self) * self.num_inputs >= _LARGE_WEIGHT

    @property
    def has_single_row(self) -> bool:
        """Whether there is a kernel of its own for a single row."""
        return self.groups is None or self.weight.dtype == torch.uint8

    def written_out(self, dtype: torch.dtype) -> "Weights":
        """The same as plain numbers of `dtype`, in memory of their own; itself where there are no groups."""
        if self.groups is None:
            return self
        return Weights(written_out(self.weight, self.groups, dtype), self.bias)

    @property
    def has_tiles(self) -> bool:
        """Whether our kernels take weights in groups: tensor cores take 16 inputs at once."""
        assert self.groups is not None, "asked of those alone"
        parts = 4 if self.weight.dtype == torch.uint8 else 1
        return self.groups.is_mxfp4 or self.groups.span // parts >= _LEAST_INPUTS

    def bytes_of(self, num_inputs: int) -> int:
        """Bytes of the codes of so many inputs."""
        return num_inputs // 2 if self.weight.dtype == torch.uint8 else num_inputs


def add_parts(stream: ResidualStream, part: torch.Tensor, exchange: Exchange, norm: Norm | None = None) -> None:
    """Add the sum of all ranks' parts, (rows, hidden_size), or its norm, to the stream, on which nothing is pending."""
    if norm is None and exchange.adds(part):
        exchange.add_all_reduce(part, stream.total)
    else:
        stream.pending, stream.pending_norm = exchange.all_reduce(part), norm


class Linear:
    """Products on one device, with their scratch memory. Not thread-safe, like the stream it runs on.

    Args:
        device: of all tensors.
        deterministic: a row's result, bit by bit, depends on nothing but that row and the weights.
        exchange: with the ranks whose products are to be added to the stream beside this one's; None where there are no
            others.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        deterministic: bool = False,
        exchange: Exchange | None = None,
    ) -> None:
        self._device = device
        self._exchange = exchange
        self._deterministic = deterministic
        num_partial, num_arrivals = scratch_sizes(deterministic)
        self._partial = torch.empty(num_partial, device=device)
        self._arrivals = torch.zeros(num_arrivals, dtype=torch.int32, device=device)

    @property
    def scratch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory for sums that programs of a launch share: parts of sums, and counters of programs that are done."""
        return self._partial, self._arrivals

    def __call__(self, x: torch.Tensor | EightBitRows, weights: Weights) -> torch.Tensor | ScaledProduct:
        """x (rows, in), contiguous, gives (rows, out): a `ScaledProduct` where the library multiplies 8-bit weights."""
        x = self._narrowed(x, weights)
        if isinstance(x, EightBitRows):
            assert weights.scales is not None, "rows are made narrow for 8-bit weights"
            return eight_bit_product(x, weights.weight, weights.scales, weights.bias)
        if self._is_own(x, weights):
            return self._own(x, weights, x.new_empty(len(x), len(weights)))
        if weights.groups is not None:
            return self(x, weights.written_out(x.dtype))
        return torch.nn.functional.linear(x, weights.weight, weights.bias)

    def of_norm(self, stream: ResidualStream, norm: Norm, weights: Weights) -> torch.Tensor | ScaledProduct:
        """The product of the stream's norm."""
        if self._is_single(stream, weights, len(weights)):
            return self._single(stream.total, weights, stream.total.new_empty(1, len(weights)), norm=norm)
        return self(self._normed(stream, norm, weights), weights)

    def add(
        self, stream: ResidualStream, x: torch.Tensor | EightBitRows, weights: Weights, norm: Norm | None = None
    ) -> None:
        """Add the product of x, (rows, in), or its norm, to the stream, on which nothing may be pending."""
        assert stream.pending is None, "a norm comes between two additions"
        total = stream.total
        if self._exchange is not None:
            add_parts(stream, self.part(x, weights), self._exchange, norm)
        elif norm is not None:
            stream.pending, stream.pending_norm = self(x, weights), norm
        elif isinstance(x, EightBitRows) or self._is_narrow(x, weights):
            product = self(x, weights)
            assert isinstance(product, ScaledProduct), "8-bit rows give one"
            stream.pending = product
        elif self._is_own(x, weights):
            self._own(x, weights, total, adds=True)
        elif weights.groups is not None:
            self.add(stream, x, weights.written_out(x.dtype))
        else:
            total.addmm_(x, weights.weight.t())
            if weights.bias is not None:
                total += weights.bias

    def normed(self, stream: ResidualStream, norm: Norm) -> torch.Tensor:
        """The stream's norm as plain numbers, (rows, in). Nothing is pending on the stream behind this."""
        output = torch.empty_like(stream.total)
        rms_norm(stream, norm, output)
        return output

    def add_part(self, stream: ResidualStream, part: torch.Tensor, norm: Norm | None = None) -> None:
        """Add this rank's part of a product, (rows, hidden_size), or the product's norm, as `add` does."""
        assert stream.pending is None, "a norm comes between two additions"
        if self._exchange is not None:
            add_parts(stream, part, self._exchange, norm)
        else:
            stream.pending, stream.pending_norm = part, norm

    def part(self, x: torch.Tensor | EightBitRows, weights: Weights) -> torch.Tensor:
        """The product of x, (rows, in), as plain numbers."""
        x = self._narrowed(x, weights)
        if isinstance(x, EightBitRows):
            assert weights.scales is not None, "rows are made narrow for 8-bit weights"
            return scaled_product(x, weights.weight, weights.scales, weights.bias)
        product = self(x, weights)
        assert isinstance(product, torch.Tensor), "nothing else is left to be scaled"
        return product

    def mlp(
        self,
        stream: ResidualStream,
        norm: Norm,
        gate_up: Weights,
        down: Weights,
        activation: Activation = Activation.SILU,
        norm_behind: Norm | None = None,
    ) -> None:
        """Add (activation(x Wgᵀ) * (x Wuᵀ)) Wdᵀ, or its norm, to the stream, where x is the stream's norm.

        Args:
            gate_up: Wg's rows, then Wu's.
        """
        self.add(stream, self.gated(stream, norm, gate_up, down, activation), down, norm_behind)

    def gated(
        self, stream: ResidualStream, norm: Norm, gate_up: Weights, down: Weights, activation: Activation
    ) -> torch.Tensor | EightBitRows:
        """What `mlp` multiplies with `down`, (rows, size). Nothing is pending on the stream behind this."""
        total, size = stream.total, len(gate_up) // 2
        if gate_up.bias is None and self._is_single(stream, gate_up, size):
            return self._single(total, gate_up, total.new_empty(1, size), norm=norm, gated_by=activation)
        x = self._normed(stream, norm, gate_up)
        if isinstance(x, torch.Tensor) and gate_up.bias is None and self._is_few(x, gate_up, size, swiglu=True):
            few = self._single if len(x) == 1 and gate_up.has_single_row else self._tiled
            return few(x, gate_up, total.new_empty(len(total), size), gated_by=activation)
        output = self._new_rows(total, size, down)
        activate_gated(self(x, gate_up), output, activation)
        return output

    def _is_few(self, x: torch.Tensor, weights: Weights, num_outputs: int, *, swiglu: bool = False) -> bool:
        """Whether our kernels take this product: they have no masks for odd shapes, and no tensor cores for float32."""
        takes_some = not weights.is_large or (swiglu and fits_wide_tiles(num_outputs))
        most_rows = MAX_SOME_ROWS if takes_some else MAX_FEW_ROWS
        if weights.groups is not None:
            most_rows = MAX_GROUP_ROWS if weights.weight.dtype == torch.uint8 else MAX_FEW_ROWS
            if self._hopper_tile(len(x), weights, num_outputs, swiglu=swiglu) is not None:
                most_rows = MAX_HOPPER_ROWS
        elif weights.scales is not None:
            most_rows = 1  # the library reads 8-bit weights faster than our tiles widen them
        return (
            not self._deterministic
            and len(x) <= most_rows
            and x.dtype.itemsize == 2
            and num_outputs % OUTPUTS == 0
            and (weights.num_inputs % TILE_K == 0 if weights.groups is None else weights.has_tiles)
        )

    def _is_single(self, stream: ResidualStream, weights: Weights, num_outputs: int) -> bool:
        total = stream.total
        can_be = weights.has_single_row and len(total) == 1 and stream.pending is None
        return can_be and self._is_few(total, weights, num_outputs)

    def _is_own(self, x: torch.Tensor, weights: Weights) -> bool:
        """Whether our kernels take the whole product."""
        if self._deterministic:
            return weights.groups is None or weights.has_tiles
        return self._is_few(x, weights, len(weights))

    def _is_narrow(self, x: torch.Tensor, weights: Weights) -> bool:
        """Whether the library multiplies 8-bit weights with these rows made narrow too."""
        return weights.scales is not None and not self._is_own(x, weights)

    def _narrowed(self, x: torch.Tensor | EightBitRows, weights: Weights) -> torch.Tensor | EightBitRows:
        """The rows as the product with `weights` takes them."""
        return quantize_rows(x) if isinstance(x, torch.Tensor) and self._is_narrow(x, weights) else x

    def _new_rows(self, like: torch.Tensor, num_columns: int, weights: Weights) -> torch.Tensor | EightBitRows:
        """Room for as many rows as `like` has, of the kind that the product with `weights` takes."""
        if self._is_narrow(like, weights):
            return EightBitRows.allocate(len(like), num_columns, like.device, like.dtype)
        return like.new_empty(len(like), num_columns)

    def _normed(self, stream: ResidualStream, norm: Norm, weights: Weights) -> torch.Tensor | EightBitRows:
        output = self._new_rows(stream.total, stream.total.shape[1], weights)
        rms_norm(stream, norm, output)
        return output

    def _own(self, x: torch.Tensor, weights: Weights, output: torch.Tensor, *, adds: bool = False) -> torch.Tensor:
        """The product by our kernels, written or added to `output`, (rows, out)."""
        if len(x) == 1 and weights.has_single_row and not self._deterministic:
            return self._single(x, weights, output, adds=adds)
        return self._tiled(x, weights, output, adds=adds)

    def _single(
        self, x: torch.Tensor, weights: Weights, output: torch.Tensor,
        *, norm: Norm | None = None, gated_by: Activation | None = None, adds: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        num_outputs, num_inputs = output.shape[1], x.shape[1]
        if weights.groups is not None:
            return self._single_of_groups(x, weights, weights.groups, output, norm, gated_by, adds=adds)
        single_row_product[(num_outputs // _SINGLE_OUTPUTS,)](
            x, None if norm is None else norm.weight, weights.operand, output, None, num_outputs, num_inputs,
            0.0 if norm is None else norm.eps,
            OUTPUTS=_SINGLE_OUTPUTS, TILE_K=min(1024, num_inputs & -num_inputs), IS_EVEN=True,
            SWIGLU=gated_by is not None, GELU=gated_by is Activation.GELU_TANH,
            OFFSET=None if norm is None else norm.offset, ADDS=adds, LIMIT=None, ALPHA=None,
            CAN_PREFETCH=self._device.type == "cuda" and num_inputs % 64 == 0, num_warps=4,
            **launch_options(self._device),
        )  # fmt: skip
        return output

    def _single_of_groups(
        self, x: torch.Tensor, weights: Weights, groups: WeightGroups, output: torch.Tensor, norm: Norm | None,
        gated_by: Activation | None, *, adds: bool,
    ) -> torch.Tensor:  # fmt: skip
        num_outputs, num_inputs = output.shape[1], x.shape[1]
        cut = _GROUP_CUT if num_outputs <= _MANY_OUTPUTS else _LONG_GROUP_CUT
        outputs, most_pieces = cut if gated_by is None else _GATED_GROUP_CUT
        pieces = min(most_pieces, triton.next_power_of_2(num_inputs // 16))
        single_row_of_groups[(num_outputs // (outputs if gated_by is not None else 2 * outputs),)](
            x, None if norm is None else norm.weight, weights.operand, weights.group_operand, output, num_outputs,
            num_inputs, 0.0 if norm is None else norm.eps,
            OUTPUTS=outputs, PIECES=pieces, SPAN=groups.span, GROUP=groups.size, SWIGLU=gated_by is not None,
            GELU=gated_by is Activation.GELU_TANH, OFFSET=None if norm is None else norm.offset, ADDS=adds,
            IN_ASSEMBLY=self._device.type == "cuda", num_warps=max(pieces // 32, 1), **launch_options(self._device),
        )  # fmt: skip
        return output

    def _hopper_tile(self, num_rows: int, weights: Weights, num_outputs: int, *, swiglu: bool) -> HopperTile | None:
        """How the kernel for weights in groups on Hopper takes this product; None where it does not."""
        if weights.groups is None or self._deterministic or not runs_on_hopper(weights.groups, self._device):
            return None
        return hopper_tile(num_rows, num_outputs, weights.num_inputs, swiglu)

    def _tiled(
        self, x: torch.Tensor, weights: Weights, output: torch.Tensor,
        *, gated_by: Activation | None = None, adds: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        """The product by tiles on tensor cores."""
        swiglu = gated_by is not None
        (num_rows, num_inputs), num_outputs = x.shape, output.shape[1]
        groups, operand = weights.groups, weights.group_operand
        if operand.order is not None and num_rows > MAX_FEW_ROWS:
            # Ordered once: tiles read columns in order much faster, and each column is read by many programs.
            x, operand = x.index_select(1, operand.order), operand._replace(order=None)
        hopper = self._hopper_tile(num_rows, weights, num_outputs, swiglu=swiglu)
        if groups is not None and hopper is not None and operand.order is None:
            return hopper_product(x, weights.operand, groups, output, self.scratch, hopper, gated_by, adds=adds)
        if self._deterministic:
            k = None if groups is None else groups.span
            tile = fixed_tile(num_rows, num_outputs, num_inputs, x.dtype.itemsize, k)
        elif groups is not None:
            tile = group_tile(num_rows, num_outputs, num_inputs, groups.span, swiglu)
        else:
            tile = few_tile(num_rows, num_outputs, num_inputs, weights.is_large, swiglu)
        num_blocks, num_row_blocks = triton.cdiv(num_outputs, tile.outputs), triton.cdiv(num_rows, tile.rows)
        is_even = num_outputs % tile.outputs == 0 and num_inputs % tile.k == 0
        in_turn = min(num_row_blocks, _ROW_BLOCKS_IN_TURN)
        weight_rows = (2 if swiglu else 1) * tile.outputs
        bytes_a_stage = (weight_rows + tile.rows) * tile.k * x.dtype.itemsize
        if groups is not None:  # codes are widened on their way to the product
            bytes_a_stage = weight_rows * weights.bytes_of(tile.k) + tile.rows * tile.k * x.dtype.itemsize
        num_programs = triton.cdiv(num_row_blocks, in_turn) * (tile.num_parts if tile.is_shared else 1)
        tile_product[(in_turn, num_blocks, num_programs)](
            x, weights.operand, operand, output, self._partial, self._arrivals, num_rows, num_outputs,
            num_inputs, triton.cdiv(num_inputs, tile.k) // tile.num_parts * tile.k, TILE=tile,
            GROUP=0 if groups is None else groups.size, SWIGLU=swiglu, GELU=gated_by is Activation.GELU_TANH,
            ADDS=adds, IS_EVEN=is_even,
            IN_UNITS=groups is not None and tile.rows > MAX_SUMMED_ROWS and not self._deterministic,
            CAN_PREFETCH=is_even and self._device.type == "cuda",
            num_warps=tile.num_warps, num_stages=min(tile.num_stages, most_stages(self._device, bytes_a_stage)),
            **launch_options(self._device),
        )  # fmt: skip
        return output
