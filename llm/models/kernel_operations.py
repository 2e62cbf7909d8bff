"""The operations that models are written in, run by this project's own kernels over an engine's packed steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from llm.attention.spec import AttentionSpec
from llm.config import Activation
from llm.core.paged_kv_cache import PagedKVCache
from llm.core.partition import WHOLE, Exchange, Partition
from llm.core.recurrent_state import DeltaSpec, RecurrentStates
from llm.kernels.attention import hopper_prefill
from llm.kernels.attention.decode import PagedDecode
from llm.kernels.attention.gates import gate_heads
from llm.kernels.attention.latent import LatentAttention
from llm.kernels.attention.latent_rows import LatentRows
from llm.kernels.attention.prefill import PrefillScratch, paged_prefill, prefill_block_tokens
from llm.kernels.attention.rope import rope_and_store
from llm.kernels.attention.work import (
    Scoring,
    StepParts,
    WorkItems,
    num_decode_items,
    num_prefill_items,
    plan_decodes,
    plan_prefills,
)
from llm.kernels.delta_chunks import LEAST_TOKENS, can_run, gated_delta_chunks
from llm.kernels.delta_rule import gate_by_norm, gated_delta_rule, short_convolution, store_tails
from llm.kernels.experts import ExpertMixture
from llm.kernels.linear import Linear, Weights, add_parts
from llm.kernels.norm import ResidualStream, embed_tokens, keep_tokens, rms_norm
from llm.kernels.quantization import EightBitRows, ScaledProduct
from llm.kernels.shares import scale_by_share
from llm.kernels.soft_cap import cap_softly
from llm.models.adapters import AdapterMemory
from llm.models.delta import DeltaMixer
from llm.models.experts import Experts
from llm.models.kernel_adapters import KernelAdapters, PackedAdapters
from llm.models.kernel_arguments import expert_shape_of, norm_of, scaled, weights_of
from llm.models.latent import LatentHeads
from llm.models.latent_kernels import store_and_ask, values_of
from llm.models.layers import RMSNorm


@dataclass(frozen=True, slots=True)
class StepTokens:
    """The step's tokens, (tokens,) int32 each. The tokens of one part are adjacent, in order of position.

    Attributes:
        token_ids: ids of the tokens; negative for the token that the row drew last.
        positions: positions in their sequences.
        rows: rows of their sequences.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    rows: torch.Tensor


@dataclass(frozen=True, slots=True)
class PackedStep:
    """The tokens that a step runs, and how they are grouped.

    Attributes:
        tokens: all tokens of the step.
        parts: how the tokens are grouped; a token outside every part must be on a row that is never read.
        kept: (kept,) int32, indices of the requested tokens.
        has_prefills: whether any part has more than one new token.
        num_gathered: the result of `KernelWorkspace.num_gathered_tokens` for these parts.
        adapters: those of the tokens, for `AdaptedOperations`; None if no token has one.
    """

    tokens: StepTokens
    parts: StepParts
    kept: torch.Tensor
    has_prefills: bool
    num_gathered: int = 0
    adapters: PackedAdapters | None = None


