"""API keys: whose each key is, and how much it may ask for."""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Self

import yaml
from pydantic import Field, SecretStr, TypeAdapter, ValidationError, field_validator, model_validator

from deployments.accounts_config import KeyLimits, Role
from deployments.config import AppConfig
from deployments.observe.usage_counts import OTHER, UNKNOWN
from deployments.unique_yaml import TWICE, load_yaml
from llm.errors import ConfigError

_YAML_SUFFIXES = (".yaml", ".yml", ".json")
RESERVED_NAMES = frozenset({UNKNOWN, OTHER})
"""Stand for requests without a known key, and for those of many keys together."""
_SHAPES = {
    "list_type": "must be a list with an entry for each key, such as `- {name: team, key_sha256: …}`",
    "model_type": "must have settings, such as `{name: team, key_sha256: …}`",
    "dict_type": "must have settings, such as `{name: team, key_sha256: …}`",
}
_DATE_AND_TIME = r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as routers know it.

    Attributes:
        name: whose it is, for fair shares; never the key itself.
        digest: SHA-256 of the key.
        limits: the limits of this key.
        role: what it may do besides using models.
        models: names of the models and adapters that it may use; empty for all.
        expires_at: when it stops being valid, in seconds since 1970; None for never.
    """

    name: str
    digest: bytes
    limits: KeyLimits = field(default_factory=KeyLimits)
    role: Role = Role.USER
    models: frozenset[str] = frozenset()
    expires_at: float | None = None

    def may_use(self, *names: str) -> bool:
        """Whether it may use a model that has these names."""
        return not self.models or not self.models.isdisjoint(names)

    def is_expired(self, now: float) -> bool:
        """Whether it is no longer valid.

        Args:
            now: seconds since 1970.
        """
        return self.expires_at is not None and now >= self.expires_at


class KeyEntry(KeyLimits):
    """One key of a YAML file. A limit that is left out comes from `limits.per_key`."""

    name: Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]{1,64}$")]
    key: SecretStr | None = None
    key_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Instead of the key itself: `printf %s "$KEY" | sha256sum`."""
    role: Role = Role.USER
    models: tuple[Annotated[str, Field(min_length=1, max_length=256)], ...] | None = None
    """Names of the models and adapters that it may use; None or none at all for every one."""
    expires_at: datetime | None = None
    """When it stops being valid; in UTC unless it says otherwise."""

    @field_validator("expires_at", mode="before")
    @classmethod
    def _check_time(cls, value: object) -> object:
        """Take only what names a moment: a number might be in any unit, and a day does not say which of its ends."""
        if value is None or isinstance(value, datetime):
            return value
        if not isinstance(value, str) or re.match(_DATE_AND_TIME, value) is None:
            raise ValueError("must be a date with a time, such as 2030-01-31T00:00:00Z")
        return value

    @field_validator("expires_at")
    @classmethod
    def _to_utc(cls, value: datetime | None) -> datetime | None:
        """The same moment in UTC, where it may fall into a year that there is not."""
        if value is None:
            return None
        try:
            return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
        except OverflowError:
            raise ValueError("must be in one of the years 1 to 9999 in UTC") from None

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if name in RESERVED_NAMES:
            raise ValueError(f"{name!r} stands for other requests in metrics; take another name")
        return name

    @model_validator(mode="after")
    def _check_key(self) -> Self:
        if (self.key is None) == (self.key_sha256 is None):
            raise ValueError("give exactly one of key and key_sha256")
        if self.key is not None and not self.key.get_secret_value().strip():
            raise ValueError("the key is empty")
        return self

    def api_key(self, defaults: KeyLimits) -> ApiKey:
        """What routers need to know about it.

        Raises:
            ConfigError: its limits contradict the defaults, or each other.
        """
        digest = bytes.fromhex(self.key_sha256) if self.key_sha256 else _digest(self.key)  # type: ignore[arg-type]
        own = self.model_dump(include=set(KeyLimits.model_fields), exclude_unset=True)
        limits = _checked(defaults.model_copy(update=own), f"API key {self.name!r}")
        return ApiKey(
            self.name,
            digest,
            limits,
            self.role,
            frozenset(self.models or ()),
            self.expires_at.timestamp() if self.expires_at is not None else None,
        )


_ENTRIES = TypeAdapter(list[KeyEntry])


