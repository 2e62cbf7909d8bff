"""The operations that models are written in, and their implementation in plain PyTorch.

A family's layers describe what they compute once, using only these operations. There are two implementations.
`TorchOperations`, here, is the reference: it runs on any device and can be trained through. `KernelOperations`
(`llm.models.kernel_operations`) runs an engine's packed steps with this project's own kernels.
"""

from typing import Protocol, TypeVar

import torch
from torch import nn

from llm.attention.interface import AttentionContext
from llm.attention.rope import RotaryEmbedding, apply_rotary
from llm.attention.spec import AttentionSpec
from llm.config import Activation
from llm.core.partition import WHOLE, Exchange, Partition
from llm.core.recurrent_state import DeltaSpec
from llm.models.adapters import TokenAdapters, product
from llm.models.delta import DeltaMixer
from llm.models.experts import Experts
from llm.models.latent import LatentHeads
from llm.models.layers import RMSNorm, activate

RowsT = TypeVar("RowsT")
"""Result of a product for the tokens of a pass: a tensor, or numbers that have yet to be scaled."""


class Operations(Protocol[RowsT]):
    """One forward pass over some tokens. It holds their residual stream.

    A model calls `embed` first, then the layers' operations, then `norm`.
    """

    def embed(self, table: nn.Embedding, scale: float | None = None) -> None:
        """Begin the residual stream with the tokens' embeddings.

        Args:
            scale: factor on the embeddings, rounded to their format; None for no factor.
        """
        ...

    def product_of_norm(self, norm: RMSNorm, projection: nn.Linear) -> RowsT:
        """Project the norm of the residual stream."""
        ...

    def attend(
        self,
        layer: int,
        spec: AttentionSpec,
        qkv: RowsT,
        qk_norms: tuple[RMSNorm, RMSNorm] | None = None,
        sinks: torch.Tensor | None = None,
    ) -> RowsT:
        """Store the tokens' keys and values, and return the outputs of attention, (tokens, `spec.output_size`).

        After the last layer's attention, only the requested tokens remain, both in the output and in the residual
        stream.

        Args:
            layer: index of the layer, from 0.
            qkv: queries, keys and values, (tokens, `spec.qkv_size`).
            qk_norms: norms of each head's queries and keys, applied before RoPE; None for none.
            sinks: (num_heads,), each head's score that belongs to no token; needed if `spec.has_sinks`.
        """
        ...

    def attend_latents(self, layer: int, spec: AttentionSpec, projected: RowsT, heads: LatentHeads) -> RowsT:
        """Store the tokens' latents, and return the outputs of attention, (tokens, num_heads value_dim).

        After the last layer, only the requested tokens remain, as in `attend`.

        Args:
            layer: index of the layer, from 0.
            spec: shape of the attention to latents.
            projected: queries or their latent, then the latent, then the rotated part of the key, (tokens, sum of
                `heads.sizes`).
            heads: the layer's modules for latent attention.
        """
        ...

    def mix(self, layer: int, spec: DeltaSpec, mixed: RowsT, decay: RowsT, mixer: DeltaMixer) -> RowsT:
        """Continue a gated delta rule from the previous tokens; return its gated outputs, (tokens, `spec.output_size`).

        After the last layer, only the requested tokens remain, as in `attend`.

        Args:
            layer: index of the layer, from 0.
            mixed: queries, keys, values and output gates, (tokens, `spec.conv_size + spec.output_size`).
            decay: inputs of each head's share, then of each head's decay, (tokens, 2 `spec.num_value_heads` or more).
                Any further numbers are ignored.
            mixer: the layer's other modules.
        """
        ...

    def add_product(self, rows: RowsT, projection: nn.Linear, norm: RMSNorm | None = None) -> None:
        """Add a projection of `rows`, or its norm, to the residual stream."""
        ...

    def add_gated_mlp(
        self,
        norm: RMSNorm,
        gate_up: nn.Linear,
        down: nn.Linear,
        activation: Activation = Activation.SILU,
        norm_behind: RMSNorm | None = None,
    ) -> None:
        """Add a gated feed-forward (Shazeer 2020, arXiv:2002.05202) of the stream's norm to the stream.

        Args:
            gate_up: the rows of the gate, then those of what it gates.
            activation: activation of the gate.
            norm_behind: normalizes the result before it is added; None to add it as it is.
        """
        ...

    def add_experts(self, norm: RMSNorm, experts: Experts) -> None:
        """Add the experts' outputs for the norm of the stream to the stream."""
        ...

    def norm(self, norm: RMSNorm) -> torch.Tensor:
        """The norm of the residual stream, (tokens, hidden_size)."""
        ...


