"""Arguments of the application, as `serve_config.yaml` gives them: typed, bounded, checked before anything starts."""

from collections import Counter
from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field, SecretStr, model_validator

from deployments.accounts_config import AccountsConfig, KeyLimits
from deployments.api_config import CorsConfig, ResponsesConfig
from deployments.batches_config import BatchesConfig, resolve_store
from deployments.model_config import AdmissionConfig, ServedModelConfig, resolve_model
from llm.config import StrictModel
from llm.errors import ConfigError


class PolicyName(StrEnum):
    """How a router chooses among replicas."""

    COST = "cost"
    """The replica with the fewest tokens to compute, not counting those in its prefix cache."""
    POWER_OF_TWO = "power_of_two"
    """The less busy of two replicas drawn at random."""
    ROUND_ROBIN = "round_robin"
    """Each replica in turn."""


class RouterConfig(StrictModel):
    """The HTTP side."""

    num_replicas: int = Field(default=1, ge=1)
    num_cpus: float = Field(default=0.25, ge=0)
    """CPUs that Ray sets aside for each router. A busy router uses one core in full."""
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Custom Ray resources that each router takes, so that only nodes which offer them (`ray start --resources`) run
    routers: `{rayline_router: 0.001}` keeps routers off GPU nodes, which can then be scaled down. The accountant of
    several routers' limits takes 0.0001 of each, so offer more than the routers need."""
    max_ongoing_requests: int = Field(default=4096, ge=1)
    """Open HTTP requests of one router; streams count until their end. More get 503 with `Retry-After`."""
    max_surge_percent: int = Field(default=100, ge=0, le=100)
    """Routers that a rolling update may start before it removes old ones, in percent."""
    graceful_shutdown_timeout_s: float = Field(default=600.0, ge=0)
    max_resumes: int = Field(default=3, ge=0)
    """How often a request continues elsewhere after its replica died, failed or stalled; 0 turns failover off."""
    tokenizer_threads: int = Field(default=2, ge=1, le=64)
    policy: PolicyName = PolicyName.COST
    """How a replica is chosen for a request."""
    silence_timeout_s: float = Field(default=2.0, gt=0)
    """A replica that has not reported for this long (it reports ten times a second) gets no new requests."""
    stall_timeout_s: float = Field(default=15.0, gt=0)
    """After this time without a report, its streams continue elsewhere, if failover is on."""
    drain_after_s: float = Field(default=10.0, ge=0)
    """A replica that is being removed may finish its streams for this long; the rest continue elsewhere, if failover is
    on and there is another replica."""


class LiveConfig(StrictModel):
    """Settings that running routers accept without a restart: `user_config` of the deployment `Router`. Settings that
    are left out stay as in `args`."""

    admission: AdmissionConfig | None = None
    """Of all models but those in `admission_of`."""
    admission_of: dict[str, AdmissionConfig] = Field(default_factory=dict)
    """Of single models, by their names; of entries that share one, by what metrics call them."""
    max_resumes: int | None = Field(default=None, ge=0)
    silence_timeout_s: float | None = Field(default=None, gt=0)
    stall_timeout_s: float | None = Field(default=None, gt=0)
    drain_after_s: float | None = Field(default=None, ge=0)


class AwayPolicy(StrEnum):
    """What happens to requests of keys with limits while several routers cannot reach the accountant they share."""

    OPEN = "open"
    """Each router counts by itself, up to the whole limit."""
    CLOSED = "closed"
    """Beyond what a router holds in reserve, the answer is 503 with `Retry-After`."""


class LimitsConfig(StrictModel):
    """Bounds on what clients may do."""

    per_key: KeyLimits = KeyLimits()
    """Limits of each API key; `api_keys_file` can give a key limits of its own."""
    when_accountant_is_away: AwayPolicy = AwayPolicy.OPEN
    """What to do while the accountant is away, which counts for several routers what API keys use of their limits."""
    body_timeout_s: float = Field(default=30.0, gt=0)
    """Time to send a body; a client that takes longer gets 408."""
    send_timeout_s: float = Field(default=25.0, gt=0)
    """A client that reads nothing of its answer for this long, or up to a fifth longer, is cut off. Serve's proxy has
    its own time: see docs/operations.md."""
    max_body_bytes: int = Field(default=8 << 20, ge=1024)
    max_header_bytes: int = Field(default=64 << 10, ge=1024)
    """Total bytes of the path and of all header names and values."""
    max_choices: int = Field(default=128, ge=1, le=4096)
    """Maximum number of answers to one request: prompts times `n`."""
    max_stop_chars: int = Field(default=1024, ge=1)
    """Maximum length of one stop string, in characters."""


