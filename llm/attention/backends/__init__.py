"""Backends of paged attention, and the choice among them."""

import os
from importlib.util import find_spec

import torch

from llm.attention.backends.reference import ReferenceBackend
from llm.attention.backends.sdpa import SdpaBackend
from llm.attention.paged import PagedAttentionBackend
from llm.errors import ConfigError

TRITON = "triton"
"""Our own kernels, which run by `llm.models.kernel_operations` instead of a class here."""

_EAGER_BACKENDS: dict[str, type[PagedAttentionBackend]] = {"reference": ReferenceBackend, "sdpa": SdpaBackend}


def choose_backend(name: str | None, device: torch.device) -> str:
    """`name` if it runs on `device`, or the fastest backend there where it is None.

    Raises:
        ConfigError: no backend of that name, or not on this device.
    """
    has_triton = find_spec("triton") is not None and (
        device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    )
    check_known(name)
    if name is None:
        return TRITON if has_triton and device.type == "cuda" else "sdpa"
    if name == TRITON and not has_triton:
        raise ConfigError(f"attention_backend 'triton' needs a GPU and the triton package; {device} runs 'sdpa'")
    return name


def check_known(name: str | None) -> None:
    """See that there is a backend of this name, on whatever device; None stands for the fastest.

    Raises:
        ConfigError: there is none.
    """
    if name is not None and name != TRITON and name not in _EAGER_BACKENDS:
        raise ConfigError(f"unknown attention_backend {name!r}; known: {', '.join(sorted([*_EAGER_BACKENDS, TRITON]))}")


def make_backend(name: str) -> PagedAttentionBackend:
    """The eager backend called `name`, one that `choose_backend` returned and that is not "triton"."""
    return _EAGER_BACKENDS[name]()
