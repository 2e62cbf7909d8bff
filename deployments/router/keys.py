"""API keys: whose each key is, and how much it may ask for."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Self

import yaml
from pydantic import Field, SecretStr, TypeAdapter, ValidationError, model_validator

from deployments.config import AppConfig, KeyLimits
from llm.errors import ConfigError

_YAML_SUFFIXES = (".yaml", ".yml", ".json")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as routers know it.

    Attributes:
        name: whose it is, for fair shares; never the key itself.
        digest: SHA-256 of the key.
        limits: the limits of this key.
    """

    name: str
    digest: bytes
    limits: KeyLimits = field(default_factory=KeyLimits)


class KeyEntry(KeyLimits):
    """One key of a YAML file. A limit that is left out comes from `limits.per_key`."""

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
        """What routers need to know about it."""
        digest = bytes.fromhex(self.key_sha256) if self.key_sha256 else _digest(self.key)  # type: ignore[arg-type]
        own = self.model_dump(include=set(KeyLimits.model_fields), exclude_unset=True)
        return ApiKey(self.name, digest, defaults.model_copy(update=own))


_ENTRIES = TypeAdapter(list[KeyEntry])


@dataclass(frozen=True, slots=True)
class KeySource:
    """Where an application's keys come from. It travels to the routers, so it holds digests only.

    Attributes:
        fixed: keys from the configuration and from its environment variable.
        from_file: keys that the file held when the application was deployed.
        path: absolute path of the file; None for none.
        defaults: limits for keys that have none of their own.
    """

    fixed: tuple[ApiKey, ...] = ()
    from_file: tuple[ApiKey, ...] = ()
    path: str | None = None
    defaults: KeyLimits = field(default_factory=KeyLimits)

    @property
    def keys(self) -> tuple[ApiKey, ...]:
        """Every key that clients may use."""
        return together(self.fixed, self.from_file)


def find_keys(config: AppConfig) -> KeySource:
    """Every key that clients may use, from the configuration, its file and its environment variable.

    Raises:
        ConfigError: the file or the variable is missing, holds no key, or is wrong; or two entries share a key or a
            name.
    """
    secrets: list[SecretStr] = list(config.api_keys)
    if config.api_keys_env is not None:
        value = os.environ.get(config.api_keys_env, "")
        secrets += _nonempty(value.split(","), f"the environment variable {config.api_keys_env}")
    defaults = config.limits.per_key
    from_file: tuple[ApiKey, ...] = ()
    path = None
    if config.api_keys_file is not None:
        # Not resolved: Kubernetes changes a mounted secret by pointing a link in the path to another directory.
        path = Path(config.api_keys_file).expanduser().absolute()
        from_file = parse_keys(path, read_file(path), defaults)
    source = KeySource(_unnamed(secrets, defaults), from_file, str(path) if path is not None else None, defaults)
    together(source.fixed, source.from_file)
    return source


def read_file(path: Path) -> bytes:
    """The bytes of a file with keys.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"api_keys_file {path} cannot be read: {error.strerror or type(error).__name__}") from None


def parse_keys(path: Path, content: bytes, defaults: KeyLimits) -> tuple[ApiKey, ...]:
    """The keys in a file. No error message repeats any of its content.

    Raises:
        ConfigError: it holds no key, or is wrong.
    """
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise ConfigError(f"api_keys_file {path} is not UTF-8") from None
    if path.suffix in _YAML_SUFFIXES:
        return together((), tuple(entry.api_key(defaults) for entry in _parse_entries(path, text)))
    return _unnamed(_nonempty(text.splitlines(), f"api_keys_file {path}"), defaults)


def together(fixed: Sequence[ApiKey], from_file: Sequence[ApiKey]) -> tuple[ApiKey, ...]:
    """All keys, each once.

    Raises:
        ConfigError: two share a secret or a name.
    """
    keys = (*fixed, *from_file)
    names: dict[str, bytes] = {}
    owners: dict[bytes, str] = {}
    for key in keys:
        if names.setdefault(key.name, key.digest) != key.digest:
            raise ConfigError(f"two API keys are named {key.name!r}; give each its own name")
        if owners.setdefault(key.digest, key.name) != key.name:
            raise ConfigError(f"{key.name!r} and {owners[key.digest]!r} are the same API key; remove one of them")
    return tuple({key.digest: key for key in keys}.values())


def _parse_entries(path: Path, text: str) -> list[KeyEntry]:
    try:
        # The parser in C takes a tenth of the time, during which a router's event loop waits for its thread.
        entries = _ENTRIES.validate_python(yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" near line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"api_keys_file {path} is not valid YAML{place}") from None
    except ValidationError as error:
        raise ConfigError(f"api_keys_file {path}: {_describe(error)}") from None
    if not entries:
        raise ConfigError(f"api_keys_file {path} holds no key; put one in, or remove the setting to serve without keys")
    return entries


def _describe(error: ValidationError) -> str:
    """The first thing that is wrong, without quoting the content: a key may be anywhere in it."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = [part for part in first["loc"] if isinstance(part, int) or part in KeyEntry.model_fields]
    message = first["msg"].removeprefix("Value error, ")
    if message.startswith("unknown key"):
        message = f"a setting is unknown; known are {', '.join(KeyEntry.model_fields)}"
    where = f"entry {place[0] + 1}" if place and isinstance(place[0], int) else "it"
    return f"{where}: {'.'.join(map(str, place[1:]))}{': ' if place[1:] else ''}{message}"


def _unnamed(secrets: Sequence[SecretStr], defaults: KeyLimits) -> tuple[ApiKey, ...]:
    """Keys named by their digest, which distinguishes them without revealing the key."""
    keys = (ApiKey(f"key-{_digest(secret).hex()[:8]}", _digest(secret), defaults) for secret in secrets)
    return together((), tuple(keys))


def _nonempty(items: list[str], source: str) -> list[SecretStr]:
    keys = [SecretStr(item.strip()) for item in items if item.strip()]
    if not keys:
        raise ConfigError(f"{source} holds no key; put one in, or remove the setting to serve without keys")
    return keys


def _digest(key: SecretStr) -> bytes:
    return hashlib.sha256(key.get_secret_value().strip().encode()).digest()