@dataclass(frozen=True, slots=True)
class KeySource:
    """Where an application's keys come from. It travels to the routers, so it holds digests only.

    Attributes:
        fixed: keys from the configuration and from its environment variable.
        from_file: keys that the file held when the application was deployed.
        path: absolute path of the file; None for none.
        defaults: limits for keys that have none of their own.
        has_record: whether a record is kept of what keys use, so that budgets outlast a restart.
    """

    fixed: tuple[ApiKey, ...] = ()
    from_file: tuple[ApiKey, ...] = ()
    path: str | None = None
    defaults: KeyLimits = field(default_factory=KeyLimits)
    has_record: bool = True

    @property
    def keys(self) -> tuple[ApiKey, ...]:
        """Every key that clients may use."""
        return self.keys_with(self.from_file)

    def keys_with(self, from_file: Sequence[ApiKey]) -> tuple[ApiKey, ...]:
        """Every key that clients may use while these are in the file.

        Raises:
            ConfigError: two share a secret or a name, one is there twice with different settings, or one has a budget
                that a restart would forget.
        """
        keys = together(self.fixed, from_file)
        for key in keys:
            if key.limits.has_budget and not self.has_record:
                raise ConfigError(
                    f"API key {key.name!r} has a budget of tokens, which a restart would forget; set accounts.record, "
                    "for example to usage.jsonl, or leave out tokens_per_day and tokens_per_month"
                )
        return keys


def find_keys(config: AppConfig) -> KeySource:
    """Every key that clients may use, from the configuration, its file and its environment variable.

    Raises:
        ConfigError: the file or the variable is missing, holds no key, or is wrong; two entries share a key or a name;
            or limits contradict each other or need a record that is not kept.
    """
    secrets: list[SecretStr] = list(config.api_keys)
    if config.api_keys_env is not None:
        value = os.environ.get(config.api_keys_env, "")
        secrets += _nonempty(value.split(","), f"the environment variable {config.api_keys_env}")
    defaults = _checked(config.limits.per_key, "limits.per_key")
    from_file: tuple[ApiKey, ...] = ()
    path = None
    if config.api_keys_file is not None:
        # Not resolved: Kubernetes changes a mounted secret by pointing a link in the path to another directory.
        path = Path(config.api_keys_file).expanduser().absolute()
        from_file = parse_keys(path, read_file(path), defaults)
    has_record = config.accounts.record is not None or config.accounts.record_env is not None
    file = str(path) if path is not None else None
    source = KeySource(_unnamed(secrets, defaults), from_file, file, defaults, has_record)
    source.keys_with(from_file)
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
        ConfigError: two share a secret or a name, or one is there twice with different settings.
    """
    names: dict[str, ApiKey] = {}
    owners: dict[bytes, ApiKey] = {}
    for key in (*fixed, *from_file):
        same_name, same_key = names.setdefault(key.name, key), owners.setdefault(key.digest, key)
        if same_name.digest != key.digest:
            raise ConfigError(f"two API keys are named {key.name!r}; give each its own name")
        if same_key.name != key.name:
            raise ConfigError(f"{key.name!r} and {same_key.name!r} are the same API key; remove one of them")
        if same_key != key:
            raise ConfigError(f"the API key {key.name!r} is there twice, with different settings; remove one of them")
    return tuple(owners.values())


def _parse_entries(path: Path, text: str) -> list[KeyEntry]:
    try:
        found = load_yaml(text)
    except (
        yaml.YAMLError,
        RecursionError,
        ValueError,
        ArithmeticError,
        LookupError,
        AttributeError,
        TypeError,
    ) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" near line {mark.line + 1}" if mark is not None else ""
        why = ": a setting is there twice" if getattr(error, "problem", None) == TWICE else ""
        raise ConfigError(f"api_keys_file {path} is not valid YAML{place}{why}") from None
    try:
        entries = _ENTRIES.validate_python(found)
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
    message = _SHAPES.get(first["type"], message) if len(place) < 2 else message
    where = f"entry {place[0] + 1}" if place and isinstance(place[0], int) else "the file"
    return f"{where}: {'.'.join(map(str, place[1:]))}{': ' if place[1:] else ''}{message}"


def _checked(limits: KeyLimits, whose: str) -> KeyLimits:
    if limits.min_priority > limits.max_priority:
        raise ConfigError(f"{whose}: min_priority {limits.min_priority} is above max_priority {limits.max_priority}")
    return limits


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
