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
        has_bias: a number of each expert is added to its logits.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, per_token: int, *, normalizes: bool, has_bias: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_experts)) if has_bias else None
        self.per_token = per_token
        self.normalizes = normalizes

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens, hidden_size) → weights, float32, and experts, int64, (tokens, per_token) each, best first."""
        bias = None if self.bias is None else self.bias.float()
        shares = F.linear(x.float(), self.weight.float(), bias).softmax(-1)
        weights, experts = shares.topk(self.per_token, dim=-1)
        return (weights / weights.sum(-1, keepdim=True) if self.normalizes else weights), experts


class ExpertProjections(nn.Module):
    """One projection of each expert, (experts, out, in), and its bias, (experts, out), if it has one."""

    def __init__(self, num_experts: int, num_inputs: int, num_outputs: int, *, has_bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, num_outputs, num_inputs))
        self.bias = nn.Parameter(torch.empty(num_experts, num_outputs)) if has_bias else None

    def forward(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """(…, in) → (…, out), by one expert."""
        return F.linear(x, self.weight[expert], None if self.bias is None else self.bias[expert])


class Experts(nn.Module):
    """The experts of one layer, each a SwiGLU, and their router.

    Args:
        size: width of an expert.
        per_token, normalizes: see `Router`.
        has_bias: router and projections have biases.
        swiglu_limit, swiglu_alpha: see `ModelConfig`.

    Attributes:
        held: the experts whose weights are here: all of them, or those of one rank of several.
    """

    def __init__(
        self,
        hidden_size: int,
        size: int,
        num_experts: int,
        per_token: int,
        *,
        normalizes: bool,
        has_bias: bool = False,
        swiglu_limit: float | None = None,
        swiglu_alpha: float = 1.702,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.held = range(num_experts)
        self.size = size
        self.swiglu_limit = swiglu_limit
        self.swiglu_alpha = swiglu_alpha
        self.router = Router(hidden_size, num_experts, per_token, normalizes=normalizes, has_bias=has_bias)
        self.gate_up_proj = ExpertProjections(num_experts, hidden_size, 2 * size, has_bias=has_bias)
        self.down_proj = ExpertProjections(num_experts, size, hidden_size, has_bias=has_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, hidden_size) → (…, hidden_size): of each token, the weighted sum of what its experts here make of it."""
        tokens = x.reshape(-1, x.shape[-1])
        weights, chosen = self.router(tokens)
        output = torch.zeros_like(tokens)
        for expert in chosen.unique().tolist():
            if expert not in self.held:
                continue
            token, slot = torch.where(chosen == expert)
            place = expert - self.held.start
            gate, up = self.gate_up_proj(tokens[token], place).chunk(2, dim=-1)
            made = self.down_proj(self._gated(gate, up), place)
            output.index_add_(0, token, (made * weights[token, slot, None]).to(x.dtype))
        return output.view_as(x)

    def _gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if self.swiglu_limit is None:
            return F.silu(gate) * up
        gate, up = gate.clamp(max=self.swiglu_limit), up.clamp(-self.swiglu_limit, self.swiglu_limit)
        return (up + 1) * (gate * torch.sigmoid(self.swiglu_alpha * gate))
