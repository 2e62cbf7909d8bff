"""Reads what a config.json says about rotary position embeddings, and refuses what is not supported."""

from collections.abc import Collection
from typing import Any, NamedTuple

from llm.config import RopeScaling, RopeScalingType
from llm.errors import ConfigError
from llm.models.config_keys import ReadKeys, check_kind, shown

_KNOWN_UNSCALED = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
_DYNAMIC = "dynamic"
"""Stretches the angles of sequences past `max_position_embeddings` alone. The engine serves none that is longer."""
_KNOWN_SCALED = {*_KNOWN_UNSCALED, *RopeScaling.model_fields, "finetuned"}


class RopeKeys(NamedTuple):
    """What config.json says about rotary position embeddings.

    Attributes:
        theta: base of the angles.
        scaling: how the angles are scaled; None for not at all.
        context_len: context length in tokens, with the scaling applied.
        partial_factor: fraction of each head that is rotated.
    """

    theta: float
    scaling: RopeScaling | None
    context_len: int
    partial_factor: float


def read_rope(config: ReadKeys, *, can_be_partial: bool = False, harmless: Collection[str] = ()) -> RopeKeys:
    """RoPE's parameters and the context length, from either generation of config.json.

    Args:
        can_be_partial: whether the family can rotate only part of each head.
        harmless: keys that change nothing for the family.

    Raises:
        ConfigError: it is a kind that is not supported, or not the same for all layers.
        KeyError, TypeError, ValidationError: a value is missing or of the wrong type.
    """
    top_level = {key: config.get(key, default) for key, default in (("rope_theta", 1e4), ("partial_rotary_factor", 1))}
    found = top_level | _held(_rope_set(config))
    if "short_factor" in found:
        original_len = found.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
        # "su" and "yarn" are longrope's names in Phi-3's first files.
        found |= {"rope_type": "longrope", "original_max_position_embeddings": original_len}
    found = {key: value for key, value in found.items() if key not in harmless}
    return _understood(_held(found), config["max_position_embeddings"], can_be_partial)


def read_ropes_by_kind(config: ReadKeys, *, theta: float, window_theta: float) -> tuple[RopeKeys, float]:
    """RoPE of the layers that see everything, and the base of the angles, never stretched, of those with a window.

    Either as `rope_parameters` with a set for each kind of layer (transformers 5), or as `rope_theta`, `rope_scaling`
    and `rope_local_base_freq`. The context length is `max_position_embeddings`, which counts what scaling adds already.

    Args:
        theta: base where none is given.
        window_theta: the same of layers with a window.

    Raises:
        ConfigError: it is a kind that is not supported, or sets for other kinds of layers.
        KeyError, TypeError, ValidationError: a value is missing or of the wrong type.
    """
    full, window = (_set_of_kind(config, kind) for kind in ("full_attention", "sliding_attention"))
    scaling = _held(config.get("rope_scaling", {}))
    if any(full.get(key, value) != value for key, value in scaling.items()):
        raise ConfigError("rope_parameters and rope_scaling differ; keep the one that the model was trained with")
    full = {"rope_theta": config.get("rope_theta", theta)} | scaling | full
    window = {"rope_theta": config.get("rope_local_base_freq", window_theta)} | window
    trained_len: int = config["max_position_embeddings"]
    own = _understood(window, trained_len, can_be_partial=False)
    if own.scaling is not None:
        raise ConfigError(
            f"rope_parameters of sliding_attention ({shown(window)}) stretch angles; only default is known"
        )
    return _understood(full, trained_len, can_be_partial=False)._replace(context_len=trained_len), own.theta


def _set_of_kind(config: ReadKeys, kind: str) -> dict[str, Any]:
    """RoPE's parameters of one kind of layers; none where there is no set for each."""
    sets = config.get("rope_parameters", {})
    unknown = set(sets) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ConfigError(
            f"rope_parameters ({shown(sets)}) must hold a set for full_attention and one for sliding_attention"
        )
    return _held(sets.get(kind) or {})


