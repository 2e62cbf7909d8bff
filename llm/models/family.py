"""`Family`: everything that is particular to a family of models."""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from llm.attention.spec import AttentionSpec
from llm.config import ModelConfig
from llm.errors import ConfigError
from llm.models.config_keys import ReadKeys
from llm.models.operations import Operations
from llm.models.rope_keys import read_rope


class Layer(nn.Module):
    """One layer of a model, stated in operations.

    Attributes:
        spec: of its attention.
    """

    spec: AttentionSpec

    def forward(self, operations: Operations[Any]) -> None:
        """Add what the layer computes to the residual stream of a pass."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a module of a checkpoint goes: rows of one of our modules' weight, and of its bias.

    Attributes:
        module: dotted name of ours.
        rows: of it.
        expert: whose rows they are, in a module that holds those of all experts; None for other modules.
        layers: those that have it; None for all.
    """

    module: str
    rows: slice = field(default_factory=lambda: slice(None))
    expert: int | None = None
    layers: Container[int] | None = None

    def part_of(self, parameter: torch.Tensor) -> torch.Tensor:
        """The part of the module's weight or bias that is meant, a view."""
        return (parameter if self.expert is None else parameter[self.expert])[self.rows]


@dataclass(frozen=True, slots=True)
class Family:
    """How the checkpoints of one architecture become a model.

    Attributes:
        read_config: from the keys of config.json; the keys that it does not read are refused unless
            `llm.models.config_keys` knows them as harmless. It may raise what `load_model_config` explains: KeyError,
            TypeError, ConfigError, ValidationError.
        make_layers: on the current default device.
        layer_weights: destinations within a layer, by the names that modules have in a layer of a checkpoint.
        defaults: values that transformers takes for keys that a config.json lacks, where they are the family's own.
    """

    read_config: Callable[[ReadKeys, str], ModelConfig]
    make_layers: Callable[[ModelConfig], Sequence[Layer]]
    layer_weights: Callable[[ModelConfig], Mapping[str, Destination]]
    defaults: Mapping[str, Any] = field(default_factory=dict)


def common_fields(config: ReadKeys, *, has_partial_rope: bool = False) -> dict[str, Any]:
    """The fields of `ModelConfig` that config.json gives every family in the same way.

    Args:
        has_partial_rope: whether the family can turn a part of each head alone.
    """
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ConfigError(f"hidden_act {activation!r} is not supported; only silu is")
    rope = read_rope(config, can_be_partial=has_partial_rope)
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "num_kv_heads": config.get("num_key_value_heads"),
        "head_dim": config.get("head_dim"),
        "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
        "tie_embeddings": config.get("tie_word_embeddings") or False,
        "rope_theta": rope.theta,
        "rope_scaling": rope.scaling,
        "partial_rotary_factor": rope.partial_factor,
        "max_seq_len": rope.context_len,
    }
