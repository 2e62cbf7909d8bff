"""How a model is split across several ranks (Shoeybi et al. 2019, "Megatron-LM", arXiv:1909.08053).

Two consecutive products are split differently. The first is split by column: each rank computes some of the outputs,
that is, some heads, or some of the intermediate numbers of a feed-forward. The second is split by row, over the same
numbers, so the ranks' results have to be added up. If there are fewer key/value heads than ranks, several ranks hold
the same head. Experts are split like feed-forwards, or each rank holds some of them whole. Embeddings and the output
head are split by vocabulary. All ranks hold the norms, routers and latents.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from llm.config import ModelConfig
from llm.core.partition import Partition
from llm.core.recurrent_state import DeltaSpec
from llm.errors import ConfigError
from llm.models.experts import ExpertProjections, Experts

_WHOLE = ("norm", "_norm", ".router", ".shared.gate", "score")
"""Endings of the names of modules that every rank holds whole."""


@dataclass(frozen=True, slots=True)
class Cut:
    """The part of a module that a rank holds, as ranges within the whole module.

    Attributes:
        outputs: rows of its weight and bias, one range after the other; None for all.
        inputs: columns of its weight; None for all.
        experts: which experts, in a module that holds a projection of every expert; None for all.
        has_bias: whether this rank adds the bias. If the ranks' products are added up, only one rank does.
    """

    outputs: tuple[range, ...] | None = None
    inputs: range | None = None
    experts: range | None = None
    has_bias: bool = True


def held_shape(config: ModelConfig, partition: Partition) -> ModelConfig:
    """The shape of a rank's part, as if it were a model of its own; it still counts the experts of the whole model.

    Raises:
        ConfigError: the model cannot be split this way.
    """
    size = partition.size
    if size == 1:
        return config
    changes: dict[str, object] = {
        "vocab_size": rows_of_vocabulary(config, partition),
        "num_heads": _share(config.num_heads, "attention heads", size),
        "num_kv_heads": len(_kv_heads(config, partition)),
        "head_dim": config.head_size,
        "intermediate_size": _share(config.mlp_size, "numbers between the products of a feed-forward", size),
    }
    if config.num_experts and partition.by_expert:
        _share(config.num_experts, "experts", size)
    elif config.num_experts:
        changes["expert_size"] = _share(config.expert_size, "numbers between the products of an expert", size)
    if config.shared_expert_size:
        what = "numbers between the products of the shared expert"
        changes["shared_expert_size"] = _share(config.shared_expert_size, what, size)
    if config.delta is not None:
        heads = {name: _share(getattr(config.delta, name), "heads of layers with a state", size) for name in _DELTA}
        changes["delta"] = config.delta.model_copy(update=heads)
    return config.model_copy(update=changes)


_DELTA = ("num_key_heads", "num_value_heads")


def rows_of_vocabulary(config: ModelConfig, partition: Partition) -> int:
    """Number of rows of the embeddings and the output head on each rank. The last ranks may hold unused rows."""
    return -(-config.vocab_size // partition.size)


def _share(total: int, what: str, size: int) -> int:
    if total % size:
        raise ConfigError(
            f"tensor_parallel_size {size} does not divide the model's {total} {what}; use one that does, or 1"
        )
    return total // size


def _kv_heads(config: ModelConfig, partition: Partition) -> range:
    """The key/value heads that a rank's queries attend to."""
    heads, size = config.kv_heads, partition.size
    if heads % size and size % heads:
        raise ConfigError(
            f"tensor_parallel_size {size} is no multiple of the model's {heads} key/value heads, nor do they divide "
            "evenly; use another one"
        )
    first = partition.rank * heads // size
    return range(first, first + max(heads // size, 1))


def hold_experts(modules: Iterable[nn.Module], partition: Partition) -> None:
    """Leave each mixture of experts only the rank's own experts, if the split is by expert; on the meta device."""
    for module in modules:
        if isinstance(module, Experts):
            module.held = _part(module.num_experts, partition)
            for name in ("gate_up_proj", "down_proj"):
                projection = getattr(module, name)
                _, num_outputs, num_inputs = projection.weight.shape
                has_bias = projection.bias is not None
                setattr(module, name, ExpertProjections(len(module.held), num_inputs, num_outputs, has_bias=has_bias))


def _part(total: int, partition: Partition, begin: int = 0, unit: int = 1) -> range:
    """A rank's share of `total` items of `unit` numbers each, counted from number `begin`."""
    count = total // partition.size * unit
    start = begin + partition.rank * count
    return range(start, start + count)


def find_cut(config: ModelConfig, partition: Partition, name: str) -> Cut:
    """The cut of a module or parameter, given its dotted name in the model.

    Raises:
        ConfigError: there is no rule for splitting it.
    """
    if partition.size == 1:
        return Cut()
    if name in ("embed_tokens", "lm_head"):
        rows = rows_of_vocabulary(config, partition)
        ends = (min(end * rows, config.vocab_size) for end in (partition.rank, partition.rank + 1))
        return Cut((range(*ends),))
    leaf = ".".join(name.split(".")[2:]) if name.startswith("layers.") else name
    if leaf.endswith(_WHOLE):
        return Cut()
    rule = _RULES.get(leaf)
    if config.latent is not None:
        rule = _LATENT_RULES.get(leaf, rule)
    if config.delta is not None and name.startswith("layers.") and int(name.split(".")[1]) in config.delta.layers:
        rule = _DELTA_RULES.get(leaf, rule)
    if rule is None:
        raise ConfigError(f"tensor_parallel_size: {config.architecture} cannot be cut over several GPUs; leave it out")
    return rule(config, partition)


def _qkv(config: ModelConfig, partition: Partition) -> Cut:
    width, parts = config.head_size, 2 if config.attention_gate else 1
    keys = parts * config.num_heads * width
    held = _kv_heads(config, partition)
    key, value = (
        range(begin + held.start * width, begin + held.stop * width) for begin in (keys, keys + config.kv_heads * width)
    )
    return Cut((_part(config.num_heads, partition, unit=parts * width), key, value))


def _attention_output(config: ModelConfig, partition: Partition) -> Cut:
    return Cut(inputs=_part(config.num_heads, partition, unit=config.head_size), has_bias=partition.rank == 0)


def _sinks(config: ModelConfig, partition: Partition) -> Cut:
    return Cut((_part(config.num_heads, partition),))


def _gate_up(config: ModelConfig, partition: Partition) -> Cut:
    return Cut((_part(config.mlp_size, partition), _part(config.mlp_size, partition, config.mlp_size)))


def _down(config: ModelConfig, partition: Partition) -> Cut:
    return Cut(inputs=_part(config.mlp_size, partition), has_bias=partition.rank == 0)


def _experts_gate_up(config: ModelConfig, partition: Partition) -> Cut:
    if partition.by_expert:
        return Cut(experts=_part(config.num_experts, partition))
    size = config.expert_size
    return Cut((_part(size, partition), _part(size, partition, size)))


def _experts_down(config: ModelConfig, partition: Partition) -> Cut:
    if partition.by_expert:
        return Cut(experts=_part(config.num_experts, partition))
    return Cut(inputs=_part(config.expert_size, partition), has_bias=partition.rank == 0)


def _shared_gate_up(config: ModelConfig, partition: Partition) -> Cut:
    size = config.shared_expert_size
    return Cut((_part(size, partition), _part(size, partition, size)))


def _shared_down(config: ModelConfig, partition: Partition) -> Cut:
    return Cut(inputs=_part(config.shared_expert_size, partition), has_bias=partition.rank == 0)


def _delta_parts(config: ModelConfig, partition: Partition, *, has_gate: bool) -> Cut:
    """Queries, keys, values and the gates after them, each split by its heads."""
    assert config.delta is not None, "a layer with a gated delta rule"
    spec = DeltaSpec.of(config.delta)
    key_size = spec.num_key_heads * spec.key_dim
    outputs = [
        _part(spec.num_key_heads, partition, 0, spec.key_dim),
        _part(spec.num_key_heads, partition, key_size, spec.key_dim),
        _part(spec.num_value_heads, partition, 2 * key_size, spec.value_dim),
    ]
    if has_gate:
        outputs.append(_part(spec.num_value_heads, partition, spec.conv_size, spec.value_dim))
    return Cut(tuple(outputs))


def _mixed(config: ModelConfig, partition: Partition) -> Cut:
    return _delta_parts(config, partition, has_gate=True)


def _convolution(config: ModelConfig, partition: Partition) -> Cut:
    return _delta_parts(config, partition, has_gate=False)


def _decay(config: ModelConfig, partition: Partition) -> Cut:
    assert config.delta is not None, "a layer with a gated delta rule"
    heads = config.delta.num_value_heads
    return Cut((_part(heads, partition), _part(heads, partition, heads)))


def _delta_output(config: ModelConfig, partition: Partition) -> Cut:
    assert config.delta is not None, "a layer with a gated delta rule"
    heads, width = config.delta.num_value_heads, config.delta.value_dim
    return Cut(inputs=_part(heads, partition, unit=width), has_bias=partition.rank == 0)


def _delta_heads(config: ModelConfig, partition: Partition) -> Cut:
    assert config.delta is not None, "a layer with a gated delta rule"
    return Cut((_part(config.delta.num_value_heads, partition),))


def _latents(config: ModelConfig, partition: Partition) -> Cut:
    """All ranks hold the latents, including the queries' latent; queries are split by their heads."""
    assert config.latent is not None, "a layer with latent attention"
    shape = config.latent
    if shape.query_rank is not None:
        return Cut()
    width = shape.plain_dim + shape.rope_dim
    keys = config.num_heads * width
    return Cut((_part(config.num_heads, partition, unit=width), range(keys, keys + config.head_size)))


def _latent_queries(config: ModelConfig, partition: Partition) -> Cut:
    assert config.latent is not None, "a layer with latent attention"
    return Cut((_part(config.num_heads, partition, unit=config.latent.plain_dim + config.latent.rope_dim),))


def _latent_projections(config: ModelConfig, partition: Partition) -> Cut:
    assert config.latent is not None, "a layer with latent attention"
    return Cut((_part(config.num_heads, partition, unit=config.latent.plain_dim + config.latent.value_dim),))


def _latent_output(config: ModelConfig, partition: Partition) -> Cut:
    assert config.latent is not None, "a layer with latent attention"
    return Cut(inputs=_part(config.num_heads, partition, unit=config.latent.value_dim))


_RULES: dict[str, Callable[[ModelConfig, Partition], Cut]] = {
    "qkv_proj": _qkv,
    "o_proj": _attention_output,
    "sinks": _sinks,
    "gate_up_proj": _gate_up,
    "down_proj": _down,
    "experts.gate_up_proj": _experts_gate_up,
    "experts.down_proj": _experts_down,
    "experts.shared.gate_up_proj": _shared_gate_up,
    "experts.shared.down_proj": _shared_down,
}
"""Rules by the name of a module or parameter within a layer."""
_LATENT_RULES = {
    "latent_proj": _latents,
    "heads.q_proj": _latent_queries,
    "heads.kv_proj": _latent_projections,
    "o_proj": _latent_output,
}
"""Rules for layers with latent attention."""
_DELTA_RULES = {
    "mixed_proj": _mixed,
    "decay_proj": _decay,
    "mixer": _delta_heads,
    "mixer.conv1d": _convolution,
    "o_proj": _delta_output,
}
"""Rules for layers with a gated delta rule."""
