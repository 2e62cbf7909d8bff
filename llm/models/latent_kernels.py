"""What `LatentHeads` computes, by kernels."""

from collections.abc import Callable

import torch

from llm.kernels.attention.latent_rows import (
    LatentRows,
    head_product,
    normalise_columns,
    store_latents,
    turn_queries,
)
from llm.models.kernel_arguments import norm_of
from llm.models.latent import LatentHeads


def store_and_ask(
    heads: LatentHeads,
    projected: torch.Tensor,
    rows: LatentRows,
    make_queries: Callable[[torch.Tensor], torch.Tensor],
    add_keys: Callable[[torch.Tensor, torch.Tensor], None],
    *,
    deterministic: bool,
) -> torch.Tensor:
    """Store the tokens' latents; return the heads' queries for them, (tokens, num_heads, rank + rope_dim).

    Args:
        projected: (tokens, sum of `heads.sizes`), contiguous.
        make_queries: `heads.q_proj`, where there is one, applied to latents (tokens, query_width).
        add_keys: given the parts of queries that are not rotated, (tokens, num_heads, plain_dim), adds to the products
            of these with the keys' weights, (tokens, num_heads, rank).
        deterministic: see `head_product`.
    """
    shape = heads.shape
    store_latents(rows, projected, heads.query_width, norm_of(heads.kv_norm))
    queries = projected[:, : heads.query_width]
    if heads.q_norm is not None:
        queries = make_queries(normalise_columns(projected, norm_of(heads.q_norm)))
    by_head = torch.unflatten(queries, 1, (heads.num_heads, -1))
    query = projected.new_empty(len(projected), heads.num_heads, shape.rank + shape.rope_dim)
    turn_queries(rows, by_head, query)
    keys = heads.projections()[:, : shape.plain_dim].transpose(1, 2)
    head_product(by_head[..., : shape.plain_dim], keys, query[..., : shape.rank], deterministic=deterministic)
    add_keys(by_head[..., : shape.plain_dim], query[..., : shape.rank])
    return query


def values_of(heads: LatentHeads, found: torch.Tensor, *, deterministic: bool) -> torch.Tensor:
    """What attention has found, (tokens, num_heads, rank), as values, (tokens, num_heads value_dim)."""
    shape = heads.shape
    output = found.new_empty(len(found), heads.num_heads, shape.value_dim)
    head_product(found, heads.projections()[:, shape.plain_dim :], output, deterministic=deterministic)
    return output.flatten(1)
