"""Grouped-query attention of one layer. What it attends to is the context's business."""

import torch
from torch import nn

from llm.attention.interface import AttentionContext
from llm.config import ModelConfig
from llm.models.layers import RMSNorm, apply_rotary


class Attention(nn.Module):
    """Projections, QK-norm and RoPE around `AttentionContext.attend`.

    Grouped queries (Ainslie et al. 2023, arXiv:2305.13245): each key/value head serves
    `num_heads / num_kv_heads` query heads. The three input projections are one product: rows query, key, value.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.kv_heads, config.head_size
        query_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, query_size + 2 * kv_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_output_bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(
        self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], context: AttentionContext
    ) -> torch.Tensor:
        """(…, hidden_size) → (…, hidden_size), with `rotary` the cos and sin of the tokens' positions."""
        num_qk = self.num_heads + self.num_kv_heads
        qkv = self.qkv_proj(x).unflatten(-1, (num_qk + self.num_kv_heads, self.head_dim))
        qk, value = qkv[..., :num_qk, :], qkv[..., num_qk:, :]
        if self.q_norm is not None and self.k_norm is not None:
            query, key = qk[..., : self.num_heads, :], qk[..., self.num_heads :, :]
            qk = torch.cat([self.q_norm(query), self.k_norm(key)], dim=-2)
        qk = apply_rotary(qk, *rotary)
        query, key = qk[..., : self.num_heads, :], qk[..., self.num_heads :, :]
        output: torch.Tensor = self.o_proj(context.attend(self.layer, query, key, value).flatten(-2))
        return output
