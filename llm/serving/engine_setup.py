"""`EngineSetup`: a model and how an engine runs it, with the sizes that follow from both."""

from dataclasses import dataclass
from typing import Any

import torch

from llm.config import EngineConfig
from llm.core.paged_kv_cache import PagedKVCache
from llm.models.adapters import AdapterLayout
from llm.models.decoder import DecoderModel


@dataclass(frozen=True, slots=True)
class EngineSetup:
    """A model, or a rank's part of one, and how its engine runs it.

    Attributes:
        model: the model, on its device.
        config: the engine's configuration, the same on every rank.
        context_len: tokens of the longest sequence.
        adapters: what a slot of `max_adapters` adapters holds; None if requests cannot choose one.
    """

    model: DecoderModel
    config: EngineConfig
    context_len: int
    adapters: AdapterLayout | None = None

    @property
    def max_rows(self) -> int:
        """Rows that the scheduler hands out."""
        return self.config.batch_size(self.model.device.type)

    @property
    def max_tokens(self) -> int:
        """Most tokens of a step."""
        return self.config.token_budget(self.model.device.type)

    @property
    def table_len(self) -> int:
        """Pages of the longest sequence."""
        return -(-self.context_len // self.config.page_size)

    @property
    def num_snapshots(self) -> int:
        """Number of state snapshots, the same on every rank."""
        model = self.model
        return self.config.num_snapshots(model.device.type, model.config.state_bytes(model.dtype.itemsize))

    @property
    def kv_cache_dtype(self) -> torch.dtype:
        """Format of the pool's keys and values."""
        return torch.float8_e4m3fn if self.config.kv_cache_dtype == "fp8" else self.model.dtype

    @property
    def bytes_per_page(self) -> int:
        """Memory of a page in all layers of a group, in bytes."""
        return PagedKVCache.bytes_per_page(self.model.page_groups, **self._page_shape())

    @property
    def states_bytes(self) -> int:
        """Memory of the states of all rows and snapshots, in bytes."""
        return (self.max_rows + 1 + self.num_snapshots) * self.model.held.state_bytes(self.model.dtype.itemsize)

    @property
    def adapters_bytes(self) -> int:
        """Memory of the slots of adapters, in bytes."""
        if self.adapters is None:
            return 0
        return self.config.max_adapters * self.adapters.size * self.model.dtype.itemsize

    def make_kv_cache(self, num_pages: int) -> PagedKVCache:
        """Allocate the pool's memory on the model's device."""
        model = self.model
        return PagedKVCache(model.page_groups, num_pages=num_pages, device=model.device, **self._page_shape())

    def _page_shape(self) -> dict[str, Any]:
        model = self.model
        return {
            "page_size": self.config.page_size, "num_kv_heads": model.num_kv_heads, "head_dim": model.config.head_size,
            "has_values": model.config.latent is None, "dtype": self.kv_cache_dtype,
        }  # fmt: skip
