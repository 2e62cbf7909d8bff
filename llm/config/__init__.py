"""Configuration as data: frozen, bounded, validated once. Unknown keys are refused with the nearest known name."""

from llm.config.engine import MAX_TOP_LOGPROBS, EngineConfig
from llm.config.model import (
    Activation,
    ClassifierConfig,
    DeltaConfig,
    LatentConfig,
    ModelConfig,
    RopeScaling,
    RopeScalingType,
    RoutingConfig,
)
from llm.config.quantization import Quantization, WeightFormat, WeightLayout
from llm.config.strict_model import StrictModel, describe

__all__ = [
    "MAX_TOP_LOGPROBS",
    "Activation",
    "ClassifierConfig",
    "DeltaConfig",
    "EngineConfig",
    "LatentConfig",
    "ModelConfig",
    "Quantization",
    "RopeScaling",
    "RopeScalingType",
    "RoutingConfig",
    "StrictModel",
    "WeightFormat",
    "WeightLayout",
    "describe",
]
