"""What `LatentHeads` computes, by kernels."""

import torch

from llm.kernels.attention.latent_rows import (
    LatentRows,
    head_product,
    normalise_columns,
    store_latents,
    turn_queries,
)
from llm.kernels.linear import Linear, Weights
from llm.models.kernel_arguments import norm_of, scaled
from llm.models.latent import LatentHeads


def store_and_ask(
    heads: LatentHeads,
    projected: torch.Tensor,
    rows: LatentRows,
    linear: Linear,
    q_weights: Weights | None,
    *,
    deterministic: bool,
) -> torch.Tensor:
    """Store the tokens' latents; return the heads' queries for them, (tokens, num_heads, rank + rope_dim).

    Args:
        projected: (tokens, sum of `heads.sizes`), contiguous.
        q_weights: of `heads.q_proj`, None where there is none.
        deterministic: see `head_product`.
    """
    shape = heads.shape
    store_latents(rows, projected, heads.query_width, norm_of(heads.kv_norm))
    queries = projected[:, : heads.query_width]
    if heads.q_norm is not None and q_weights is not None:
        queries = scaled(linear(normalise_columns(projected, norm_of(heads.q_norm)), q_weights))
    by_head = torch.unflatten(queries, 1, (heads.num_heads, -1))
    query = projected.new_empty(len(projected), heads.num_heads, shape.rank + shape.rope_dim)
    turn_queries(rows, by_head, query)
    keys = heads.projections()[:, : shape.plain_dim].transpose(1, 2)
    head_product(by_head[..., : shape.plain_dim], keys, query[..., : shape.rank], deterministic=deterministic)
    return query


def values_of(heads: LatentHeads, found: torch.Tensor, *, deterministic: bool) -> torch.Tensor:
    """What attention has found, (tokens, num_heads, rank), as values, (tokens, num_heads value_dim)."""
    shape = heads.shape
    output = found.new_empty(len(found), heads.num_heads, shape.value_dim)
    head_product(found, heads.projections()[:, shape.plain_dim :], output, deterministic=deterministic)
    return output.flatten(1)
