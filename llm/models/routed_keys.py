"""Reads what a config.json of DeepSeek's families, and of similar ones, says about experts."""

from collections.abc import Collection
from typing import Any

from llm.config import RoutingConfig
from llm.errors import ConfigError
from llm.models.config_keys import ReadKeys, shown

MTP = "multi-token prediction (MTP)"
"""What layers behind the model's own are for."""

_SOFTMAX_METHODS = ("greedy", "group_limited_greedy")
"""DeepSeek-V2's: without groups and with."""
_SIGMOID_METHOD = "noaux_tc"
"""DeepSeek-V3's: sigmoids, corrected while experts are chosen."""


def read_routed_experts(config: ReadKeys, *, uses_sigmoid: bool) -> dict[str, Any]:
    """The fields of `ModelConfig` about experts, all but which layers have them.

    Raises:
        ConfigError: tokens choose in a way that is not the family's.
        KeyError: a key is missing.
    """
    method = _one_of(config, "topk_method", (_SIGMOID_METHOD,) if uses_sigmoid else _SOFTMAX_METHODS)
    _one_of(config, "scoring_func", ("sigmoid",) if uses_sigmoid else ("softmax",))
    _one_of(config, "moe_layer_freq", (1,))
    normalizes = config.get("norm_topk_prob") or False
    if normalizes and not uses_sigmoid:
        raise ConfigError("'norm_topk_prob' is True, which this family does not have; only False is supported")
    num_groups, num_top_groups = config.get("n_group") or 1, config.get("topk_group") or 1
    if method == "greedy":
        num_groups = num_top_groups = 1
    size: int = config["moe_intermediate_size"]
    return {
        "num_experts": config["n_routed_experts"],
        "num_experts_per_token": config["num_experts_per_tok"],
        "expert_size": size,
        "shared_expert_size": size * (config.get("n_shared_experts") or 0),
        "normalize_expert_weights": normalizes,
        "routing": RoutingConfig(
            uses_sigmoid=uses_sigmoid,
            num_groups=num_groups,
            num_top_groups=num_top_groups,
            scale=config.get("routed_scaling_factor", 1.0),
        ),
    }


def read_leading_dense_layers(config: ReadKeys) -> tuple[int, ...]:
    """The layers without experts: the first ones."""
    return tuple(range(min(config["first_k_dense_replace"], config["num_hidden_layers"])))


def _one_of(config: ReadKeys, key: str, known: Collection[object]) -> object:
    """The value of a key, the first of those known where it is missing."""
    value = config.get(key, next(iter(known)))
    if value not in known:
        raise ConfigError(f"{key!r} is {shown(value)}; supported: {', '.join(map(repr, known))}")
    return value
