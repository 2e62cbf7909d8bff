"""The operations that models are written in, run by this project's own kernels over an engine's packed steps."""

import torch
from torch import nn

from llm.attention.spec import AttentionSpec
from llm.config import Activation
from llm.core.recurrent_state import DeltaSpec
from llm.kernels.attention.gates import gate_heads
from llm.kernels.attention.latent_rows import LatentRows
from llm.kernels.attention.rope import rope_and_store
from llm.kernels.attention.work import Scoring
from llm.kernels.delta_chunks import LEAST_TOKENS, can_run, gated_delta_chunks
from llm.kernels.delta_rule import gate_by_norm, gated_delta_rule, short_convolution, store_tails
from llm.kernels.expert_adapters import MixtureAdapters
from llm.kernels.linear import add_parts
from llm.kernels.norm import ResidualStream, embed_tokens, keep_tokens, rms_norm
from llm.kernels.quantization import EightBitRows, ScaledProduct, scaled
from llm.kernels.shares import scale_by_share
from llm.models.delta import DeltaMixer
from llm.models.experts import Experts, ShareGate
from llm.models.kernel_arguments import norm_of, weights_of
from llm.models.kernel_workspace import KernelWorkspace
from llm.models.latent import LatentHeads
from llm.models.latent_kernels import store_and_ask, values_of
from llm.models.layers import RMSNorm
from llm.models.packed_step import PackedStep