class TorchOperations:
    """`Operations` in plain PyTorch, on tensors with any leading dimensions.

    Args:
        token_ids: (…) int64.
        positions: int64, broadcast to `token_ids`.
        context: stores and attends to keys and values.
        kept: (kept,) indices of the requested tokens among (tokens,); None for all.
        last_layer: index of the layer after whose attention the other tokens are dropped; needed with `kept`.
        partition: which part of the model this is.
        exchange: communication with the ranks that hold the rest of the model; None if this rank holds all of it.
        adapters: adapters of the tokens, which then have one dimension; None if no token has one.
    """

    def __init__(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        context: AttentionContext,
        *,
        kept: torch.Tensor | None = None,
        last_layer: int = 0,
        partition: Partition = WHOLE,
        exchange: Exchange | None = None,
        adapters: TokenAdapters | None = None,
    ) -> None:
        self._token_ids = token_ids
        self._positions = positions
        self._context = context
        self._kept = kept
        self._last_layer = last_layer
        self._partition = partition
        self._exchange = exchange
        self._adapters = adapters
        self._angles: dict[RotaryEmbedding, tuple[torch.Tensor, torch.Tensor]] = {}
        self._stream: torch.Tensor

    def embed(self, table: nn.Embedding, scale: float | None = None) -> None:
        """See `Operations.embed`."""
        self._stream = self._embedded(table)
        if scale is not None:
            self._stream = self._stream * torch.tensor(scale, dtype=self._stream.dtype, device=self._stream.device)

    def _embedded(self, table: nn.Embedding) -> torch.Tensor:
        """The tokens' embeddings, even if this rank holds only some rows of the table."""
        if self._exchange is None:
            found: torch.Tensor = table(self._token_ids)
            return found
        num_rows = table.num_embeddings
        places = self._token_ids - self._partition.rank * num_rows
        is_here = (places >= 0) & (places < num_rows)
        found = table(places.clamp(0, num_rows - 1))
        return self._exchange.all_reduce(found.where(is_here.unsqueeze(-1), 0.0))

    def _summed(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' parts of a product."""
        return part if self._exchange is None else self._exchange.all_reduce(part.contiguous())

    def product_of_norm(self, norm: RMSNorm, projection: nn.Linear) -> torch.Tensor:
        """See `Operations.product_of_norm`."""
        return product(projection, norm(self._stream), self._adapters)

    def attend(
        self,
        layer: int,
        spec: AttentionSpec,
        qkv: torch.Tensor,
        qk_norms: tuple[RMSNorm, RMSNorm] | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Operations.attend`."""
        heads = qkv.view(*qkv.shape[:-1], -1, spec.head_dim)
        num_query_heads = spec.num_query_parts * spec.num_heads
        query, key, value = heads.split_with_sizes((num_query_heads, spec.num_kv_heads, spec.num_kv_heads), dim=-2)
        gate = None
        if spec.has_gate:
            query, gate = query[..., 0::2, :], query[..., 1::2, :]
        if qk_norms is not None:
            query, key = qk_norms[0](query), qk_norms[1](key)
        cos, sin = self._angles_of(spec.rope)
        query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        query_scales = spec.rope.query_scales(query.device)
        if query_scales is not None:
            query = query * query_scales[self._positions, None, None].to(query.dtype)
        output = self._context.attend(layer, spec, query, key, value, sinks)
        if gate is not None:
            output = output * torch.sigmoid(gate)
        return self._asked_for(layer, output.flatten(-2))

    def attend_latents(
        self, layer: int, spec: AttentionSpec, projected: torch.Tensor, heads: LatentHeads
    ) -> torch.Tensor:
        """See `Operations.attend_latents`."""
        query, key = heads.queries(projected, *self._angles_of(spec.rope), self._adapters)
        found = self._context.attend(layer, spec, query, key, key[..., : spec.value_size])
        return self._asked_for(layer, heads.values(found, self._adapters).flatten(-2))

    def _angles_of(self, rope: RotaryEmbedding) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the tokens' positions, computed once per pass."""
        if rope not in self._angles:
            self._angles[rope] = rope.angles(self._positions)
        return self._angles[rope]

    def mix(
        self, layer: int, spec: DeltaSpec, mixed: torch.Tensor, decay: torch.Tensor, mixer: DeltaMixer
    ) -> torch.Tensor:
        """See `Operations.mix`."""
        inputs, gate = mixed.split_with_sizes((spec.conv_size, spec.output_size), dim=-1)
        share, rate = decay[..., : 2 * spec.num_value_heads].chunk(2, dim=-1)
        output = self._context.mix(
            layer, spec, inputs, mixer.conv1d.weight, mixer.log_decay(rate), share.float().sigmoid()
        )
        return self._asked_for(layer, mixer.gated_norm(output, gate.view_as(output)).flatten(-2))

    def _asked_for(self, layer: int, output: torch.Tensor) -> torch.Tensor:
        """A layer's output; after the last layer, only that of the requested tokens, and the stream likewise."""
        if layer != self._last_layer or self._kept is None:
            return output
        self._stream = self._stream[self._kept]
        self._adapters = None if self._adapters is None else self._adapters.kept(self._kept)
        return output[self._kept]

    def add_product(self, rows: torch.Tensor, projection: nn.Linear, norm: RMSNorm | None = None) -> None:
        """See `Operations.add_product`."""
        added = self._summed(product(projection, rows, self._adapters))
        self._stream = self._stream + (added if norm is None else norm(added))

    def add_gated_mlp(
        self,
        norm: RMSNorm,
        gate_up: nn.Linear,
        down: nn.Linear,
        activation: Activation = Activation.SILU,
        norm_behind: RMSNorm | None = None,
    ) -> None:
        """See `Operations.add_gated_mlp`."""
        gate, up = product(gate_up, norm(self._stream), self._adapters).chunk(2, dim=-1)
        self.add_product(activate(gate, activation) * up, down, norm_behind)

    def add_experts(self, norm: RMSNorm, experts: Experts) -> None:
        """See `Operations.add_experts`."""
        self._stream = self._stream + self._summed(experts(norm(self._stream), self._adapters))

    def norm(self, norm: RMSNorm) -> torch.Tensor:
        """See `Operations.norm`."""
        normed: torch.Tensor = norm(self._stream)
        return normed
