"""Settings for adapters that requests choose."""

from pydantic import Field

from llm.config.strict_model import StrictModel

MAX_RANK = 256
"""Largest rank that the kernels multiply with."""


class AdapterSettings(StrictModel):
    """How many low-rank adapters an engine holds for its requests, and where. `EngineConfig` has these fields too."""

    max_adapters: int = Field(default=0, ge=0, le=512)
    """Most adapters whose requests run at once: the device has memory for so many, each of rank `max_adapter_rank`.
    Requests for others wait. 0 for an engine whose requests cannot choose an adapter."""
    max_adapter_rank: int = Field(default=16, ge=1, le=MAX_RANK)
    """Largest rank of an adapter that requests choose. Memory on the device grows with it. Where a model
    is split over several GPUs, each holds its part of every adapter."""
    adapter_experts: bool = False
    """Whether adapters may be on the experts that routers choose among, on routers, and on the gates of shared experts.
    Every adapter then takes memory for all of a model's experts, usually many times that of its other projections;
    `rayline check` says how much. Models without experts ignore it."""
    adapter_host_gib: float = Field(default=4.0, gt=0, le=4096)
    """Memory of the host for adapters that were read before, in GiB, shared by all GPUs of an engine. The least
    recently used one is given up first."""
