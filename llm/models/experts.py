"""Mixture of experts: each token goes to a few of a layer's many feed-forwards (Shazeer et al. 2017, arXiv:1701.06538).

For each product, one tensor stacks the weights of all experts of a layer, and the kernels index into it.
"""

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import nn

from llm.config import ModelConfig, RoutingConfig
from llm.models.adapters import TokenAdapters, product

_LEAST_SUM = 1e-20
"""Added to the sum of a token's weights: sigmoids may all be 0."""
_SOFTMAX = RoutingConfig()


class Router(nn.Module):
    """Decides which experts a token goes to, and with which weights. Not an `nn.Linear`: its weight is never rounded.

    Args:
        per_token: number of experts per token.
        normalizes: the weights of a token's chosen experts add up to 1. Otherwise the weights of all experts do, or
            each weight is a sigmoid.
        has_bias: each expert has a bias that is added to its logit.
        routing: how experts are scored and chosen.

    Attributes:
        e_score_correction_bias: (num_experts,) float32 whatever the model's format. It is added to the scores by which
            experts are chosen, but not to their weights. None if scores are not sigmoids.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        per_token: int,
        *,
        normalizes: bool,
        has_bias: bool = False,
        routing: RoutingConfig = _SOFTMAX,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_experts)) if has_bias else None
        self.e_score_correction_bias = (
            nn.Parameter(torch.empty(num_experts, dtype=torch.float32)) if routing.uses_sigmoid else None
        )
        self.per_token = per_token
        self.normalizes = normalizes
        self.routing = routing

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "Router":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.e_score_correction_bias is not None:
            self.e_score_correction_bias.data = self.e_score_correction_bias.data.float()
        return self

    def forward(self, x: torch.Tensor, adapters: TokenAdapters | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens, hidden_size) → weights, float32, and experts, int64, (tokens, per_token) each, best first."""
        bias = None if self.bias is None else self.bias.float()
        logits = F.linear(x.float(), self.weight.float(), bias)
        if adapters is not None:
            adapters.add(self, x, logits)
        scores = logits.sigmoid() if self.routing.uses_sigmoid else logits.softmax(-1)
        choice = scores if self.e_score_correction_bias is None else scores + self.e_score_correction_bias
        if self.routing.num_groups > 1:
            choice = choice.masked_fill(~self._in_best_groups(choice), -torch.inf)
        experts = choice.topk(self.per_token, dim=-1).indices
        weights = scores.gather(-1, experts)
        if self.normalizes:
            weights = weights / (weights.sum(-1, keepdim=True) + _LEAST_SUM)
        return weights * self.routing.scale, experts

    def _in_best_groups(self, choice: torch.Tensor) -> torch.Tensor:
        """Which experts are in each token's best groups: boolean, (tokens, experts) like `choice`."""
        grouped = torch.unflatten(choice, -1, (self.routing.num_groups, -1))
        worth = grouped.topk(2 if self.routing.uses_sigmoid else 1, dim=-1).values.sum(-1)
        best = worth.topk(self.routing.num_top_groups, dim=-1).indices
        is_best = torch.zeros_like(worth, dtype=torch.bool).scatter(-1, best, True)
        return is_best.unsqueeze(-1).expand_as(grouped).flatten(-2)


