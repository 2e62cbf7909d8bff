"""Mixture of experts: each token goes to a few of a layer's many feed-forwards (Shazeer et al. 2017, arXiv:1701.06538).

The weights of all experts of a layer are stacked in one tensor for each product, which the kernels index.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Router(nn.Module):
    """Says which experts a token goes to, and with which weights. No `nn.Linear`, for its weight is never rounded.

    Args:
        per_token: experts a token.
        normalizes: the weights of a token's experts add up to 1; without it those of all experts do.
    """

    def __init__(self, hidden_size: int, num_experts: int, per_token: int, *, normalizes: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.per_token = per_token
        self.normalizes = normalizes

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens, hidden_size) → weights, float32, and experts, int64, (tokens, per_token) each, best first."""
        shares = F.linear(x.float(), self.weight.float()).softmax(-1)
        weights, experts = shares.topk(self.per_token, dim=-1)
        return (weights / weights.sum(-1, keepdim=True) if self.normalizes else weights), experts


class ExpertProjections(nn.Module):
    """One projection of each expert, (experts, out, in)."""

    def __init__(self, num_experts: int, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, num_outputs, num_inputs))
        self.bias = None


class Experts(nn.Module):
    """The experts of one layer, each a SwiGLU, and their router.

    Args:
        size: width of an expert.
        per_token, normalizes: see `Router`.
    """

    def __init__(self, hidden_size: int, size: int, num_experts: int, per_token: int, *, normalizes: bool) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.size = size
        self.router = Router(hidden_size, num_experts, per_token, normalizes=normalizes)
        self.gate_up_proj = ExpertProjections(num_experts, hidden_size, 2 * size)
        self.down_proj = ExpertProjections(num_experts, size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, hidden_size) → (…, hidden_size): of each token, the weighted sum of what its experts make of it."""
        tokens = x.reshape(-1, x.shape[-1])
        weights, chosen = self.router(tokens)
        output = torch.zeros_like(tokens)
        for expert in chosen.unique().tolist():
            token, slot = torch.where(chosen == expert)
            gate, up = F.linear(tokens[token], self.gate_up_proj.weight[expert]).chunk(2, dim=-1)
            made = F.linear(F.silu(gate) * up, self.down_proj.weight[expert])
            output.index_add_(0, token, (made * weights[token, slot, None]).to(x.dtype))
        return output.view_as(x)
