"""Which layers share pages.

Layers that look equally far back form groups, each with page tables of its own, so that a windowed group keeps no more
than its window. A page holds some tokens' keys and values in all layers of one group. All groups have as many layers
where that comes out even, so every page has the same size and any group can take any page of one pool.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llm.config import ModelConfig

_MAX_GROUPS = 12
"""Each group is work for the host, which takes and names pages by group."""


@dataclass(frozen=True, slots=True)
class PageGroup:
    """Layers whose keys and values share pages.

    Attributes:
        window: tokens that each token attends to in these layers, itself included; None for all before it.
        layers: their indices, from 0.
    """

    window: int | None
    layers: tuple[int, ...]


def group_layers(windows: Sequence[int | None] | Mapping[int, int | None]) -> list[PageGroup]:
    """Groups of layers with these windows; those that see furthest come first.

    The groups' size is the one that leaves the fewest places in pages unused, and among those the largest.

    Args:
        windows: of every layer, or of those that have pages, by their index.
    """
    by_layer = windows if isinstance(windows, Mapping) else dict(enumerate(windows))
    counts = Counter(by_layer.values())
    sizes = range(min(counts.values()), 0, -1)
    few = [size for size in sizes if _num_groups(counts, size) <= max(_MAX_GROUPS, len(counts))]
    size = min(few, key=lambda size: _num_groups(counts, size) * size)
    groups = []
    for window in sorted(counts, key=lambda window: (window is not None, -(window or 0))):
        layers = [layer for layer, own in by_layer.items() if own == window]
        groups += [PageGroup(window, tuple(layers[i : i + size])) for i in range(0, len(layers), size)]
    return groups


def page_groups_of(config: ModelConfig) -> list[PageGroup]:
    """Which layers of a model share pages."""
    return group_layers({layer: config.layer_window(layer) for layer in config.attention_layers})


def layers_per_page(groups: Sequence[PageGroup]) -> int:
    """Layers whose keys and values a page holds."""
    return max(len(group.layers) for group in groups)


def _num_groups(counts: Counter[int | None], size: int) -> int:
    return sum(-(-count // size) for count in counts.values())
