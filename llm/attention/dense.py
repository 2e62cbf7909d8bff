"""Attention over whole batches of equal length, with or without caches: the library's path."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from llm.attention.delta_rule import mix_tokens
from llm.attention.spec import AttentionSpec
from llm.core.kv_cache import KVCache
from llm.core.recurrent_state import DeltaSpec, RecurrentCache, RecurrentState


class DenseContext:
    """`AttentionContext` of one forward pass over (batch, seq, …) tensors.

    Args:
        kv_caches: one cache a layer, of its kind, appended to; None for attention among the new tokens alone.
    """

    def __init__(self, kv_caches: Sequence[KVCache | RecurrentCache] | None = None) -> None:
        self._caches = kv_caches
        self._masks: dict[tuple[int, int, int | None], torch.Tensor | None] = {}

    def attend(
        self,
        layer: int,
        spec: AttentionSpec,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `AttentionContext.attend`; here the leading dimensions are (batch, seq)."""
        if self._caches is None:
            keys, values = key.transpose(1, 2), value.transpose(1, 2)
        else:
            cache = self._caches[layer]
            assert isinstance(cache, KVCache), "the model has looked at its caches"
            if spec.has_values:
                keys, values = cache.append(key, value)
            else:
                keys, _ = cache.append(key, key[..., : cache.value_dim])
                values = keys[..., : spec.value_size]
        mask = self._mask(query.shape[1], keys.shape[2], spec.window, query.device)
        return causal_attention(query.transpose(1, 2), keys, values, mask, spec, sinks).transpose(1, 2)

    def mix(
        self,
        layer: int,
        spec: DeltaSpec,
        inputs: torch.Tensor,
        conv_weight: torch.Tensor,
        log_decay: torch.Tensor,
        share: torch.Tensor,
    ) -> torch.Tensor:
        """See `AttentionContext.mix`; here the leading dimensions are (batch, seq)."""
        batch_size, num_new, _ = inputs.shape
        if self._caches is None:
            state = RecurrentState.zeros(spec, batch_size, inputs.device, inputs.dtype)
            return mix_tokens(spec, inputs, conv_weight, log_decay, share, state)[0]
        cache = self._caches[layer]
        assert isinstance(cache, RecurrentCache), "the model has looked at its caches"
        output, state = mix_tokens(spec, inputs, conv_weight, log_decay, share, cache.state(batch_size))
        cache.update(state, num_new)
        return output

    def _mask(self, num_queries: int, num_keys: int, window: int | None, device: torch.device) -> torch.Tensor | None:
        """Boolean (num_queries, num_keys), True where attended to, or None for everything; shared by the layers."""
        cached = (num_queries, num_keys, window)
        if cached not in self._masks:
            self._masks[cached] = causal_mask(num_queries, num_keys, window, device)
        return self._masks[cached]


def causal_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    spec: AttentionSpec,
    sinks: torch.Tensor | None,
    *,
    is_causal: bool = False,
) -> torch.Tensor:
    """Attention as `spec` says, by PyTorch's kernels where these can.

    Args:
        query: (batch, num_heads, queries, head_dim).
        keys, values: (batch, num_kv_heads, keys, head_dim) and (batch, num_kv_heads, keys, value_size).
        mask: boolean, (queries, keys), True where attended to; None for everything.
        sinks: (num_heads,); needed where `spec.has_sinks`.
        is_causal: in place of a mask where there are as many queries as keys: a query sees no later key.

    Returns:
        (batch, num_heads, queries, value_size).
    """
    num_kv_heads = keys.shape[1]
    if spec.is_plain:
        return F.scaled_dot_product_attention(
            query, keys, values, mask, is_causal=is_causal, scale=spec.scale,
            enable_gqa=query.shape[1] != num_kv_heads,
        )  # fmt: skip
    if is_causal:
        mask = causal_mask(query.shape[2], keys.shape[2], None, query.device)
    grouped_sinks = None if sinks is None else sinks.view(num_kv_heads, -1, 1, 1)
    grouped_query = query.view(query.shape[0], num_kv_heads, -1, *query.shape[2:])
    output = attend_by_definition(grouped_query, keys.unsqueeze(2), values.unsqueeze(2), mask, spec, grouped_sinks)
    return output.flatten(1, 2)


def attend_by_definition(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    spec: AttentionSpec,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """softmax(scores) V with everything that a spec can ask of scores; the softmax in float32.

    Args:
        query: (…, queries, head_dim).
        keys, values: (…, keys, head_dim) and (…, keys, value_size), broadcast to the query's leading dimensions.
        mask: boolean, broadcast to (…, queries, keys), True where attended to; None for everything.
        sinks: broadcast to (…, queries, 1); needed where `spec.has_sinks`.

    Returns:
        (…, queries, value_size).
    """
    scores = (query @ keys.transpose(-1, -2)).float() * spec.softmax_scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if spec.has_sinks:
        assert sinks is not None, "the layer has them"
        own = sinks.float().expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, own], dim=-1)
    probabilities = scores.softmax(-1)[..., : keys.shape[-2]]
    return probabilities.to(values.dtype) @ values


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
