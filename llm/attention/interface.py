"""The one question a layer asks: given these queries, keys and values, what does each token attend to?

Layers do not know where keys and values live. Whoever runs the model passes an `AttentionContext` that does:
`DenseContext` for whole batches with or without `KVCache`s, `PagedContext` for the engine's packed steps.
"""

from typing import Protocol

import torch

from llm.attention.spec import AttentionSpec


class AttentionContext(Protocol):
    """Causal attention for one forward pass. Stores what later passes need of the keys and values."""

    def attend(
        self,
        layer: int,
        spec: AttentionSpec,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention output of one layer's new tokens.

        Args:
            layer: index of the layer, from 0; it decides the cache.
            spec: shape and reach of the layer's attention.
            query: (…, num_heads, head_dim), RoPE applied.
            key: (…, num_kv_heads, head_dim), RoPE applied.
            value: (…, num_kv_heads, head_dim).
            sinks: (num_heads,); needed where `spec.has_sinks`.

        Returns:
            Same shape as `query`.
        """
        ...