class TracingConfig(StrictModel):
    """OpenTelemetry traces of requests, sent by OTLP over HTTP."""

    endpoint: str | None = None
    """The collector's address for traces, such as `http://localhost:4318/v1/traces`; None for no traces."""
    sample_ratio: float = Field(default=1.0, ge=0, le=1)
    """Share of requests that are traced; a client's `traceparent` header decides for its own requests."""
    service_name: str = Field(default="rayline", min_length=1)


class ChannelConfig(StrictModel):
    """Where routers listen for tokens from the engine replicas."""

    host: str = Field(default="auto", min_length=1)
    """An address of the router's node; or `auto`: 127.0.0.1 while the cluster has one node, and the node's own address
    as well once another joins."""
    port: int = Field(default=0, ge=0, le=65535)
    """0 for any free port; a fixed one allows a single router per node."""


class PlatformConfig(StrictModel):
    """What concerns all models together: the routers, their API, and who may use it."""

    router: RouterConfig = RouterConfig()
    limits: LimitsConfig = LimitsConfig()
    accounts: AccountsConfig = AccountsConfig()
    cors: CorsConfig = CorsConfig()
    responses: ResponsesConfig = ResponsesConfig()
    batches: BatchesConfig = BatchesConfig()
    token_channel: ChannelConfig = ChannelConfig()
    tracing: TracingConfig = TracingConfig()
    prefix_cache_per_key: bool = False
    """Share cached prompts only among requests with the same API key, so that nobody can tell from the time to the
    first token what others have asked."""
    strict_fields: bool = False
    """Refuse requests that contain a field unknown to this server, with 400. Otherwise unknown fields are ignored and
    named in the answer's header `X-Rayline-Ignored`."""
    api_keys: tuple[SecretStr, ...] = ()
    """Keys that clients may use. If there is none here, in the file or in the variable, clients need no key.

    Ray Serve writes a config file's arguments to its log. In `serve_config.yaml`, use one of the next two instead."""
    api_keys_file: str | None = None
    """File with one key a line; or, if it ends in `.yaml`, a list of keys with `name`, `key` or `key_sha256`, and
    what each may do: see docs/platform.md. Every router follows the file; changes take effect within seconds."""
    api_keys_env: str | None = None
    """Environment variable with keys separated by commas; read when the application is deployed."""
    allow_open_without_keys: bool = False
    """Start without keys even where Serve's HTTP port is open to other machines."""
    allow_admin_without_keys: bool | None = None
    """If there are no keys, let everyone do what is for administrators, such as loading adapters. None for only where
    Serve's HTTP port is not open to other machines."""
    public_url: str | None = None
    """Address for the ready banner; None for this machine and Serve's HTTP port."""

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        if any(not key.get_secret_value().strip() for key in self.api_keys):
            raise ValueError("api_keys holds an empty key; remove it or give a real one")
        return self

    @model_validator(mode="after")
    def _check_batches(self) -> Self:
        if self.router.num_replicas > 1 and not self.batches.is_shared:
            raise ValueError("batches.store: several routers need a directory or a URL that they share, not memory://")
        return self


