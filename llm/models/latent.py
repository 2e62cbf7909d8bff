"""Latent attention (DeepSeek-V2's MLA, arXiv:2405.04434): it keeps one vector per token for all heads.

A head's key and value are projections of a token's latent. The product of a query and a key equals the product of the
projected query and the latent, so the engine never computes keys. It projects queries into the space of latents,
attends to the latents as one key head whose first numbers are its values, and projects the result back, head by head.
"""

from typing import NamedTuple

import torch
from torch import nn

from llm.attention.rope import apply_rotary
from llm.config import LatentConfig
from llm.models.adapters import TokenAdapters, product
from llm.models.layers import RMSNorm

_NORM_EPS = 1e-6
"""Epsilon of the norms of latents, whatever the model's other norms use."""


class LatentQuery(NamedTuple):
    """Queries for attention to latents, and the new tokens' keys.

    Attributes:
        query: (…, num_heads, rank + rope_dim), RoPE applied.
        key: (…, 1, rank + rope_dim), the token's latent and the rotated part of its key, RoPE applied.
    """

    query: torch.Tensor
    key: torch.Tensor


class LatentHeads(nn.Module):
    """The modules between the first and the last projection of a layer with latent attention.

    Args:
        num_heads: number of query heads.
        shape: shape of the attention.

    Attributes:
        q_norm, q_proj: make the heads' queries of the queries' latent; None where the first projection has made them.
        kv_norm: of a token's latent before it is kept.
        kv_proj: (num_heads (plain_dim + value_dim), rank): of each head what makes its key, then what makes its value.
            It is multiplied with in parts, so it has to be plain numbers for kernels; see `unpack`.
    """

    def __init__(self, num_heads: int, shape: LatentConfig) -> None:
        super().__init__()
        self.num_heads, self.shape = num_heads, shape
        rank, query_size = shape.query_rank, num_heads * (shape.plain_dim + shape.rope_dim)
        self.q_norm = None if rank is None else RMSNorm(rank, _NORM_EPS)
        self.q_proj = None if rank is None else nn.Linear(rank, query_size, bias=False)
        self.kv_norm = RMSNorm(shape.rank, _NORM_EPS)
        self.kv_proj = nn.Linear(shape.rank, num_heads * (shape.plain_dim + shape.value_dim), bias=False)
        self.query_width = query_size if rank is None else rank

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Widths of the first projection's outputs: queries or their latent, the latent, the rotated part of the
        key."""
        return self.query_width, self.shape.rank, self.shape.rope_dim

    def queries(
        self, projected: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, adapters: TokenAdapters | None = None
    ) -> LatentQuery:
        """Convert the first projection's output, (…, sum of `sizes`), to the input of attention."""
        query, latent, key = projected.split_with_sizes(self.sizes, dim=-1)
        if self.q_norm is not None and self.q_proj is not None:
            query = product(self.q_proj, self.q_norm(query), adapters)
        plain, turning = torch.unflatten(query, -1, (self.num_heads, -1)).split_with_sizes(
            (self.shape.plain_dim, self.shape.rope_dim), dim=-1
        )
        key = key.unsqueeze(-2)
        if self.shape.is_interleaved:
            turning, key = _halves(turning), _halves(key)
        turned, key = apply_rotary(turning, cos, sin), apply_rotary(key, cos, sin)
        absorbed = torch.einsum("...hd,hdr->...hr", plain, self.projections()[:, : self.shape.plain_dim])
        for tokens, factor_a, factor_b in () if adapters is None else adapters.factors(self.kv_proj):
            keys = factor_b.view(self.num_heads, -1, factor_b.shape[1])[:, : self.shape.plain_dim]
            absorbed[tokens] += torch.einsum("thd,hdr->thr", plain[tokens], keys) @ factor_a
        return LatentQuery(
            torch.cat([absorbed, turned], dim=-1), torch.cat([self.kv_norm(latent).unsqueeze(-2), key], dim=-1)
        )

    def values(self, found: torch.Tensor, adapters: TokenAdapters | None = None) -> torch.Tensor:
        """Project the output of attention, (…, num_heads, rank), to the heads' values, (…, num_heads, value_dim)."""
        values = torch.einsum("...hr,hvr->...hv", found, self.projections()[:, self.shape.plain_dim :])
        for tokens, factor_a, factor_b in () if adapters is None else adapters.factors(self.kv_proj):
            own = factor_b.view(self.num_heads, -1, factor_b.shape[1])[:, self.shape.plain_dim :]
            values[tokens] += torch.einsum("thr,hvr->thv", found[tokens] @ factor_a.t(), own)
        return values

    def projections(self) -> torch.Tensor:
        """The weight of `kv_proj` by head, (num_heads, plain_dim + value_dim, rank)."""
        weight = self.kv_proj.weight
        if type(self.kv_proj) is not nn.Linear:  # in codes, or with an adapter
            weight = self.kv_proj(torch.eye(self.shape.rank, device=weight.device, dtype=self.kv_norm.weight.dtype)).t()
        return weight.view(self.num_heads, -1, self.shape.rank)

    @torch.no_grad()
    def unpack(self) -> None:
        """Convert `kv_proj` to plain numbers if the checkpoint stores it in fewer bits."""
        if type(self.kv_proj) is not nn.Linear:
            plain = nn.Linear(self.shape.rank, self.kv_proj.out_features, bias=False, device="meta")
            plain.weight = nn.Parameter(self.projections().flatten(0, 1).contiguous(), requires_grad=False)
            self.kv_proj = plain


def unpack_latent_heads(model: nn.Module) -> None:
    """`LatentHeads.unpack` in all layers of a model."""
    for module in model.modules():
        if isinstance(module, LatentHeads):
            module.unpack()


def _halves(x: torch.Tensor) -> torch.Tensor:
    """Numbers (…, dim) whose neighbours turn together in the order of `apply_rotary`: first ones, then second ones."""
    return torch.unflatten(x, -1, (-1, 2)).transpose(-1, -2).flatten(-2)
