"""The operations that models are stated in, and what they are in plain PyTorch.

A family's layers say what they compute by these operations and by nothing else, once. Two sets of them exist:
`TorchOperations` here, which is the reference, runs on any device and can be trained through; and `KernelOperations`
(`llm.models.kernel_operations`), which runs an engine's packed steps by our own kernels.
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
from llm.models.delta import DeltaMixer
from llm.models.experts import Experts
from llm.models.latent import LatentHeads
from llm.models.layers import RMSNorm, activate

RowsT = TypeVar("RowsT")
"""What a product gives for the tokens of a pass: a tensor, or numbers that are still to be scaled."""


class Operations(Protocol[RowsT]):
    """One forward pass over some tokens, whose residual stream it holds.

    Called in a model's order: `embed`, then the layers' operations, then `norm`.
    """

    def embed(self, table: nn.Embedding, scale: float | None = None) -> None:
        """Begin the residual stream with the tokens' embeddings.

        Args:
            scale: they are multiplied by this number, rounded to their format; None for as they are.
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
        """Store the tokens' keys and values, and give their attention's outputs, (tokens, `spec.output_size`).

        Behind the last layer's attention, tokens that nobody asked for end: what is given, and the residual stream, is
        then of the others alone.

        Args:
            layer: index of the layer, from 0.
            qkv: queries, keys and values, (tokens, `spec.qkv_size`).
            qk_norms: norms of each head's queries and of its keys, before they turn; None for none.
            sinks: (num_heads,), each head's score for nothing; needed where `spec.has_sinks`.
        """
        ...

    def attend_latents(self, layer: int, spec: AttentionSpec, projected: RowsT, heads: LatentHeads) -> RowsT:
        """Store the tokens' latents, and give their attention's outputs, (tokens, num_heads value_dim).

        Behind the last layer, tokens end as in `attend`.

        Args:
            layer: index of the layer, from 0.
            spec: of the attention to latents.
            projected: queries or their latent, the latent, what turns of the key, (tokens, sum of `heads.sizes`).
            heads: the layer's.
        """
        ...

    def mix(self, layer: int, spec: DeltaSpec, mixed: RowsT, decay: RowsT, mixer: DeltaMixer) -> RowsT:
        """Run a gated delta rule on from the tokens before, and give its gated outputs, (tokens, `spec.output_size`).

        Behind the last layer, tokens end as in `attend`.

        Args:
            layer: index of the layer, from 0.
            mixed: queries, keys, values and output gates, (tokens, `spec.conv_size + spec.output_size`).
            decay: what decides each head's share and, behind these, its decay, (tokens, 2 `spec.num_value_heads` or
                more); more means nothing.
            mixer: the layer's.
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
            gate_up: the gate's rows, then those of what is gated.
            activation: of the gate.
            norm_behind: what is added is normalised by it before; None for not.
        """
        ...

    def add_experts(self, norm: RMSNorm, experts: Experts) -> None:
        """Add what its experts make of each token's norm to the stream."""
        ...

    def norm(self, norm: RMSNorm) -> torch.Tensor:
        """The norm of the residual stream, (tokens, hidden_size)."""
        ...


class TorchOperations:
    """`Operations` in plain PyTorch, on tensors with any leading dimensions.

    Args:
        token_ids: (…) int64.
        positions: int64, broadcast to `token_ids`.
        context: where keys and values are kept and found.
        kept: (kept,) indices of the tokens that are asked for, of (tokens,) in all; None for all.
        last_layer: behind whose attention the others end; needed with `kept`.
        partition: of the model.
        exchange: with the ranks that hold the rest of the model; None where this one holds all of it.
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
    ) -> None:
        self._token_ids = token_ids
        self._positions = positions
        self._context = context
        self._kept = kept
        self._last_layer = last_layer
        self._partition = partition
        self._exchange = exchange
        self._angles: dict[RotaryEmbedding, tuple[torch.Tensor, torch.Tensor]] = {}
        self._stream: torch.Tensor

    def embed(self, table: nn.Embedding, scale: float | None = None) -> None:
        """See `Operations.embed`."""
        self._stream = self._embedded(table)
        if scale is not None:
            self._stream = self._stream * torch.tensor(scale, dtype=self._stream.dtype, device=self._stream.device)

    def _embedded(self, table: nn.Embedding) -> torch.Tensor:
        """The tokens' embeddings, of which this rank may hold some."""
        if self._exchange is None:
            found: torch.Tensor = table(self._token_ids)
            return found
        num_rows = table.num_embeddings
        places = self._token_ids - self._partition.rank * num_rows
        is_here = (places >= 0) & (places < num_rows)
        found = table(places.clamp(0, num_rows - 1))
        return self._exchange.all_reduce(found.where(is_here.unsqueeze(-1), 0.0))

    def _summed(self, product: torch.Tensor) -> torch.Tensor:
        """A product of which every rank has made a part: the sum of all parts."""
        return product if self._exchange is None else self._exchange.all_reduce(product.contiguous())

    def product_of_norm(self, norm: RMSNorm, projection: nn.Linear) -> torch.Tensor:
        """See `Operations.product_of_norm`."""
        product: torch.Tensor = projection(norm(self._stream))
        return product

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
        query, key = heads.queries(projected, *self._angles_of(spec.rope))
        found = self._context.attend(layer, spec, query, key, key[..., : spec.value_size])
        return self._asked_for(layer, heads.values(found).flatten(-2))

    def _angles_of(self, rope: RotaryEmbedding) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the tokens' positions, made once a pass."""
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
        """What a layer gives for each token; behind the last layer of those that are asked for, as the stream is."""
        if layer != self._last_layer or self._kept is None:
            return output
        self._stream = self._stream[self._kept]
        return output[self._kept]

    def add_product(self, rows: torch.Tensor, projection: nn.Linear, norm: RMSNorm | None = None) -> None:
        """See `Operations.add_product`."""
        product = self._summed(projection(rows))
        self._stream = self._stream + (product if norm is None else norm(product))

    def add_gated_mlp(
        self,
        norm: RMSNorm,
        gate_up: nn.Linear,
        down: nn.Linear,
        activation: Activation = Activation.SILU,
        norm_behind: RMSNorm | None = None,
    ) -> None:
        """See `Operations.add_gated_mlp`."""
        gate, up = gate_up(norm(self._stream)).chunk(2, dim=-1)
        self.add_product(activate(gate, activation) * up, down, norm_behind)

    def add_experts(self, norm: RMSNorm, experts: Experts) -> None:
        """See `Operations.add_experts`."""
        self._stream = self._stream + self._summed(experts(norm(self._stream)))

    def norm(self, norm: RMSNorm) -> torch.Tensor:
        """See `Operations.norm`."""
        normed: torch.Tensor = norm(self._stream)
        return normed
