"""`Family`: everything that is specific to a family of models."""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import nn

from llm.attention.spec import AttentionSpec
from llm.config import Activation, ModelConfig
from llm.core.recurrent_state import DeltaSpec
from llm.errors import ConfigError
from llm.models.config_keys import ReadKeys
from llm.models.operations import Operations
from llm.models.rope_keys import RopeKeys, read_rope

_ACTIVATION_KEYS = {
    Activation.SILU: ("hidden_act", ("silu", "swish")),
    Activation.GELU_TANH: ("hidden_activation", ("gelu_pytorch_tanh",)),
}
"""For each activation, the key of config.json that its families read, and the values that mean it."""


class Layer(nn.Module):
    """One layer of a model, written in terms of `Operations`.

    Attributes:
        spec: shape of its attention, if it has any.
        delta_spec: shape of the gated delta rule that it has instead of attention; None for attention.
    """

    spec: AttentionSpec
    delta_spec: DeltaSpec | None = None

    def forward(self, operations: Operations[Any]) -> None:
        """Add what the layer computes to the residual stream of a pass."""
        raise NotImplementedError


class ExpertStack(Enum):
    """The order of outputs in a checkpoint's tensor that holds one projection of all experts of a layer.

    In 16 bits this tensor is (experts, in, out). Its bias, (experts, out), has the same name with `_bias` appended.
    """

    IN_ORDER = "in order"
    ALTERNATING = "alternating"
    """Outputs of gate and up take turns."""
    AS_HERE = "as here"
    """(experts, out, in), in order, without a bias."""


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a module of a checkpoint goes: to some rows of the weight and bias of a module of the model.

    Attributes:
        module: dotted name of the model's module; or of a parameter that is not a module's weight, which has its own
            name in both the checkpoint and the model.
        rows: rows of the model's module.
        expert: the expert whose rows they are, in a module that holds those of all experts; None for other modules.
        layers: the layers that have it; None for all.
        stack: set if the checkpoint's name is that of a tensor of all experts; None for the name of a module. If
            experts also have separate destinations, a checkpoint uses one form or the other.
        arrange: reorders the checkpoint's rows into the model's order; None if they are in this order already.
    """

    module: str
    rows: slice = field(default_factory=lambda: slice(None))
    expert: int | None = None
    layers: Container[int] | None = None
    stack: ExpertStack | None = None
    arrange: Callable[[torch.Tensor], torch.Tensor] | None = None

    def part_of(self, parameter: torch.Tensor) -> torch.Tensor:
        """A view of the part of the module's weight or bias that this destination means."""
        return (parameter if self.expert is None else parameter[self.expert])[self.rows]


@dataclass(frozen=True, slots=True)
class Family:
    """How the checkpoints of one architecture become a model.

    Attributes:
        read_config: makes a `ModelConfig` from the keys of config.json. Keys that it does not read are refused unless
            `llm.models.config_keys` lists them as harmless. It may raise errors that `load_model_config` explains:
            KeyError, TypeError, ConfigError, ValidationError.
        make_layers: makes the layers, on the current default device.
        layer_weights: destinations within a layer, by the names of modules in a layer of a checkpoint.
        left_out: in a word, what its checkpoints can do beyond text that this engine cannot. The weights for it are not
            read. None for nothing.
        has_layers_behind: whether these weights are extra layers after the model's own.
        renamed: other names that checkpoints have for modules of a layer, each with the one that `layer_weights` has.
    """

    read_config: Callable[[ReadKeys, str], ModelConfig]
    make_layers: Callable[[ModelConfig], Sequence[Layer]]
    layer_weights: Callable[[ModelConfig], Mapping[str, Destination]]
    left_out: str | None = None
    has_layers_behind: bool = False
    renamed: Mapping[str, str] = field(default_factory=dict)


def common_fields(
    config: ReadKeys,
    *,
    has_partial_rope: bool = False,
    activation: Activation = Activation.SILU,
    rope: RopeKeys | None = None,
) -> dict[str, Any]:
    """The fields of `ModelConfig` that every family reads from config.json in the same way.

    Args:
        has_partial_rope: whether the family can rotate only part of each head.
        activation: the family's activation.
        rope: RoPE's parameters, if the family has read them itself; None to read them as most families do.
    """
    key, names = _ACTIVATION_KEYS[activation]
    found = config.get(key, names[0])
    if found not in names:
        raise ConfigError(f"{key} {found!r} is not supported; only {names[0]} is")
    rope = rope or read_rope(config, can_be_partial=has_partial_rope)
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "activation": activation,
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


def read_text_half(
    config: ReadKeys, name: str, read: Callable[[ReadKeys, str], ModelConfig], others: Iterable[str]
) -> ModelConfig:
    """Reads the text model of a multimodal checkpoint, whose keys are in `text_config`.

    Args:
        read: the family's reader.
        others: keys next to `text_config` that concern what the engine leaves out.

    Raises:
        ConfigError: a key of `text_config` is not understood.
    """
    text = ReadKeys(config["text_config"])
    text.fill({key: config[key] for key in ("tie_word_embeddings",) if key in config})
    model = read(text, name)
    text.refuse_unread(model, name)
    for key in others:
        config.get(key)
    return model
