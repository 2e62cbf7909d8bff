"""`KernelOperations` of steps in which tokens have adapters."""

import torch
from torch import nn

from llm.config import Activation
from llm.kernels.expert_adapters import MixtureAdapters
from llm.kernels.quantization import EightBitRows
from llm.models.experts import Experts, ShareGate
from llm.models.kernel_arguments import norm_of
from llm.models.kernel_operations import KernelOperations
from llm.models.kernel_workspace import KernelWorkspace
from llm.models.latent import LatentHeads
from llm.models.layers import RMSNorm
from llm.models.packed_step import PackedStep


class AdaptedOperations(KernelOperations):
    """Products of few tokens include the tokens' adapters; the inputs of others are shrunk before them, and expanded
    into them.

    Products take their inputs as plain numbers, so norms are kernels of their own here; the activation of a gated
    feed-forward is part of the product, or of the expansion.

    Args:
        workspace, step, output: see `KernelOperations`; the step has adapters.
    """

    def __init__(self, workspace: KernelWorkspace, step: PackedStep, output: torch.Tensor) -> None:
        super().__init__(workspace, step, output)
        assert workspace.adapters is not None, "a workspace with slots"
        assert step.adapters is not None, "a step with adapters"
        self._adapters = workspace.adapters
        self._packed = step.adapters
        self._which = step.adapters.tokens

    def product_of_norm(self, norm: RMSNorm, projection: nn.Linear) -> torch.Tensor:
        """See `Operations.product_of_norm`."""
        return self._part(self._workspace.linear.normed(self._stream, norm_of(norm)), projection)

    def add_gated_mlp(
        self,
        norm: RMSNorm,
        gate_up: nn.Linear,
        down: nn.Linear,
        activation: Activation = Activation.SILU,
        norm_behind: RMSNorm | None = None,
    ) -> None:
        """See `Operations.add_gated_mlp`."""
        self._add(self._gated(norm, gate_up, down, activation), down, norm_behind)

    def _gated(self, norm: RMSNorm, gate_up: nn.Linear, down: nn.Linear, activation: Activation) -> torch.Tensor:
        del down  # it takes plain numbers here, whatever its format
        x = self._workspace.linear.normed(self._stream, norm_of(norm))
        if (fused := self._adapters.product(gate_up, x, swiglu=True)) is not None:
            output = x.new_empty(len(x), gate_up.out_features // 2)
            return fused.run(self._workspace.linear, x, self._which, output, gated_by=activation)
        shrunk = self._adapters.shrink(gate_up, x, self._which)
        product = super()._part(x, gate_up)
        return self._adapters.expand_gated(gate_up, shrunk, self._which, product, activation)

    def _add(self, rows: torch.Tensor | EightBitRows, projection: nn.Linear, norm: RMSNorm | None = None) -> None:
        assert isinstance(rows, torch.Tensor), "all rows are plain numbers here"
        if norm is not None or self._workspace.exchange is not None:
            behind = None if norm is None else norm_of(norm)
            self._workspace.linear.add_part(self._stream, self._part(rows, projection), behind)
            return
        if (fused := self._adapters.product(projection, rows)) is not None:
            fused.run(self._workspace.linear, rows, self._which, self._stream.total, adds=True)
            return
        shrunk = self._adapters.shrink(projection, rows, self._which)
        super()._add(rows, projection)
        self._adapters.expand(projection, shrunk, self._which, self._stream.total)

    def _part(self, rows: torch.Tensor | EightBitRows, projection: nn.Linear) -> torch.Tensor:
        assert isinstance(rows, torch.Tensor), "all rows are plain numbers here"
        if (fused := self._adapters.product(projection, rows)) is not None:
            return fused.run(self._workspace.linear, rows, self._which, rows.new_empty(len(rows), fused.num_outputs))
        # The inputs are shrunk first: the product fetches its weights at the same time.
        shrunk = self._adapters.shrink(projection, rows, self._which)
        product = super()._part(rows, projection)
        self._adapters.expand(projection, shrunk, self._which, product)
        return product

    def _adapters_of(self, experts: Experts) -> MixtureAdapters | None:
        return self._adapters.of_experts(experts, self._which)

    def _share_logits(self, norm: RMSNorm, gate: ShareGate) -> torch.Tensor | None:
        if not self._adapters.may_be_on(gate):
            return None
        x = self._workspace.linear.normed(self._stream, norm_of(norm))
        return self._adapters.share_logits(gate, x, self._which)

    def _asked_for(self, layer: int, output: torch.Tensor) -> torch.Tensor:
        if layer == self._workspace.last_layer:
            self._which = self._packed.kept
        return super()._asked_for(layer, output)

    def _add_keys(self, heads: LatentHeads, plain: torch.Tensor, queries: torch.Tensor) -> None:
        self._adapters.add_keys(heads, plain, queries, self._packed.tokens.slots)

    def _values(self, heads: LatentHeads, found: torch.Tensor) -> torch.Tensor:
        values = super()._values(heads, found)
        self._adapters.add_values(heads, found, values, self._packed.tokens.slots)
        return values