def _held(found: dict[str, Any]) -> dict[str, Any]:
    """The keys that have values."""
    return {key: value for key, value in found.items() if value is not None}


def _understood(found: dict[str, Any], trained_len: int, can_be_partial: bool) -> RopeKeys:
    """What a set of RoPE's parameters says."""
    for key, value in found.items():
        check_kind(key, value)
    theta = found["rope_theta"]
    partial = found.get("partial_rotary_factor", 1)
    if partial != 1 and not can_be_partial:
        raise ConfigError(f"'partial_rotary_factor' is {shown(partial)}; only 1 is supported")
    kind = found.get("rope_type") or found.get("type") or "default"
    if kind == _DYNAMIC:
        kind, found = "default", {key: value for key, value in found.items() if key != "factor"}
    if kind != "default" and kind not in set(RopeScalingType):
        supported = ", ".join(["default", *RopeScalingType, _DYNAMIC])
        raise ConfigError(f"rope type {shown(kind)} is not supported; supported: {supported}")
    found = {key: value for key, value in found.items() if key != "max_position_embeddings" or value != trained_len}
    known = _KNOWN_UNSCALED if kind == "default" else _KNOWN_SCALED
    known = known if kind == RopeScalingType.YARN else known - {"attn_factor"}
    for key, value in found.items():
        if key not in known and value not in (None, 1):
            raise ConfigError(f"{key!r} ({shown(value)}) means nothing to RoPE of type {kind!r}; correct or remove it")
    if kind == "default":
        return RopeKeys(theta, None, trained_len, partial)
    fields = {key: found[key] for key in RopeScaling.model_fields if found.get(key) is not None}
    fields |= {"rope_type": kind}
    fields.setdefault("original_max_position_embeddings", trained_len)
    if kind == "longrope":
        fields.setdefault("factor", trained_len / fields["original_max_position_embeddings"])
    scaling = RopeScaling(**fields)
    return RopeKeys(theta, scaling, _stretched(trained_len, scaling), partial)


def _stretched(trained_len: int, scaling: RopeScaling) -> int:
    """Context length in tokens."""
    match scaling.rope_type:
        case RopeScalingType.LINEAR:
            return int(trained_len * scaling.factor)
        case RopeScalingType.YARN:
            original_len = scaling.original_max_position_embeddings or trained_len
            return max(trained_len, int(original_len * scaling.factor))
        case RopeScalingType.LLAMA3 | RopeScalingType.LONGROPE:
            return trained_len


def _rope_set(config: ReadKeys) -> dict[str, Any]:
    """RoPE's parameters, the same for all layers: `rope_parameters` (transformers 5) or `rope_scaling` (4).

    Raises:
        ConfigError: there are several.
    """
    given = [(key, value) for key in ("rope_parameters", "rope_scaling") if (value := config.get(key))]
    if not given:
        return {}
    name = given[0][0]
    found: dict[str, Any] = given[0][1]
    if not _agree([value for _, value in given]):
        raise ConfigError("rope_parameters and rope_scaling differ; keep the one that the model was trained with")
    sets = list(found.values())
    if not any(isinstance(item, dict) for item in sets):
        return found
    if any(item != sets[0] for item in sets):
        raise ConfigError(
            f"{name!r} differs by layer ({shown(found)}), which is not supported; use a checkpoint with one set"
        )
    return dict(sets[0])


def _agree(given: list[dict[str, Any]]) -> bool:
    """Whether both say the same; `rope_theta` may stand in one of them alone, and `type` is an older `rope_type`."""
    renamed = [
        {"rope_type" if key == "type" else key: value for key, value in found.items() if value is not None}
        for found in given
    ]
    thetas = [found.pop("rope_theta") for found in renamed if "rope_theta" in found]
    scalings = [{"rope_type": "default", **found} for found in renamed]
    return all(theta == thetas[0] for theta in thetas) and all(scaling == scalings[0] for scaling in scalings)
