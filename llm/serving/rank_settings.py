"""What rank 0 tells the other ranks before the first step, as JSON."""

from typing import Any

import msgspec

from llm.serving.model_loading import ModelSource


class RankSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank loads, and how."""

    rank: int
    source: ModelSource
    config: dict[str, Any]
    """The engine's configuration."""
    store_path: str
    """Path by which the ranks find each other."""
    num_threads: int
    """Threads of each rank on a CPU."""


class RankCall(msgspec.Struct, frozen=True, kw_only=True):
    """A command: "size" asks how many pages there is room for, "build" makes the runner, "warm_up" prepares it, and
    "hold_adapters" reserves host memory for so many adapters."""

    name: str
    num_pages: int = 0
    context_len: int = 0
    num_places: int = 0
