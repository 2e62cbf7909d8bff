"""The one question a layer asks: given these queries, keys and values, what does each token get of those before it?

Layers do not know where keys, values and states live. Whoever runs the model passes an `AttentionContext` that does:
`DenseContext` for whole batches with or without `KVCache`s, `PagedContext` for the engine's packed steps.
"""

from typing import Protocol

import torch

from llm.attention.spec import AttentionSpec
from llm.core.recurrent_state import DeltaSpec


class AttentionContext(Protocol):
    """Causal attention for one forward pass. Stores what later passes need of the keys, values and states."""

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
            value: (…, num_kv_heads, value_size); part of the key where the spec says so.
            sinks: (num_heads,); needed where `spec.has_sinks`.

        Returns:
            (…, num_heads, value_size).
        """
        ...

    def mix(
        self,
        layer: int,
        spec: DeltaSpec,
        inputs: torch.Tensor,
        conv_weight: torch.Tensor,
        log_decay: torch.Tensor,
        share: torch.Tensor,
    ) -> torch.Tensor:
        """Output of one layer's gated delta rule for the new tokens; see `llm.attention.delta_rule.mix_tokens`.

        Args:
            layer: index of the layer, from 0; it decides the state.
            spec: shape of the rule.
            inputs: (…, conv_size).
            conv_weight: (conv_size, 1, kernel_size).
            log_decay, share: (…, num_value_heads) float32.

        Returns:
            (…, num_value_heads, value_dim).
        """
        ...
