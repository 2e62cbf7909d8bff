"""What tokens' adapters add to products, by kernels."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from llm.config import Activation
from llm.kernels.activation import activate_gated
from llm.kernels.adapted_product import AdaptedProduct, new_flags
from llm.kernels.adapters import AdapterEntries, AdapterFactors, expand, expand_gated, shrink
from llm.kernels.expert_adapters import ExpertFactors, MixtureAdapters
from llm.models.adapters import AdapterMemory
from llm.models.experts import ROUTING, ExpertProjections, Experts, Router, ShareGate
from llm.models.kernel_arguments import weights_of
from llm.models.latent import LatentHeads


@dataclass(frozen=True, slots=True)
class PackedAdapters:
    """The adapters of a step's tokens.

    Attributes:
        tokens: of all tokens.
        kept: of the requested tokens, the only ones after the last layer's attention; indices are among these.
    """

    tokens: AdapterEntries
    kept: AdapterEntries


class KernelAdapters:
    """The slots of an engine, as kernels take them.

    Args:
        memory: the slots.
        deterministic: see `KernelWorkspace`.
    """

    def __init__(self, memory: AdapterMemory, *, deterministic: bool) -> None:
        rank, slots = memory.layout.rank, memory.slots
        self._deterministic = deterministic
        self._factors: dict[nn.Module, AdapterFactors] = {}
        self._expert_factors: dict[nn.Module, ExpertFactors] = {}
        for module, adapted in memory.modules.items():
            factor_a, factor_b = adapted.factor_a(slots, rank), adapted.factor_b(slots, rank)
            if isinstance(module, ExpertProjections):
                self._expert_factors[module] = ExpertFactors(factor_a, factor_b, rank)
            else:
                self._factors[module] = AdapterFactors.of(factor_a, factor_b, adapted.ranges)
        flags = new_flags(memory.slots.device)
        linear = [module for module in self._factors if not isinstance(module, ROUTING)]
        self._products = {
            module: AdaptedProduct(
                weights_of(cast(nn.Linear, module)), self._factors[module], number, len(linear), flags
            )
            for number, module in enumerate(linear)
        }

    def of_experts(self, experts: Experts, which: AdapterEntries) -> MixtureAdapters | None:
        """What the tokens' adapters have for the experts of a layer; None where they may not be on these."""
        if not self.may_be_on(experts.router):
            return None
        projections = (self._expert_factors[each] for each in (experts.gate_up_proj, experts.down_proj))
        return MixtureAdapters(which, self._factors[experts.router], *projections)

    def may_be_on(self, module: Router | ShareGate) -> bool:
        """Whether slots have room for adapters on a router, or on the gate of a shared expert."""
        return module in self._factors

    def share_logits(self, gate: ShareGate, x: torch.Tensor, which: AdapterEntries) -> torch.Tensor:
        """What the tokens' adapters add to products with a shared expert's gate: (tokens, 1) float32."""
        logits = torch.zeros(len(x), 1, dtype=torch.float32, device=x.device)
        self.expand(gate, self.shrink(gate, x, which), which, logits)
        return logits

    def product(self, projection: nn.Module, x: torch.Tensor, *, swiglu: bool = False) -> AdaptedProduct | None:
        """What multiplies x, (tokens, in), by a projection and the tokens' adapters at once, where anything does.

        Args:
            swiglu: the projection is one of gate and up, which an activation multiplies.
        """
        product = self._products[projection]
        return None if self._deterministic or not product.takes(len(x), x.dtype, swiglu=swiglu) else product

    def shrink(self, projection: nn.Module, x: torch.Tensor, which: AdapterEntries) -> torch.Tensor:
        """The tokens' A for a projection times its inputs, (tokens, in); see `llm.kernels.adapters.shrink`."""
        return shrink(x, which, self._factors[projection], deterministic=self._deterministic)

    def expand(self, projection: nn.Module, shrunk: torch.Tensor, which: AdapterEntries, output: torch.Tensor) -> None:
        """Add the tokens' B for a projection times `shrunk` to `output`, (tokens, out)."""
        expand(shrunk, which, self._factors[projection], output)

    def expand_gated(
        self,
        gate_up_proj: nn.Module,
        shrunk: torch.Tensor,
        which: AdapterEntries,
        gate_up: torch.Tensor,
        activation: Activation,
    ) -> torch.Tensor:
        """activation(gate) * up, (tokens, size), with the tokens' B; see `llm.kernels.adapters.expand_gated`."""
        factors = self._factors[gate_up_proj]
        output = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        if factors.halves is None:
            expand(shrunk, which, factors, gate_up)
            activate_gated(gate_up, output, activation)
        else:
            expand_gated(shrunk, which, factors, gate_up, output, activation)
        return output

    def add_keys(self, heads: LatentHeads, plain: torch.Tensor, queries: torch.Tensor, slots: torch.Tensor) -> None:
        """Add the adapters of `heads.kv_proj` to queries for latents.

        Every token is multiplied by the factors of every slot, and keeps what its own gives: heads are many, so this
        has enough rows for the vendor's library, and ranks are few.

        Args:
            plain: (tokens, num_heads, plain_dim), the parts of queries that are not rotated.
            queries: (tokens, num_heads, rank), the products of these with the keys' weights.
        """
        factor_a, factor_b = self._latent_factors(heads)
        numbers = torch.einsum("thd,shdr->thsr", plain, factor_b[:, :, : heads.shape.plain_dim])
        queries += _own(numbers, slots) @ factor_a.flatten(0, 1)

    def add_values(self, heads: LatentHeads, found: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        """Add the adapters of `heads.kv_proj` to values.

        Args:
            found: (tokens, num_heads, rank), what attention to latents has given.
            values: (tokens, num_heads value_dim), what the weights make of it.
        """
        factor_a, factor_b = self._latent_factors(heads)
        numbers = torch.unflatten(found @ factor_a.flatten(0, 1).t(), 2, factor_a.shape[:2])
        own = torch.unflatten(_own(numbers, slots), 2, factor_a.shape[:2])
        values += torch.einsum("thsr,shvr->thv", own, factor_b[:, :, heads.shape.plain_dim :]).flatten(1)

    def _latent_factors(self, heads: LatentHeads) -> tuple[torch.Tensor, torch.Tensor]:
        """A, (slots, adapters' rank, rank), and B, (slots, num_heads, plain_dim + value_dim, adapters' rank)."""
        factors = self._factors[heads.kv_proj]
        return factors.a, torch.unflatten(factors.b, 1, (heads.num_heads, -1))


def _own(numbers: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Numbers (tokens, heads, slots, rank) as (tokens, heads, slots · rank), zeros for slots that are not a token's."""
    is_own = slots[:, None] == torch.arange(numbers.shape[2], device=slots.device)
    return numbers.where(is_own[:, None, :, None], 0.0).flatten(2)
