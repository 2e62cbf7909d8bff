"""Attention over whole batches of equal length, with or without `KVCache`s: the library's path."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from llm.attention.spec import AttentionSpec
from llm.core.kv_cache import KVCache


class DenseContext:
    """`AttentionContext` of one forward pass over (batch, seq, …) tensors.

    Args:
        kv_caches: one cache a layer, appended to; None for attention among the new tokens alone.
    """

    def __init__(self, kv_caches: Sequence[KVCache] | None = None) -> None:
        self._caches = kv_caches
        self._masks: dict[tuple[int, int, int | None], torch.Tensor | None] = {}

    def attend(
        self, layer: int, spec: AttentionSpec, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """See `AttentionContext.attend`; here the leading dimensions are (batch, seq)."""
        if self._caches is None:
            keys, values = key.transpose(1, 2), value.transpose(1, 2)
        else:
            keys, values = self._caches[layer].append(key, value)
        mask = self._mask(query.shape[1], keys.shape[2], spec.window, query.device)
        output = F.scaled_dot_product_attention(
            query.transpose(1, 2), keys, values, mask, enable_gqa=query.shape[2] != keys.shape[1]
        )
        return output.transpose(1, 2)

    def _mask(self, num_queries: int, num_keys: int, window: int | None, device: torch.device) -> torch.Tensor | None:
        """Boolean (num_queries, num_keys), True where attended to, or None for everything; shared by the layers."""
        cached = (num_queries, num_keys, window)
        if cached not in self._masks:
            self._masks[cached] = causal_mask(num_queries, num_keys, window, device)
        return self._masks[cached]


def causal_mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Boolean (num_queries, num_keys), True where attended to; None where nothing is hidden.

    The queries are the last tokens; each sees itself and what came before, at most `window` tokens in all.
    """
    if num_queries == 1 and (window is None or num_keys <= window):
        return None
    query_positions = torch.arange(num_keys - num_queries, num_keys, device=device).unsqueeze(1)
    key_positions = torch.arange(num_keys, device=device)
    mask = key_positions <= query_positions
    if window is not None:
        mask &= key_positions > query_positions - window
    return mask
