"""Reads what a config.json says about sliding windows."""

from llm.errors import ConfigError
from llm.models.config_keys import ReadKeys, shown


def read_windows(
    config: ReadKeys, *, has_switch: bool = False, pattern: int | None = None
) -> tuple[int | None, tuple[int, ...] | None]:
    """Sliding window in tokens, None for none, and the layers that have it, None for all.

    Args:
        has_switch: `use_sliding_window` turns it on, for the layers from `max_window_layers` on; for a family without
            this switch a window counts for every layer that `layer_types` does not exclude.
        pattern: without `layer_types`, every so-manieth layer has no window; None for none of them.

    Raises:
        ConfigError: the keys contradict one another.
    """
    window_size, is_on = config.get("sliding_window"), config.get("use_sliding_window")
    if is_on is False or (is_on is None and has_switch):
        window_size = None
    num_layers: int = config["num_hidden_layers"]
    kinds = config.get("layer_types")
    if kinds is None and pattern is not None:
        kinds = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(num_layers)]
    if kinds is not None:
        unknown = set(kinds) - {"full_attention", "sliding_attention"}
        if unknown or len(kinds) != num_layers:
            raise ConfigError(f"layer_types must hold {num_layers} of full_attention and sliding_attention; correct it")
        if "sliding_attention" in kinds and window_size is None:
            raise ConfigError("layer_types names sliding_attention, but there is no sliding_window; correct one")
    if window_size is None:
        return None, None
    if kinds is not None:
        layers = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    elif has_switch:
        layers = tuple(range(min(config.get("max_window_layers", num_layers), num_layers), num_layers))
    else:
        return window_size, None
    if not layers:
        return None, None
    return window_size, None if len(layers) == num_layers else layers


def refuse_windows(config: ReadKeys, family: str) -> None:
    """Check that the configuration of a family without sliding windows has no window that hides anything.

    Raises:
        ConfigError: there is one.
    """
    window_size, _ = read_windows(config)
    if window_size is not None and window_size < config["max_position_embeddings"]:
        raise ConfigError(
            f"'sliding_window' is {shown(window_size)}, which {family} does not have; remove it if the model was "
            "trained without it"
        )
