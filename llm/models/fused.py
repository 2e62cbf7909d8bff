"""`FusedDecoder`: `DecoderModel`'s forward pass over packed steps as few kernels, for GPUs."""

from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from llm.attention.kernels import hopper_prefill
from llm.attention.kernels.decode import PagedDecode
from llm.attention.kernels.prefill import PrefillScratch, paged_prefill, prefill_block_tokens
from llm.attention.kernels.rope import rope_and_store
from llm.attention.kernels.work import (
    StepParts,
    WorkItems,
    num_decode_items,
    num_prefill_items,
    plan_decodes,
    plan_prefills,
)
from llm.core.paged_kv_cache import PagedKVCache
from llm.kernels.linear import Linear, Weights
from llm.kernels.norm import Norm, ResidualStream, embed_tokens, keep_tokens, rms_norm
from llm.kernels.quantization import ScaledProduct
from llm.models.attention import Attention
from llm.models.decoder import DecoderLayer, DecoderModel
from llm.models.layers import RMSNorm
from llm.models.quantize import weight_scales


@dataclass(frozen=True, slots=True)
class StepTokens:
    """The step's tokens, (tokens,) int32 each. Those of a part are adjacent, in order of position.

    Attributes:
        token_ids: negative for the token that the row drew last.
        positions: in their sequences.
        rows: of their sequences.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    rows: torch.Tensor


class FusedDecoder:
    """Runs a `DecoderModel`'s weights by fused kernels; equal to the model up to rounding.

    Args:
        model: on its device; its weights are used in place, some in 8 bits if `quantize_weights` made them so.
        kv_cache: memory of the slot pool, on the same device.
        page_tables: (rows, pages a row) int32, each row's pages in order of position.
        last_token_ids: (rows,) int32, the token that each row drew last.
        max_tokens: most tokens a step.
        max_parts: most parts a step.
        deterministic: a token's result, bit by bit, depends on the tokens before it in its sequence alone: not on what
            else is in the step, nor on the steps and chunks in which those came.
    """

    def __init__(
        self,
        model: DecoderModel,
        kv_cache: PagedKVCache,
        page_tables: torch.Tensor,
        last_token_ids: torch.Tensor,
        *,
        max_tokens: int,
        max_parts: int,
        deterministic: bool = False,
    ) -> None:
        self.model = model
        self.kv_cache = kv_cache
        config, device = model.config, model.device
        self._layers = [cast(DecoderLayer, layer) for layer in model.layers]
        self._page_tables = page_tables
        self._last_token_ids = last_token_ids
        self._deterministic = deterministic
        self._linear = Linear(device, deterministic=deterministic)
        self._rope_table = model.rotary.table(device)
        self._windows = [config.layer_window(layer) for layer in range(model.num_layers)]
        self._decode = PagedDecode(max_parts, config.num_heads, config.kv_heads, config.head_size, device)
        self._decode_items = {
            window: WorkItems.allocate(num_decode_items(max_parts), max_parts, device) for window in set(self._windows)
        }
        self._prefill_scratch = None
        if not deterministic:
            self._prefill_scratch = PrefillScratch(config.num_heads, config.kv_heads, config.head_size, device)
        self._min_prefill_len = 1 if deterministic else 2
        block_tokens = prefill_block_tokens(config.num_heads, config.kv_heads)
        self._prefill_items = WorkItems.allocate(
            num_prefill_items(max_tokens, max_parts, block_tokens, self._min_prefill_len), max_parts, device
        )
        self._long_prefill = None
        has_windows = any(window is not None for window in self._windows)
        if not (deterministic or has_windows) and hopper_prefill.can_run(model.dtype, config.head_size, device):
            max_seq_len = page_tables.shape[1] * kv_cache.page_size
            self._long_prefill = hopper_prefill.HopperPrefill(
                config.num_heads,
                config.kv_heads,
                config.head_size,
                max_context=max_seq_len + max_tokens,  # the end of one long prompt, and others behind it
                max_tokens=max_tokens,
                max_parts=max_parts,
                dtype=model.dtype,
                device=device,
            )

    @property
    def fewest_gathered(self) -> int:
        """The least that `num_gathered_tokens` gives beside 0: what one graph does for. 0 where it never gives more."""
        return 0 if self._long_prefill is None else self._long_prefill.few_tokens

    def num_gathered_tokens(self, query_lens: npt.NDArray[np.int32], context_lens: npt.NDArray[np.int32]) -> int:
        """Tokens of context that a step of such parts is to copy out of their pages; 0 where that does not pay."""
        if self._long_prefill is None:
            return 0
        return self._long_prefill.num_gathered_tokens(query_lens, context_lens)

    def hidden_states(
        self,
        tokens: StepTokens,
        parts: StepParts,
        kept: torch.Tensor,
        output: torch.Tensor,
        *,
        has_prefills: bool,
        num_gathered: int = 0,
    ) -> None:
        """Run a step and write the final hidden states, normalised, of the tokens that are asked for.

        Of the others only the last layer's keys and values are needed, so they end there: of a long prompt all but one.

        Args:
            parts: the parts of the tokens; tokens of none have to be on a row that nobody reads.
            kept: (num_kept,) int32, indices of the tokens that are asked for.
            output: (num_kept, hidden_size), contiguous.
            has_prefills: whether any part has more than one new token.
            num_gathered: as `num_gathered_tokens` says for these parts.
        """
        config = self.model.config
        if self._deterministic:  # every token through the same kernel, in tiles of one size
            has_prefills = True
            block_tokens = prefill_block_tokens(config.num_heads, config.kv_heads)
        else:
            block_tokens = prefill_block_tokens(config.num_heads, config.kv_heads, len(tokens.positions))
            for window, items in self._decode_items.items():
                plan_decodes(parts, items, window)
        if num_gathered:
            assert self._long_prefill is not None
            page_size = self.kv_cache.page_size
            self._long_prefill.plan(parts, self._page_tables, page_size, num_gathered, self._prefill_items)
        elif has_prefills:
            plan_prefills(parts, self._prefill_items, block_tokens, self._min_prefill_len)
        model = self.model
        stream = ResidualStream(output.new_empty(len(tokens.positions), model.hidden_size))
        embed_tokens(tokens.token_ids, self._last_token_ids, tokens.rows, model.embed_tokens.weight, stream.total)
        for layer in self._layers:
            attention, mlp = layer.attention, layer.mlp
            qkv = self._linear.of_norm(stream, _norm(layer.attention_norm), _weights(attention.qkv_proj))
            attended = self._attend(attention, qkv, tokens, parts, has_prefills, num_gathered)
            if layer is self._layers[-1]:
                stream, attended = keep_tokens(stream, attended, kept)
            self._linear.add(stream, attended, _weights(attention.o_proj))
            self._linear.mlp(stream, _norm(layer.mlp_norm), _weights(mlp.gate_up_proj), _weights(mlp.down_proj))
        rms_norm(stream, _norm(model.norm), output)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(draws, hidden_size) → (draws, vocab_size), in the model's dtype."""
        head = self.model.embed_tokens if self.model.lm_head is None else self.model.lm_head
        return cast(torch.Tensor, self._linear(hidden, Weights(head.weight)))

    def _attend(
        self,
        attention: Attention,
        qkv: torch.Tensor | ScaledProduct,
        tokens: StepTokens,
        parts: StepParts,
        has_prefills: bool,
        num_gathered: int,
    ) -> torch.Tensor:
        """Heads' queries, keys and values → their outputs, (tokens, num_heads * head_dim)."""
        kv_pages = self.kv_cache.layers[attention.layer]
        norms = None
        if attention.q_norm is not None and attention.k_norm is not None:
            norms = attention.q_norm.weight, attention.k_norm.weight
        eps = self.model.config.rms_norm_eps
        shape = len(tokens.positions), attention.num_heads, attention.head_dim
        query, output = (torch.empty(shape, dtype=self.model.dtype, device=self.model.device) for _ in range(2))
        rope_and_store(
            qkv, query, kv_pages, self._page_tables, tokens.rows, tokens.positions, self._rope_table, norms, eps
        )
        window = self._windows[attention.layer]
        if not self._deterministic:
            self._decode(query, kv_pages, self._page_tables, parts, self._decode_items[window], window, output)
        if num_gathered:
            assert self._long_prefill is not None
            self._long_prefill(query, kv_pages, parts, self._prefill_items, num_gathered, output)
        elif has_prefills or self._deterministic:
            paged_prefill(
                query, kv_pages, self._page_tables, parts, self._prefill_items, window, output,
                self._prefill_scratch, deterministic=self._deterministic,
            )  # fmt: skip
        return output.flatten(1)


def _norm(norm: RMSNorm) -> Norm:
    return Norm(norm.weight, norm.eps)


def _weights(projection: nn.Linear) -> Weights:
    return Weights(projection.weight, projection.bias, weight_scales(projection))
