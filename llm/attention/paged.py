"""Attention over the engine's packed steps: sequences of different lengths, keys and values in pages."""

from dataclasses import dataclass
from typing import Protocol

import torch

from llm.attention.spec import AttentionSpec
from llm.core.paged_kv_cache import PagedKVCache


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Where the tokens of one step belong. Tokens of a sequence are adjacent, in order of position.

    Attributes:
        query_lens: new tokens of each sequence; sequences with one come first.
        context_lens: tokens of each sequence once the new ones are stored.
        page_tables: (groups, sequences, max pages) int64, for each group of layers each sequence's pages in order of
            position, the scratch page behind.
        slots: (groups, tokens) int64, the slot that each new token's key and value go to.
        positions: (tokens,) int64, position of each new token in its sequence.
        page_size: slots a page.
    """

    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    page_tables: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    page_size: int

    @property
    def num_decodes(self) -> int:
        """Leading sequences with exactly one new token."""
        return next((i for i, num_new in enumerate(self.query_lens) if num_new != 1), len(self.query_lens))


class PagedAttentionBackend(Protocol):
    """Computes attention from pages. Chosen once, at start, by `llm.attention.backends.choose_backend`."""

    name: str

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_pages: torch.Tensor,
        batch: PackedBatch,
        group: int,
        spec: AttentionSpec,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention output of the new tokens, whose keys and values are stored in `kv_pages` already.

        Args:
            query: (tokens, num_heads, head_dim).
            key, value: (tokens, num_kv_heads, head_dim), the new tokens' own.
            kv_pages: (2, pages, page_size, num_kv_heads, head_dim), keys first.
            group: index of the layer's group, whose layers all have one window.
            spec: of the layer.
            sinks: (num_heads,); needed where `spec.has_sinks`.

        Returns:
            (tokens, num_heads, head_dim).
        """
        ...


class PagedContext:
    """`AttentionContext` of one engine step: stores the new keys and values, then asks the backend."""

    def __init__(self, backend: PagedAttentionBackend, kv_cache: PagedKVCache, batch: PackedBatch) -> None:
        self._backend = backend
        self._kv_cache = kv_cache
        self._batch = batch

    def attend(
        self,
        layer: int,
        spec: AttentionSpec,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `AttentionContext.attend`; here there is one leading dimension, the step's tokens."""
        kv_pages, group = self._kv_cache.layers[layer], self._kv_cache.group_of[layer]
        slots = kv_pages.flatten(1, 2)
        slots[0].index_copy_(0, self._batch.slots[group], key)
        slots[1].index_copy_(0, self._batch.slots[group], value)
        return self._backend.attend(query, key, value, kv_pages, self._batch, group, spec, sinks)
