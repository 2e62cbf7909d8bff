"""Which adapters a model is served with, beside itself; a part of `ModelConfig`."""

import re
from typing import Self

from pydantic import Field, field_validator, model_validator

from llm.config import StrictModel

MAX_NAME_CHARS = 256


def check_adapter_name(name: str) -> str:
    """The name, if clients can use it as a request's `model`.

    Raises:
        ValueError: they cannot.
    """
    if not name or len(name) > MAX_NAME_CHARS or name != name.strip() or not name.isprintable():
        raise ValueError(
            f"an adapter's name has 1 to {MAX_NAME_CHARS} printable characters and no space at either end, "
            f"unlike {name[:80]!r}"
        )
    return name


class AdapterEntry(StrictModel):
    """An adapter that is served from the start."""

    name: str
    """The name that requests give as their `model`."""
    path: str = Field(min_length=1, max_length=4096)
    """Directory of a PEFT adapter, or a Hub id such as `org/name`, which routers download."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        return check_adapter_name(name)


class AdapterFields(StrictModel):
    """Which adapters requests for a model may choose. `ModelConfig` has these fields too."""

    adapters: tuple[AdapterEntry, ...] = ()
    """Adapters that requests may name as their `model`, each with `name` and `path`. They need `engine.max_adapters`,
    and their directories must be in the same place on the nodes of routers and replicas."""
    adapter_folder: str | None = Field(default=None, min_length=1)
    """A directory that is watched: each of its subdirectories that holds an `adapter_config.json` is an adapter of that
    name. New, changed and removed ones take effect within seconds."""
    adapter_roots: tuple[str, ...] = ()
    """Directories whose adapters administrators may load by `/v1/load_lora_adapter`, at any depth. Empty for none."""
    max_known_adapters: int = Field(default=1_000, ge=1, le=100_000)
    """Most adapters that requests may name, from all three of these sources together."""

    @field_validator("adapter_roots")
    @classmethod
    def _check_roots(cls, roots: tuple[str, ...]) -> tuple[str, ...]:
        if any(not re.match(r"[/~]", root) for root in roots):
            raise ValueError("adapter_roots holds a relative path; give absolute ones")
        return roots

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = [entry.name for entry in self.adapters]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"adapters has two entries named {twice!r}; give one of them another name")
        if len(names) > self.max_known_adapters:
            raise ValueError(f"adapters has {len(names)} entries; raise max_known_adapters to at least that")
        return self

    @property
    def names_adapters(self) -> bool:
        """Whether any adapter can be served."""
        return bool(self.adapters or self.adapter_folder or self.adapter_roots)
