"""Backends of paged attention, and the choice among them."""

import torch

from llm.attention.backends.reference import ReferenceBackend
from llm.attention.backends.sdpa import SdpaBackend
from llm.attention.paged import PagedAttentionBackend
from llm.errors import ConfigError

_BACKENDS: dict[str, type[PagedAttentionBackend]] = {"reference": ReferenceBackend, "sdpa": SdpaBackend}


def select_backend(name: str | None, device: torch.device) -> PagedAttentionBackend:
    """The backend called `name`, or the fastest one for `device` where `name` is None.

    Raises:
        ConfigError: no backend of that name.
    """
    del device  # sdpa runs everywhere; kernels for one device take their place here
    chosen = name or "sdpa"
    if chosen not in _BACKENDS:
        raise ConfigError(f"unknown attention_backend {chosen!r}; known: {', '.join(sorted(_BACKENDS))}")
    return _BACKENDS[chosen]()
