"""Qwen3 MoE: Qwen3's attention, and experts in place of the feed-forward of all layers or of some."""

from collections.abc import Callable, Mapping
from typing import Any

from llm.attention.rope import RotaryEmbedding
from llm.config import ModelConfig
from llm.models.attention_layer import AttentionLayer, attention_weights, make_rope
from llm.models.config_keys import ReadKeys
from llm.models.experts import Experts
from llm.models.family import Destination, ExpertStack, Family, Layer, common_fields
from llm.models.llama import LlamaLayer, mlp_weights
from llm.models.operations import Operations
from llm.models.window_keys import read_windows


class ExpertsLayer(AttentionLayer):
    """Attention, then experts. See `AttentionLayer`."""

    def __init__(self, config: ModelConfig, index: int, rope: RotaryEmbedding) -> None:
        super().__init__(config, index, rope)
        self.experts = Experts.of(config)

    def forward(self, operations: Operations[Any]) -> None:
        """See `Layer.forward`."""
        self.add_attention(operations)
        operations.add_experts(self.mlp_norm, self.experts)


def make_layers(config: ModelConfig) -> list[Layer]:
    """The layers of a model of this shape, with experts where it has them."""
    rope = make_rope(config)
    kinds: list[Callable[[ModelConfig, int, RotaryEmbedding], Layer]] = [
        ExpertsLayer if config.has_experts(index) else LlamaLayer for index in range(config.num_layers)
    ]
    return [kind(config, index, rope) for index, kind in enumerate(kinds)]


def experts_weights(config: ModelConfig, block: str, gate: str, up: str, down: str) -> dict[str, Destination]:
    """Destinations of the experts within an `ExpertsLayer`: one by one, as released files have them, and stacked.

    Stacks are what transformers 5 keeps in memory, and what it writes with `save_original_format=False`.

    Args:
        block: name that a checkpoint gives to the router and the experts of a layer.
        gate, up, down: names that it gives to the projections of an expert.
    """
    size, layers = config.expert_size, [i for i in range(config.num_layers) if config.has_experts(i)]
    found = {
        f"{block}.experts.{name}": Destination(f"experts.{name}", layers=layers, stack=ExpertStack.AS_HERE)
        for name in ("gate_up_proj", "down_proj")
    }
    found[f"{block}.gate"] = Destination("experts.router", layers=layers)
    for i in range(config.num_experts):
        expert = f"{block}.experts.{i}"
        found[f"{expert}.{gate}"] = Destination("experts.gate_up_proj", slice(0, size), i, layers)
        found[f"{expert}.{up}"] = Destination("experts.gate_up_proj", slice(size, 2 * size), i, layers)
        found[f"{expert}.{down}"] = Destination("experts.down_proj", expert=i, layers=layers)
    return found


def shared_expert_weights(config: ModelConfig, expert: str, gate: str) -> dict[str, Destination]:
    """Destinations of the expert that every token goes to, and of its gate, by the names that a checkpoint gives them.

    Its projections are named like those of most families' feed-forwards.
    """
    size, layers = config.shared_expert_size, [i for i in range(config.num_layers) if config.has_experts(i)]
    found = {
        f"{expert}.gate_proj": Destination("experts.shared.gate_up_proj", slice(0, size), layers=layers),
        f"{expert}.up_proj": Destination("experts.shared.gate_up_proj", slice(size, 2 * size), layers=layers),
        f"{expert}.down_proj": Destination("experts.shared.down_proj", layers=layers),
    }
    if config.shared_expert_gate:
        found[gate] = Destination("experts.shared.gate", layers=layers)
    return found


def _read_config(config: ReadKeys, name: str) -> ModelConfig:
    config.fill({"num_key_value_heads": 4, "sliding_window": 4096})
    # A window counts where it is switched on, and then for all layers: `max_window_layers` is never asked.
    window_size, window_layers = read_windows(config)
    if not config.get("use_sliding_window"):
        window_size, window_layers = None, None
    num_experts = config["num_experts" if "num_experts" in config else "num_local_experts"]  # transformers 4, 5
    has_bias = config.get("attention_bias") or False
    return ModelConfig(
        **common_fields(config),
        architecture=name,
        window_size=window_size,
        window_layers=window_layers,
        qk_norm=True,
        attention_bias=has_bias,
        attention_output_bias=has_bias,
        num_experts=num_experts,
        num_experts_per_token=config["num_experts_per_tok"],
        expert_size=config["moe_intermediate_size"],
        normalize_expert_weights=config.get("norm_topk_prob") or False,
        dense_layers=read_dense_layers(config),
    )


def read_dense_layers(config: ReadKeys) -> tuple[int, ...]:
    """The layers without experts."""
    step, listed = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
    return tuple(i for i in range(config["num_hidden_layers"]) if i in listed or (i + 1) % step)


def _layer_weights(config: ModelConfig) -> Mapping[str, Destination]:
    return {
        **attention_weights(config),
        **mlp_weights(config, config.dense_layers),
        **experts_weights(config, "mlp", "gate_proj", "up_proj", "down_proj"),
    }


QWEN3_MOE = Family(_read_config, make_layers, _layer_weights)