class ExpertProjections(nn.Module):
    """One projection of every expert, (experts, out, in), and its bias, (experts, out), if it has one."""

    def __init__(self, num_experts: int, num_inputs: int, num_outputs: int, *, has_bias: bool) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.num_inputs = num_inputs
        self.num_outputs = num_outputs
        self.weight = nn.Parameter(torch.empty(num_experts, num_outputs, num_inputs))
        self.bias = nn.Parameter(torch.empty(num_experts, num_outputs)) if has_bias else None

    def forward(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """(…, in) → (…, out), through one expert."""
        return F.linear(x, self.weight[expert], None if self.bias is None else self.bias[expert])

    def adapted(self, x: torch.Tensor, expert: int, adapters: TokenAdapters | None) -> torch.Tensor:
        """(tokens, in) → (tokens, out), through one expert and the tokens' adapters on it."""
        found: torch.Tensor = self(x, expert)
        if adapters is not None:
            adapters.add(self, x, found, expert)
        return found


class ShareGate(nn.Module):
    """Computes each token's factor on the shared expert's output. Not an `nn.Linear`: its weight is never rounded."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, hidden_size))

    def forward(self, x: torch.Tensor, adapters: TokenAdapters | None = None) -> torch.Tensor:
        """(…, hidden_size) → (…, 1), from 0 to 1."""
        logits = F.linear(x, self.weight)
        if adapters is not None:
            adapters.add(self, x, logits)
        return logits.sigmoid()


ROUTING = Router, ShareGate, ExpertProjections
"""Modules that adapters are on only where an engine has `adapter_experts`."""


class SharedExpert(nn.Module):
    """The expert that every token goes to, a SwiGLU.

    Args:
        size: its width.
        has_gate: a `ShareGate` scales its output for each token.
    """

    def __init__(self, hidden_size: int, size: int, *, has_gate: bool) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * size, bias=False)
        self.down_proj = nn.Linear(size, hidden_size, bias=False)
        self.gate = ShareGate(hidden_size) if has_gate else None

    def forward(self, x: torch.Tensor, adapters: TokenAdapters | None = None) -> torch.Tensor:
        """(…, hidden_size) → (…, hidden_size)."""
        gate, up = product(self.gate_up_proj, x, adapters).chunk(2, dim=-1)
        made = product(self.down_proj, F.silu(gate) * up, adapters)
        return made if self.gate is None else self.gate(x, adapters) * made


class Experts(nn.Module):
    """The experts of one layer, each a SwiGLU, and their router.

    Args:
        size: width of an expert.
        per_token, normalizes: see `Router`.
        has_bias: the router and the projections have biases.
        swiglu_limit, swiglu_alpha: see `ModelConfig`.
        shared_size: width of the expert that every token goes to; 0 for none.
        has_shared_gate: see `SharedExpert`.
        routing: see `Router`.

    Attributes:
        held: the experts whose weights this process holds: all of them, or those of one rank.
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
        shared_size: int = 0,
        has_shared_gate: bool = False,
        routing: RoutingConfig = _SOFTMAX,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.held = range(num_experts)
        self.size = size
        self.swiglu_limit = swiglu_limit
        self.swiglu_alpha = swiglu_alpha
        self.router = Router(
            hidden_size, num_experts, per_token, normalizes=normalizes, has_bias=has_bias, routing=routing
        )
        self.gate_up_proj = ExpertProjections(num_experts, hidden_size, 2 * size, has_bias=has_bias)
        self.down_proj = ExpertProjections(num_experts, size, hidden_size, has_bias=has_bias)
        self.shared = SharedExpert(hidden_size, shared_size, has_gate=has_shared_gate) if shared_size else None

    @classmethod
    def of(cls, config: ModelConfig) -> Self:
        """The experts of one layer of a model."""
        return cls(
            config.hidden_size,
            config.expert_size,
            config.num_experts,
            config.num_experts_per_token,
            normalizes=config.normalize_expert_weights,
            has_bias=config.expert_bias,
            swiglu_limit=config.swiglu_limit,
            swiglu_alpha=config.swiglu_alpha,
            shared_size=config.shared_expert_size,
            has_shared_gate=config.shared_expert_gate,
            routing=config.routing,
        )

    def forward(self, x: torch.Tensor, adapters: TokenAdapters | None = None) -> torch.Tensor:
        """(…, hidden_size) → (…, hidden_size): for each token, the weighted sum of its experts' outputs, as far as this
        process holds them."""
        tokens = x.reshape(-1, x.shape[-1])
        weights, chosen = self.router(tokens, adapters)
        output = torch.zeros_like(tokens)
        for expert in chosen.unique().tolist():
            if expert not in self.held:
                continue
            token, slot = torch.where(chosen == expert)
            place = expert - self.held.start
            own = None if adapters is None else adapters.kept(token)
            gate, up = self.gate_up_proj.adapted(tokens[token], place, own).chunk(2, dim=-1)
            made = self.down_proj.adapted(self._gated(gate, up), place, own)
            output.index_add_(0, token, (made * weights[token, slot, None]).to(x.dtype))
        if self.shared is not None:
            output = output + self.shared(tokens, adapters)
        return output.view_as(x)

    def _gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if self.swiglu_limit is None:
            return F.silu(gate) * up
        gate, up = gate.clamp(max=self.swiglu_limit), up.clamp(-self.swiglu_limit, self.swiglu_limit)
        return (up + 1) * (gate * torch.sigmoid(self.swiglu_alpha * gate))
