"""LoRA adapters (Hu et al. 2021, arXiv:2106.09685) on the linear layers of a model."""

import torch
import torch.nn.functional as F
from torch import nn


class LoRALinear(nn.Linear):
    """A linear layer with adapters, each of which adds `scaling · B A x` to a slice of the output."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.factors_a, self.factors_b = nn.ParameterList(), nn.ParameterList()
        self._rows: list[slice] = []
        self._scalings: list[float] = []

    @torch.no_grad()
    def add(self, factor_a: torch.Tensor, factor_b: torch.Tensor, rows: slice, scaling: float) -> None:
        """Add an adapter, A (rank, in_features) and B (number of rows, rank), in the weight's device and type."""
        for factors, factor in ((self.factors_a, factor_a), (self.factors_b, factor_b)):
            factors.append(nn.Parameter(factor.to(self.weight), requires_grad=False))
        self._rows.append(rows)
        self._scalings.append(scaling)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, in_features) → (…, out_features)."""
        output = super().forward(x)
        for factor_a, factor_b, rows, scaling in zip(
            self.factors_a, self.factors_b, self._rows, self._scalings, strict=True
        ):
            output[..., rows] += F.linear(F.linear(x, factor_a), factor_b) * scaling
        return output

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain layer that takes over this layer's weight, with the adapters added in at least float32."""
        for factor_a, factor_b, rows, scaling in zip(
            self.factors_a, self.factors_b, self._rows, self._scalings, strict=True
        ):
            add_to_weight(self.weight[rows], factor_a, factor_b, scaling)
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        plain.weight, plain.bias = self.weight, self.bias
        return plain


@torch.no_grad()
def add_to_weight(weight: torch.Tensor, factor_a: torch.Tensor, factor_b: torch.Tensor, scaling: float) -> None:
    """Add an adapter, A (rank, in) and B (out, rank), to a weight, (out, in), in at least float32; rounded once."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    a, b = (factor.to(weight.device, wide) for factor in (factor_a, factor_b))
    weight.copy_(weight.to(wide) + b @ a * scaling)


def merge_lora(model: nn.Module) -> None:
    """Fold every adapter of `model` into the weights, so that it costs nothing. Does nothing if called again."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoRALinear):
            replace_module(model, name, layer.merged())


def replace_module(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` where `model` has the module of this dotted name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
