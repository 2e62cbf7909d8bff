"""The slot pool's memory: one tensor a layer."""

import torch


class PagedKVCache:
    """Keys and values of every slot, in pages; in the activations' format or in 8 bits (E4M3), unscaled.

    Attributes:
        layers: for each layer (2, num_pages + 1, page_size, num_kv_heads, head_dim), keys first. The page behind the
            last, `scratch_page`, takes writes that nobody reads.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        shape = (2, num_pages + 1, page_size, num_kv_heads, head_dim)
        # Zeroed, for slots that no token was written to are read and masked, and 0 * NaN is NaN.
        self.layers = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(num_layers)]
        self.page_size = page_size
        self.scratch_page = num_pages

    @staticmethod
    def bytes_per_page(*, num_layers: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Memory of one page in all layers, in bytes."""
        return 2 * num_layers * page_size * num_kv_heads * head_dim * dtype.itemsize
