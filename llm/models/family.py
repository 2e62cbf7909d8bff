"""`Family`: everything that is particular to a family of models."""

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
"""The key that a family of this activation reads, and the names that mean it."""


class Layer(nn.Module):
    """One layer of a model, stated in operations.

    Attributes:
        spec: of its attention, where it has some.
        delta_spec: of the gated delta rule that it has in place of attention; None for attention.
    """

    spec: AttentionSpec
    delta_spec: DeltaSpec | None = None

    def forward(self, operations: Operations[Any]) -> None:
        """Add what the layer computes to the residual stream of a pass."""
        raise NotImplementedError


class ExpertStack(Enum):
    """The order of outputs in one tensor of a checkpoint that holds a projection of all experts of a layer.

    In 16 bits such a tensor is (experts, in, out), and its bias (experts, out) is named like it with `_bias` behind.
    """

    IN_ORDER = "in order"
    ALTERNATING = "alternating"
    """Of gate and up in turn."""
    AS_HERE = "as here"
    """(experts, out, in), in order, without a bias."""


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a module of a checkpoint goes: rows of one of our modules' weight, and of its bias.

    Attributes:
        module: dotted name of ours; or of a parameter that is no module's weight, under its own name there and here.
        rows: of it.
        expert: whose rows they are, in a module that holds those of all experts; None for other modules.
        layers: those that have it; None for all.
        stack: the name in the checkpoint is no module's but of such a tensor; None for a module's. Where experts have
            places one by one as well, a checkpoint has either.
        arrange: brings the rows of what the checkpoint holds into our order; None where they are.
    """

    module: str
    rows: slice = field(default_factory=lambda: slice(None))
    expert: int | None = None
    layers: Container[int] | None = None
    stack: ExpertStack | None = None
    arrange: Callable[[torch.Tensor], torch.Tensor] | None = None

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
        left_out: what its checkpoints can do beside text and this engine cannot, in a word; their weights for it are
            left alone. None for nothing.
        has_layers_behind: whether that is done by layers that checkpoints hold behind the model's own.
    """

    read_config: Callable[[ReadKeys, str], ModelConfig]
    make_layers: Callable[[ModelConfig], Sequence[Layer]]
    layer_weights: Callable[[ModelConfig], Mapping[str, Destination]]
    left_out: str | None = None
    has_layers_behind: bool = False


def common_fields(
    config: ReadKeys,
    *,
    has_partial_rope: bool = False,
    activation: Activation = Activation.SILU,
    rope: RopeKeys | None = None,
) -> dict[str, Any]:
    """The fields of `ModelConfig` that config.json gives every family in the same way.

    Args:
        has_partial_rope: whether the family can turn a part of each head alone.
        activation: the family's.
        rope: what the family has read of RoPE for itself; None to read it as most do.
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
    """The model of a checkpoint that can do more than text, whose own keys are in `text_config`.

    Args:
        read: of the family's.
        others: keys beside it that are about what the engine leaves out.

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
