"""What rank 0 tells the other ranks before the first step, as JSON."""

from typing import Any

import msgspec
import torch


class RankSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank loads, and how."""

    rank: int
    directory: str
    config: dict[str, Any]
    """The engine's configuration."""
    device: str
    """Rank 0's device; those of the other ranks follow it."""
    dtype: str
    load_format: str
    lora: str | None
    store_path: str
    """Path by which the ranks find each other."""
    num_threads: int
    """Threads of each rank on a CPU."""

    @property
    def rank_device(self) -> torch.device:
        """Where this rank's part lives."""
        device = torch.device(self.device)
        return device if device.type != "cuda" else torch.device("cuda", (device.index or 0) + self.rank)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Type of its parameters."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


class RankCall(msgspec.Struct, frozen=True, kw_only=True):
    """A command: "size" asks how many pages there is room for, "build" makes the runner, "warm_up" prepares it, and
    "hold_adapters" reserves host memory for so many adapters."""

    name: str
    num_pages: int = 0
    context_len: int = 0
    num_places: int = 0
