"""Attention over the engine's packed steps: sequences of different lengths, keys and values in pages, states by row."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch

from llm.attention.delta_rule import mix_tokens
from llm.attention.spec import AttentionSpec
from llm.core.paged_kv_cache import PagedKVCache
from llm.core.recurrent_state import DeltaSpec, RecurrentState, RecurrentStates


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
        rows: (sequences,) int64, whose states the sequences have.
    """

    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    page_tables: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    page_size: int
    rows: torch.Tensor

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
            key, value: (tokens, num_kv_heads, head_dim) and (tokens, num_kv_heads, value_size), the new tokens' own.
            kv_pages: (2, pages, page_size, num_kv_heads, head_dim), keys first; (1, …) where values are part of keys.
            group: index of the layer's group, whose layers all have one window.
            spec: of the layer.
            sinks: (num_heads,); needed where `spec.has_sinks`.

        Returns:
            (tokens, num_heads, value_size).
        """
        ...


class PagedContext:
    """`AttentionContext` of one engine step: stores the new keys and values, then asks the backend.

    Args:
        states: of layers with a gated delta rule; needed where there are any.
    """

    def __init__(
        self,
        backend: PagedAttentionBackend,
        kv_cache: PagedKVCache,
        batch: PackedBatch,
        states: RecurrentStates | None = None,
    ) -> None:
        self._backend = backend
        self._kv_cache = kv_cache
        self._batch = batch
        self._states = states

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
        if spec.has_values:
            slots[1].index_copy_(0, self._batch.slots[group], value)
        return self._backend.attend(query, key, value, kv_pages, self._batch, group, spec, sinks)

    def mix(
        self,
        layer: int,
        spec: DeltaSpec,
        inputs: torch.Tensor,
        conv_weight: torch.Tensor,
        log_decay: torch.Tensor,
        share: torch.Tensor,
    ) -> torch.Tensor:
        """See `AttentionContext.mix`; here there is one leading dimension, the step's tokens."""
        assert self._states is not None, "the runner keeps them"
        states, batch = self._states.layers[layer], self._batch
        outputs = []
        first_token = 0
        for first, last, num_new in _parts_of_equal_length(batch):
            tokens = slice(first_token, first_token + (last - first) * num_new)
            rows = batch.rows[first:last]
            begins = torch.tensor([batch.context_lens[i] == num_new for i in range(first, last)], device=inputs.device)
            before = RecurrentState(*(_where_begun(state[rows], begins) for state in states))
            given = (x[tokens].view(last - first, num_new, -1) for x in (inputs, log_decay, share))
            new_inputs, new_decay, new_share = given
            output, after = mix_tokens(spec, new_inputs, conv_weight, new_decay, new_share, before)
            for state, new in zip(states, after, strict=True):
                state[rows] = new
            outputs.append(output.flatten(0, 1))
            first_token = tokens.stop
        return torch.cat(outputs)


def _parts_of_equal_length(batch: PackedBatch) -> Iterator[tuple[int, int, int]]:
    """Neighbouring sequences with as many new tokens each: first, end, number of tokens. Decodes are together so."""
    first = 0
    for num_new, group in groupby(batch.query_lens):
        end = first + len(list(group))
        yield first, end, num_new
        first = end


def _where_begun(state: torch.Tensor, begins: torch.Tensor) -> torch.Tensor:
    """States, zeros for the sequences that begin."""
    return state.masked_fill(begins.view(-1, *[1] * (state.dim() - 1)), 0)