class KernelOperations:
    """`Operations` of one step by few kernels; equal to `TorchOperations` up to rounding.

    Args:
        workspace: of the engine.
        step: what runs.
        output: (kept, hidden_size), contiguous, which the final norm is written to.
    """

    def __init__(self, workspace: KernelWorkspace, step: PackedStep, output: torch.Tensor) -> None:
        self._workspace = workspace
        self._step = step
        self._output = output
        self._stream: ResidualStream
        workspace.attention.plan(step)

    def embed(self, table: nn.Embedding, scale: float | None = None) -> None:
        """See `Operations.embed`."""
        tokens, last_token_ids = self._step.tokens, self._workspace.last_token_ids
        self._stream = ResidualStream(self._output.new_empty(len(tokens.positions), table.embedding_dim))
        exchange, first_id = self._workspace.exchange, None
        if exchange is not None:
            first_id = self._workspace.partition.rank * table.num_embeddings
        embed_tokens(tokens.token_ids, last_token_ids, tokens.rows, table.weight, self._stream.total, scale, first_id)
        if exchange is not None:
            self._stream.total = exchange.all_reduce(self._stream.total)

    def product_of_norm(self, norm: RMSNorm, projection: nn.Linear) -> torch.Tensor | ScaledProduct:
        """See `Operations.product_of_norm`."""
        return self._workspace.linear.of_norm(self._stream, norm_of(norm), weights_of(projection))

    def attend(
        self,
        layer: int,
        spec: AttentionSpec,
        qkv: torch.Tensor | ScaledProduct,
        qk_norms: tuple[RMSNorm, RMSNorm] | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Operations.attend`."""
        workspace, tokens = self._workspace, self._step.tokens
        kv_cache = workspace.kv_cache
        kv_pages, page_tables = kv_cache.layers[layer], workspace.page_tables[kv_cache.group_of[layer]]
        shape = len(tokens.positions), spec.num_heads, spec.head_dim
        query, output = (self._output.new_empty(shape, dtype=workspace.dtype) for _ in range(2))
        norms = None if qk_norms is None else (norm_of(qk_norms[0]), norm_of(qk_norms[1]))
        rope_table, query_scales = workspace.attention.angles[spec.rope]
        rope_and_store(
            qkv, query, kv_pages, page_tables, tokens.rows, tokens.positions, rope_table, norms, query_scales
        )
        scoring = Scoring(spec.softmax_scale, spec.soft_cap, sinks if spec.has_sinks else None)
        workspace.attention.attend(self._step, query, kv_pages, page_tables, spec.window, scoring, output)
        if spec.has_gate:
            gate_heads(output, qkv)
        return self._asked_for(layer, output.flatten(1))

    def attend_latents(
        self, layer: int, spec: AttentionSpec, projected: torch.Tensor | ScaledProduct, heads: LatentHeads
    ) -> torch.Tensor:
        """See `Operations.attend_latents`."""
        workspace, tokens = self._workspace, self._step.tokens
        kv_cache = workspace.kv_cache
        pages, page_tables = kv_cache.layers[layer][0], workspace.page_tables[kv_cache.group_of[layer]]
        rope_table, _ = workspace.attention.angles[spec.rope]
        rows = LatentRows(pages, page_tables, tokens.rows, tokens.positions, rope_table, heads.shape.is_interleaved)
        query = self._ask(heads, scaled(projected), rows)
        found = query.new_empty(*query.shape[:2], spec.value_size)
        workspace.attention.attend_latents(self._step, query, pages, page_tables, found)
        return self._asked_for(layer, self._values(heads, found))

    def _ask(self, heads: LatentHeads, projected: torch.Tensor, rows: LatentRows) -> torch.Tensor:
        """Store the tokens' latents, and return the heads' queries for latents."""

        def make_queries(latents: torch.Tensor) -> torch.Tensor:
            assert heads.q_proj is not None, "latents of queries are there to be projected"
            return self._part(latents, heads.q_proj)

        def add_keys(plain: torch.Tensor, queries: torch.Tensor) -> None:
            self._add_keys(heads, plain, queries)

        is_fixed = self._workspace.deterministic
        return store_and_ask(heads, projected, rows, make_queries, add_keys, deterministic=is_fixed)

    def _add_keys(self, heads: LatentHeads, plain: torch.Tensor, queries: torch.Tensor) -> None:
        """Add to queries for latents, (tokens, num_heads, rank), what is not in the weights of `heads`: nothing."""

    def _values(self, heads: LatentHeads, found: torch.Tensor) -> torch.Tensor:
        """What attention has found, (tokens, num_heads, rank), as values, (tokens, num_heads value_dim)."""
        return values_of(heads, found, deterministic=self._workspace.deterministic)

    def mix(
        self,
        layer: int,
        spec: DeltaSpec,
        mixed: torch.Tensor | ScaledProduct,
        decay: torch.Tensor | ScaledProduct,
        mixer: DeltaMixer,
    ) -> torch.Tensor:
        """See `Operations.mix`."""
        states, tokens, parts = self._workspace.states, self._step.tokens, self._step.parts
        decay = scaled(decay)
        tail, matrix = states.layers[layer]
        sizes = spec.conv_size, spec.output_size
        convolved, output = (
            self._output.new_empty(len(tokens.positions), size, dtype=self._workspace.dtype) for size in sizes
        )
        short_convolution(mixed, mixer.conv1d.weight, tail, tokens.rows, tokens.positions, convolved)
        if self._step.has_prefills:
            store_tails(mixed, tail, parts)
        rule = spec, convolved, decay, mixer.A_log, mixer.dt_bias, matrix, parts, output
        in_chunks = self._step.has_prefills and not self._workspace.deterministic
        if in_chunks and can_run(spec, self._workspace.dtype, convolved.device):
            gated_delta_rule(*rule, most_tokens=LEAST_TOKENS - 1)
            gated_delta_chunks(*rule)
        else:
            gated_delta_rule(*rule)
        gate_by_norm(spec, mixed, mixer.norm.weight, mixer.norm.eps, output)
        return self._asked_for(layer, output)

    def _asked_for(self, layer: int, output: torch.Tensor) -> torch.Tensor:
        """What a layer gives for each token; behind the last layer of those that are asked for, as the stream is."""
        if layer == self._workspace.last_layer:
            self._stream, output = keep_tokens(self._stream, output, self._step.kept)
        return output

    def add_product(
        self, rows: torch.Tensor | ScaledProduct, projection: nn.Linear, norm: RMSNorm | None = None
    ) -> None:
        """See `Operations.add_product`."""
        assert isinstance(rows, torch.Tensor), "what attention gives"
        self._add(rows, projection, norm)

    def add_gated_mlp(
        self,
        norm: RMSNorm,
        gate_up: nn.Linear,
        down: nn.Linear,
        activation: Activation = Activation.SILU,
        norm_behind: RMSNorm | None = None,
    ) -> None:
        """See `Operations.add_gated_mlp`."""
        behind = None if norm_behind is None else norm_of(norm_behind)
        weights = weights_of(gate_up), weights_of(down)
        self._workspace.linear.mlp(self._stream, norm_of(norm), *weights, activation, behind)

    def _gated(
        self, norm: RMSNorm, gate_up: nn.Linear, down: nn.Linear, activation: Activation
    ) -> torch.Tensor | EightBitRows:
        """What a gated feed-forward multiplies with `down`, (tokens, size). Nothing is pending behind this."""
        weights = weights_of(gate_up), weights_of(down)
        return self._workspace.linear.gated(self._stream, norm_of(norm), *weights, activation)

    def _add(self, rows: torch.Tensor | EightBitRows, projection: nn.Linear, norm: RMSNorm | None = None) -> None:
        """Add the product of `rows`, or its norm, to the stream."""
        behind = None if norm is None else norm_of(norm)
        self._workspace.linear.add(self._stream, rows, weights_of(projection), behind)

    def _part(self, rows: torch.Tensor | EightBitRows, projection: nn.Linear) -> torch.Tensor:
        """The product of `rows` as plain numbers: this rank's part of it."""
        return self._workspace.linear.part(rows, weights_of(projection))

    def add_experts(self, norm: RMSNorm, experts: Experts) -> None:
        """See `Operations.add_experts`."""
        mixture = self._workspace.experts
        assert mixture is not None, "a workspace for a model with experts"
        gate_up, down = weights_of(experts.gate_up_proj), weights_of(experts.down_proj)
        router, shared = experts.router, experts.shared
        if shared is not None:  # before the others have added to the stream, whose norm it takes
            rows = self._gated(norm, shared.gate_up_proj, shared.down_proj, Activation.SILU)
            if shared.gate is not None:
                scale_by_share(
                    self._stream, norm_of(norm), shared.gate.weight, rows, self._share_logits(norm, shared.gate)
                )
        exchange = self._workspace.exchange
        output = None if exchange is None else torch.zeros_like(self._stream.total)
        mixture(
            self._stream, norm_of(norm), router.weight, gate_up, down, router.bias, router.e_score_correction_bias,
            output=output, adapters=self._adapters_of(experts),
        )  # fmt: skip
        if exchange is None or output is None:
            if shared is not None:
                self._add(rows, shared.down_proj)
            return
        if shared is not None:
            output += self._part(rows, shared.down_proj)
        add_parts(self._stream, output, exchange)

    def _adapters_of(self, _experts: Experts) -> MixtureAdapters | None:
        """What is not in the weights of experts: nothing."""
        return None

    def _share_logits(self, _norm: RMSNorm, _gate: ShareGate) -> torch.Tensor | None:
        """What is not in the weight of a shared expert's gate, of each token; nothing."""
        return None

    def norm(self, norm: RMSNorm) -> torch.Tensor:
        """See `Operations.norm`."""
        rms_norm(self._stream, norm_of(norm), self._output)
        return self._output