class AppConfig(PlatformConfig, ServedModelConfig):
    """All arguments of `build_app`. With a single model, its settings may stand here; otherwise they are in
    `models`."""

    models: tuple[ServedModelConfig, ...] = ()
    """The models to serve. If this is left out, there is one, with the settings of a model that stand at the top
    level."""

    @model_validator(mode="after")
    def _check_models(self) -> Self:
        beside = [name for name in ServedModelConfig.model_fields if name in self.model_fields_set]
        if self.models and beside:
            raise ValueError(f"{', '.join(beside)}: with `models`, settings of a model go into its entry there")
        if not self.models and self.weight is not None:
            raise ValueError("weight: it splits requests among entries of `models`; leave it out for a single model")
        if not self.models and "models" in self.model_fields_set:
            raise ValueError("models: it has no entry; add one, or leave it out to serve the demo model")
        if any("model" not in entry.model_fields_set for entry in self.models):
            raise ValueError("models: an entry does not say which `model` it serves")
        check_names(self.models)
        check_adapter_names(self.entries)
        return self

    @property
    def by_key(self) -> dict[str, ServedModelConfig]:
        """The settings of each model by a name that only this entry has; see `variant`."""
        return dict(zip(keys_of(self.entries), self.entries, strict=True))

    @property
    def entries(self) -> tuple[ServedModelConfig, ...]:
        """The settings of each model."""
        if self.models:
            return self.models
        own = {name: getattr(self, name) for name in ServedModelConfig.model_fields}
        return (ServedModelConfig.model_construct(self.model_fields_set & own.keys(), **own),)


def keys_of(entries: tuple[ServedModelConfig, ...]) -> list[str]:
    """A name for each entry that no other has: its model's, followed by its variant or its place among several."""
    keys: list[str] = []
    seen: Counter[str] = Counter()
    for entry in entries:
        name = entry.model_name
        seen[name] += 1
        variant = entry.variant or (str(seen[name]) if seen[name] > 1 else None)
        keys.append(name if variant is None else f"{name}:{variant}")
    return keys


def check_names(entries: tuple[ServedModelConfig, ...]) -> None:
    """Check that every name that clients may use stands for one model, or for entries that share its requests.

    Raises:
        ValueError: it does not; one line with the fix.
    """
    by_name: dict[str, list[ServedModelConfig]] = {}
    for entry in entries:
        by_name.setdefault(entry.model_name, []).append(entry)
    for name, sharing in by_name.items():
        if len(sharing) > 1 and any(entry.weight is None for entry in sharing):
            raise ValueError(
                f"models: {len(sharing)} entries have the name {name!r}; give each a `weight` to share its requests, "
                "or a `served_model_name` of its own"
            )
        if len(sharing) > 1 and not any(entry.weight for entry in sharing):
            raise ValueError(f"models: every entry with the name {name!r} has weight 0; one must get requests")
    uses = Counter(name for name, sharing in by_name.items() for name in {n for entry in sharing for n in entry.names})
    twice = [name for name, number in uses.items() if number > 1]
    if twice:
        raise ValueError(f"models: {twice[0]!r} is a name or alias of two models; each name must stand for one")
    same = [key for key, number in Counter(keys_of(entries)).items() if number > 1]
    if same:
        raise ValueError(f"models: two entries come to {same[0]!r} by name and variant; give each its own `variant`")


def check_adapter_names(entries: tuple[ServedModelConfig, ...]) -> None:
    """Check that the name of an adapter stands for nothing else.

    Raises:
        ValueError: it does; one line with the fix.
    """
    if not any(entry.adapters for entry in entries):
        return
    models = {name for entry in entries for name in entry.names}
    named: dict[str, str] = {}
    for entry in entries:
        for adapter in entry.adapters:
            if adapter.name in models:
                raise ValueError(f"adapters: {adapter.name!r} is the name of a model; give the adapter another name")
            if named.setdefault(adapter.name, entry.model_name) != entry.model_name:
                raise ValueError(f"adapters: two models have one named {adapter.name!r}; each name must stand for one")


def resolve_paths(config: AppConfig) -> AppConfig:
    """The same configuration with all paths made absolute; see `resolve_model` and `resolve_store`.

    Raises:
        ConfigError: the file of a chat template cannot be read, or two models come to the same name.
    """
    config = config.model_copy(update={"batches": resolve_store(config.batches)})
    if config.models:
        models = tuple(map(resolve_model, config.models))
        try:
            check_names(models)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return config.model_copy(update={"models": models})
    (resolved,) = map(resolve_model, config.entries)
    return config.model_copy(update={name: getattr(resolved, name) for name in ServedModelConfig.model_fields})


def without_secrets(config: AppConfig) -> AppConfig:
    """The same configuration without API keys and the record's address, for processes that need none."""
    return config.model_copy(update={"api_keys": (), "accounts": AccountsConfig()})
