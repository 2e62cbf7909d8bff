"""API keys: whose each is, and how much it may ask for."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Self

import yaml
from pydantic import Field, SecretStr, TypeAdapter, ValidationError, model_validator

from deployments.config import AppConfig, KeyLimits
from llm.config import describe
from llm.errors import ConfigError

_YAML_SUFFIXES = (".yaml", ".yml", ".json")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as routers know it.

    Attributes:
        name: whose it is, for fair shares; never the key.
        digest: SHA-256 of the key.
        limits: of this key.
    """

    name: str
    digest: bytes
    limits: KeyLimits = field(default_factory=KeyLimits)


class KeyEntry(KeyLimits):
    """One key of a YAML file. A limit that is left out is that of `limits.per_key`."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    key: SecretStr | None = None
    key_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Instead of the key itself: `printf %s "$KEY" | sha256sum`."""

    @model_validator(mode="after")
    def _check_key(self) -> Self:
        if (self.key is None) == (self.key_sha256 is None):
            raise ValueError("give exactly one of key and key_sha256")
        if self.key is not None and not self.key.get_secret_value().strip():
            raise ValueError("the key is empty")
        return self

    def api_key(self, defaults: KeyLimits) -> ApiKey:
        """What routers need to know of it."""
        digest = bytes.fromhex(self.key_sha256) if self.key_sha256 else _digest(self.key)  # type: ignore[arg-type]
        own = self.model_dump(include=set(KeyLimits.model_fields), exclude_unset=True)
        return ApiKey(self.name, digest, defaults.model_copy(update=own))


def load_keys(config: AppConfig) -> tuple[ApiKey, ...]:
    """Every key that clients may use, from the configuration, its file and its environment variable.

    Raises:
        ConfigError: the file or the variable is not there, holds no key, or is wrong; two entries share a key or name.
    """
    keys: list[SecretStr] = list(config.api_keys)
    entries: list[KeyEntry] = []
    if config.api_keys_file is not None:
        path = Path(config.api_keys_file).expanduser()
        if path.suffix in _YAML_SUFFIXES:
            entries = _read_entries(path)
        else:
            keys += _nonempty(_read(path).splitlines(), f"api_keys_file {path}")
    if config.api_keys_env is not None:
        value = os.environ.get(config.api_keys_env, "")
        keys += _nonempty(value.split(","), f"the environment variable {config.api_keys_env}")
    defaults = config.limits.per_key
    # The digest tells them apart without telling the key.
    loaded = [ApiKey(f"key-{_digest(key).hex()[:8]}", _digest(key), defaults) for key in keys]
    loaded += [entry.api_key(defaults) for entry in entries]
    _check_distinct(loaded)
    return tuple({key.digest: key for key in loaded}.values())


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"api_keys_file {path} cannot be read: {error}") from error


def _read_entries(path: Path) -> list[KeyEntry]:
    try:
        entries = TypeAdapter(list[KeyEntry]).validate_python(yaml.safe_load(_read(path)))
    except yaml.YAMLError as error:  # its message would show lines, so keys
        mark = getattr(error, "problem_mark", None)
        place = f" near line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"api_keys_file {path} is not valid YAML{place}") from None
    except ValidationError as error:
        raise ConfigError(f"api_keys_file {path}: {describe(error)}") from None
    if not entries:
        raise ConfigError(f"api_keys_file {path} holds no key; put one in, or remove the setting to serve without keys")
    return entries


def _check_distinct(keys: Sequence[ApiKey]) -> None:
    names: dict[str, bytes] = {}
    owners: dict[bytes, str] = {}
    for key in keys:
        if names.setdefault(key.name, key.digest) != key.digest:
            raise ConfigError(f"two API keys are named {key.name!r}; give each its own name")
        if owners.setdefault(key.digest, key.name) != key.name:
            raise ConfigError(f"{key.name!r} and {owners[key.digest]!r} are the same API key; remove one of them")


def _nonempty(items: list[str], source: str) -> list[SecretStr]:
    keys = [SecretStr(item.strip()) for item in items if item.strip()]
    if not keys:
        raise ConfigError(f"{source} holds no key; put one in, or remove the setting to serve without keys")
    return keys


def _digest(key: SecretStr) -> bytes:
    return hashlib.sha256(key.get_secret_value().strip().encode()).digest()
