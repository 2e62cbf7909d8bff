"""Converts modules to the arguments that kernels take."""

from torch import nn

from llm.kernels.linear import Weights
from llm.kernels.norm import Norm
from llm.kernels.routing import ExpertShape
from llm.models.experts import ExpertProjections, Experts
from llm.models.layers import RMSNorm
from llm.models.quantized import Quantized


def norm_of(norm: RMSNorm) -> Norm:
    """A norm."""
    return Norm(norm.weight, norm.eps, norm.offset)


def expert_shape_of(experts: Experts) -> ExpertShape:
    """The shape of a layer's experts."""
    router = experts.router
    return ExpertShape(
        experts.num_experts, router.per_token, experts.size, router.weight.shape[1], router.normalizes,
        experts.swiglu_limit, experts.swiglu_alpha, router.routing,
    )  # fmt: skip


def weights_of(projection: nn.Linear | ExpertProjections) -> Weights:
    """The weights of a product, in whatever format."""
    if not isinstance(projection, Quantized):
        return Weights(projection.weight, projection.bias)
    scales = projection.row_scales
    return Weights(projection.weight, projection.bias, scales, projection.groups if scales is None else None)