class KernelWorkspace:
    """What the passes of one engine share: pages, their tables, and the kernels' own memory.

    Args:
        specs: specs of all layers; all attention specs have the same shape.
        kv_cache: memory of the slot pool.
        page_tables: (groups, rows, pages a row) int32, for each group of layers each row's pages in order of position.
        last_token_ids: (rows,) int32, the token that each row drew last.
        dtype: of the activations.
        max_tokens: most tokens a step.
        max_parts: most parts a step.
        deterministic: a token's result, bit by bit, depends on the tokens before it in its sequence alone: not on what
            else is in the step, nor on the steps and chunks in which those came.
        experts: those of a layer, as all layers with experts have them; None for a model without.
        states: of layers with a gated delta rule; needed where there are any.
        partition: of the model.
        exchange: with the ranks that hold the rest of the model; None where this one holds all of it.
        adapters: slots of adapters that tokens may have; None for none.
    """

    def __init__(
        self,
        specs: Sequence[AttentionSpec | DeltaSpec],
        kv_cache: PagedKVCache,
        page_tables: torch.Tensor,
        last_token_ids: torch.Tensor,
        dtype: torch.dtype,
        *,
        max_tokens: int,
        max_parts: int,
        deterministic: bool = False,
        experts: Experts | None = None,
        states: RecurrentStates | None = None,
        partition: Partition = WHOLE,
        exchange: Exchange | None = None,
        adapters: AdapterMemory | None = None,
    ) -> None:
        attention_specs = [spec for spec in specs if isinstance(spec, AttentionSpec)]
        device, spec = page_tables.device, attention_specs[0]
        self.states = states
        self.kv_cache = kv_cache
        self.page_tables = page_tables
        self.last_token_ids = last_token_ids
        self.dtype = dtype
        self.deterministic = deterministic
        self.partition = partition
        self.exchange = exchange
        self.adapters = None if adapters is None else KernelAdapters(adapters, deterministic=deterministic)
        self.linear = Linear(device, deterministic=deterministic, exchange=exchange)
        self.experts = None
        if experts is not None:
            shape = expert_shape_of(experts)
            held = experts.held if partition.by_expert and exchange is not None else None
            self.experts = ExpertMixture(shape, max_tokens, dtype, device, deterministic=deterministic, held=held)
        self.last_layer = len(specs) - 1
        heads = self._shape = spec.num_heads, spec.num_kv_heads, spec.head_dim
        shapes = {(s.num_heads, s.num_kv_heads, s.head_dim, s.value_dim) for s in attention_specs}
        assert len(shapes) == 1, "several shapes"
        for layer_spec in attention_specs:
            layer_spec.rope.table(device)  # now, and not while a graph is captured
            layer_spec.rope.query_scales(device)
        windows = {layer_spec.window for layer_spec in attention_specs}
        self.latents = None
        if spec.value_dim is None:
            self.decode = PagedDecode(max_parts, *heads, device)
            self.prefill_scratch = None if deterministic else PrefillScratch(*heads, device)
        else:
            self.latents = LatentAttention(
                max_parts, spec.num_heads, spec.value_dim, spec.head_dim, spec.softmax_scale, dtype, device,
                deterministic=deterministic,
            )  # fmt: skip
        self.decode_items = {
            window: WorkItems.allocate(num_decode_items(max_parts), max_parts, device) for window in windows
        }
        self._min_prefill_len = 1 if deterministic else 2
        num_items = num_prefill_items(max_tokens, max_parts, self._block_tokens(), self._min_prefill_len)
        self.prefill_items = WorkItems.allocate(num_items, max_parts, device)
        self.long_prefill = None
        is_plain = (
            self.latents is None and windows == {None} and all(layer_spec.is_plain for layer_spec in attention_specs)
        )
        if is_plain and not deterministic and hopper_prefill.can_run(dtype, spec.head_dim, device):
            max_seq_len = page_tables.shape[2] * kv_cache.page_size
            self.long_prefill = hopper_prefill.HopperPrefill(
                *heads,
                max_context=max_seq_len + max_tokens,  # the end of one long prompt, and others behind it
                max_tokens=max_tokens,
                max_parts=max_parts,
                dtype=dtype,
                device=device,
            )

    @property
    def fewest_gathered(self) -> int:
        """The least that `num_gathered_tokens` gives beside 0: what one graph does for. 0 where it never gives more."""
        return 0 if self.long_prefill is None else self.long_prefill.few_tokens

    def num_gathered_tokens(self, query_lens: npt.NDArray[np.int32], context_lens: npt.NDArray[np.int32]) -> int:
        """Tokens of context that a step of such parts is to copy out of their pages; 0 where that does not pay."""
        if self.long_prefill is None:
            return 0
        return self.long_prefill.num_gathered_tokens(query_lens, context_lens)

    def head(self, rows: torch.Tensor, module: nn.Module, soft_cap: float | None) -> torch.Tensor:
        """Rows (rows, in), contiguous, by a module's weight in the rows' dtype, (out, in): (rows, out), bounded."""
        logits = cast(torch.Tensor, self.linear(rows, Weights(module.get_parameter("weight"))))
        if soft_cap is not None:
            cap_softly(logits, soft_cap)
        return logits

    def plan(self, step: PackedStep) -> None:
        """Share the step's attention out among programs; every layer goes by that."""
        if self.deterministic:  # every token through the same kernel, in tiles of one size
            block_tokens = self._block_tokens()
        else:
            block_tokens = self._block_tokens(len(step.tokens.positions))
            for window, items in self.decode_items.items():
                plan_decodes(step.parts, items, window)
        if step.num_gathered:
            assert self.long_prefill is not None, "it asks for this"
            self.long_prefill.plan(
                step.parts, self.page_tables[0], self.kv_cache.page_size, step.num_gathered, self.prefill_items
            )
        elif step.has_prefills or self.deterministic:
            plan_prefills(step.parts, self.prefill_items, block_tokens, self._min_prefill_len)

    def _block_tokens(self, num_tokens: int = 0) -> int:
        """New tokens of an item of prefills, in a step of so many tokens; with 0 for all steps."""
        if self.latents is not None:
            return self.latents.block_tokens
        num_heads, num_kv_heads, _ = self._shape
        return prefill_block_tokens(num_heads, num_kv_heads, num_tokens)


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
        workspace.plan(step)

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
        rope_table = spec.rope.table(query.device)
        query_scales = spec.rope.query_scales(query.device)
        rope_and_store(
            qkv, query, kv_pages, page_tables, tokens.rows, tokens.positions, rope_table, norms, query_scales
        )
        scoring = Scoring(spec.softmax_scale, spec.soft_cap, sinks if spec.has_sinks else None)
        self._attend(query, kv_pages, page_tables, spec.window, scoring, output)
        if spec.has_gate:
            gate_heads(output, qkv)
        return self._asked_for(layer, output.flatten(1))

    def attend_latents(
        self, layer: int, spec: AttentionSpec, projected: torch.Tensor | ScaledProduct, heads: LatentHeads
    ) -> torch.Tensor:
        """See `Operations.attend_latents`."""
        workspace, tokens, parts = self._workspace, self._step.tokens, self._step.parts
        kv_cache, attention = workspace.kv_cache, workspace.latents
        assert attention is not None, "a workspace for a model with latents"
        projected, is_fixed = scaled(projected), workspace.deterministic
        pages, page_tables = kv_cache.layers[layer][0], workspace.page_tables[kv_cache.group_of[layer]]
        rope_table, is_interleaved = spec.rope.table(pages.device), heads.shape.is_interleaved
        rows = LatentRows(pages, page_tables, tokens.rows, tokens.positions, rope_table, is_interleaved)
        query = self._ask(heads, projected, rows)
        found = query.new_empty(*query.shape[:2], spec.value_size)
        if not is_fixed:
            attention.decode(query, pages, page_tables, parts, workspace.decode_items[None], found)
        if self._step.has_prefills or is_fixed:
            attention.prefill(query, pages, page_tables, parts, workspace.prefill_items, found)
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
        assert states is not None, "a workspace for a model with states"
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

    def _attend(
        self,
        query: torch.Tensor,
        kv_pages: torch.Tensor,
        page_tables: torch.Tensor,
        window: int | None,
        scoring: Scoring,
        output: torch.Tensor,
    ) -> None:
        """Write what the step's queries find in the pages to `output`."""
        workspace, parts = self._workspace, self._step.parts
        if not workspace.deterministic:
            items = workspace.decode_items[window]
            workspace.decode(query, kv_pages, page_tables, parts, items, window, output, scoring)
        if self._step.num_gathered:
            assert workspace.long_prefill is not None, "it has asked for this"
            workspace.long_prefill(
                query, kv_pages, parts, workspace.prefill_items, self._step.num_gathered, output, scoring.scale
            )
        elif self._step.has_prefills or workspace.deterministic:
            paged_prefill(
                query, kv_pages, page_tables, parts, workspace.prefill_items, window, output,
                workspace.prefill_scratch, scoring=scoring, deterministic=workspace.deterministic,
            )  # fmt: skip

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
                scale_by_share(self._stream, norm_of(norm), shared.gate.weight, rows)
        exchange = self._workspace.exchange
        output = None if exchange is None else torch.zeros_like(self._stream.total)
        mixture(
            self._stream, norm_of(norm), router.weight, gate_up, down, router.bias, router.e_score_correction_bias,
            output=output,
        )  # fmt: skip
        if exchange is None or output is None:
            if shared is not None:
                self._add(rows, shared.down_proj)
            return
        if shared is not None:
            output += self._part(rows, shared.down_proj)
        add_parts(self._stream, output, exchange)

    def norm(self, norm: RMSNorm) -> torch.Tensor:
        """See `Operations.norm`."""
        rms_norm(self._stream, norm_of(norm), self._output)
        return self._output
