"""The slot pool's memory."""

from collections.abc import Sequence

import torch

from llm.core.page_groups import PageGroup, layers_per_page


class PagedKVCache:
    """Keys and values of every slot, in pages; in the activations' format or in 8 bits (E4M3), unscaled.

    Args:
        groups: of all layers with attention. The layers of a group have memory of their own; the first of one group
            shares its memory with the first of every other, and so forth, for a page belongs to one group at a time.
        has_values: whether values are kept beside keys; without them they are a part of the keys.

    Attributes:
        layers: by layer, (2, num_pages + 1, page_size, num_kv_heads, head_dim), keys first; or (1, …). The page
            behind the last, `scratch_page`, takes writes that nobody reads.
        group_of: by layer, the index of its group.
    """

    def __init__(
        self,
        groups: Sequence[PageGroup],
        *,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        has_values: bool = True,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        shape = (1 + has_values, num_pages + 1, page_size, num_kv_heads, head_dim)
        # Zeroed, for slots that no token was written to are read and masked, and 0 * NaN is NaN.
        memory = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers_per_page(groups))]
        places = {
            layer: (index, place) for index, group in enumerate(groups) for place, layer in enumerate(group.layers)
        }
        self.layers = {layer: memory[place] for layer, (_, place) in places.items()}
        self.group_of = {layer: index for layer, (index, _) in places.items()}
        self.num_groups = len(groups)
        self.page_size = page_size
        self.scratch_page = num_pages

    @staticmethod
    def bytes_per_page(
        groups: Sequence[PageGroup],
        *,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        has_values: bool = True,
    ) -> int:
        """Memory of one page in all layers of a group, in bytes."""
        return (1 + has_values) * layers_per_page(groups) * page_size * num_kv_heads * head_dim * dtype.itemsize
