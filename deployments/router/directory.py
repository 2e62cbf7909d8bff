"""`ModelDirectory`: the models that a router process serves, and which of them a request is for."""

import asyncio
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any, Protocol

from deployments.adapters.known import KnownAdapters
from deployments.config import AppConfig, LiveConfig, PlatformConfig
from deployments.fleet.engine_client import EngineClient
from deployments.observe.batch_metrics import batch_figures
from deployments.observe.exposition import RouterFigures, write_metrics
from deployments.observe.history import RouterHistory, describe
from deployments.observe.metrics import NoPeers, RouterPeers, key_figures
from deployments.observe.tracing import RequestTracer
from deployments.observe.usage_counts import without_keys
from deployments.router.access import Access
from deployments.router.canary import mark_of, share_out
from deployments.router.router import Router
from deployments.router.token_hub import TokenHub
from deployments.router.unnamed_adapters import UnnamedAdapters
from llm.errors import ConfigError
from llm.serving.schemas import AdapterRef

_MOST_ADAPTER_NAMES = 12
"""Names of adapters that the fleet page shows of each replica."""


class BatchesState(Protocol):
    """What runs batches."""

    def snapshot(self) -> dict[str, Any]:
        """What runs, and what has run."""
        ...


class ModelDirectory:
    """Owns a `Router` for each model, and what these share: the token channel, the keys, the traces.

    Create it on the event loop that it is to run on.

    Args:
        config: the application's configuration.
        clients: the engine replicas of each model, by the keys of `AppConfig.by_key`.
        channel_host: address to listen on for tokens.
        peers: the other routers of the deployment; None if there are none.
        access: who may ask for how much; None for no limits on anyone. Closed with the directory.
        adapters: the adapters that requests may choose; None for none. Started and closed with the directory.

    Raises:
        ConfigError: tracing is wanted and OpenTelemetry is not installed.
    """

    def __init__(
        self,
        config: AppConfig,
        clients: Mapping[str, EngineClient],
        channel_host: str = "127.0.0.1",
        peers: RouterPeers | None = None,
        access: Access | None = None,
        adapters: KnownAdapters | None = None,
    ) -> None:
        self.platform: PlatformConfig = config
        self.access = access or Access()
        self.adapters = adapters or KnownAdapters()
        self.adapters.start()
        self.started_at = int(time.time())
        self.is_shutting_down = False
        self._peers = peers or NoPeers()
        self.tracer = RequestTracer(config.tracing) if config.tracing.endpoint is not None else None
        self.hub = TokenHub(channel_host, config.token_channel.port)
        self.routers = tuple(
            Router(key, model, config, clients[key], self.hub, self._peers, self.tracer, self.access.meter)
            for key, model in config.by_key.items()
        )
        self._unnamed = UnnamedAdapters(self.adapters, self.routers, clients)
        self._unnamed.start()
        self.batches: BatchesState | None = None
        """What runs batches in this process; None if nothing does. Whoever makes it sets it."""
        self._by_name: dict[str, list[Router]] = {}
        for router in self.routers:
            self._by_name.setdefault(router.config.model_name, []).append(router)
        self._names = {name: router.config.model_name for router in self.routers for name in router.config.names}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the models, without their aliases."""
        return tuple(self._by_name)

    def find(self, name: str) -> tuple[Router, ...]:
        """The routers of the entries that share a name; several if one is a canary, none if there is no such model.

        Args:
            name: a model's name or one of its aliases.
        """
        return tuple(self._by_name.get(self._names.get(name, ""), ()))

    def model_name(self, name: str) -> str | None:
        """The name that answers and the record give a model, by any of its names; None if there is no such model."""
        return self._names.get(name)

    def names_of(self, name: str) -> tuple[str, ...]:
        """Every name of a model, by one of them; none if there is no such model."""
        return tuple(dict.fromkeys(each for router in self.find(name) for each in router.config.names))

    def pick(self, name: str, session: str, continued: str = "") -> Router | None:
        """The router for a request; None if there is no such model or adapter.

        Args:
            name: the model's name, one of its aliases, or the name of an adapter.
            session: requests with the same one go to the same entry of the name, as long as it answers.
            continued: an id that ends with the mark of the entry that made what is continued, if any; see `mark_of`.
        """
        entries = self.find(name) or self.with_adapter(name)
        made_it = [router for router in entries if continued.endswith(mark_of(router.key)) and router.can_answer]
        return made_it[0] if made_it else share_out(entries, session)

    def mark(self, router: Router) -> str:
        """The mark of a router's entry among several of its name; empty if it is the only one."""
        return mark_of(router.key) if len(self.find(router.config.model_name)) > 1 else ""

    def adapter(self, name: str, router: Router) -> AdapterRef | None:
        """What a router's engines need to know of the adapter that a request names; None if the name is a model's."""
        if self.find(name):
            return None
        found = next((adapter for adapter in self.adapters.find(name) if adapter.key == router.key), None)
        if found is None:
            return None
        return AdapterRef(name=found.name, path=found.path, digest=found.digest, origin=found.origin)

    def with_adapter(self, name: str) -> tuple[Router, ...]:
        """The routers of the entries that have an adapter of this name; none if there is no such adapter."""
        keys = {adapter.key for adapter in self.adapters.find(name)}
        return tuple(router for router in self.routers if router.key in keys)

    @property
    def is_ready(self) -> bool:
        """Whether any engine has reported what it is."""
        return any(router.is_ready for router in self.routers)

    @property
    def can_answer(self) -> bool:
        """Whether requests for at least one of the models are answered now."""
        return any(router.can_answer for router in self.routers)

    async def wait_for_own_versions(self) -> None:
        """Wait for replicas of this process's versions of the models; see `Router.wait_for_own_version`."""
        await asyncio.gather(*(router.wait_for_own_version() for router in self.routers))

    async def wait_until_ready(self) -> None:
        """Wait for the first engine of each model that is not allowed to sleep."""
        awake = [router for router in self.routers if router.config.replicas.fewest_replicas > 0]
        await asyncio.gather(*(router.wait_until_ready() for router in awake))

    def reconfigure(self, live: LiveConfig) -> None:
        """Use other settings from now on; see `Router.reconfigure`.

        Raises:
            ConfigError: they name a model that there is not.
        """
        keys = [router.key for router in self.routers]
        unknown = [key for key in live.admission_of if key not in keys]
        if unknown:
            raise ConfigError(f"user_config of Router: admission_of: there is no {unknown[0]!r}, but {', '.join(keys)}")
        for router in self.routers:
            router.reconfigure(live)

    def shut_down(self) -> None:
        """End all open requests with an error and refuse new ones: the server is about to stop."""
        self.is_shutting_down = True
        for router in self.routers:
            router.shut_down()

    @property
    def num_live(self) -> int:
        """Number of generations that run or wait."""
        return sum(router.journal.num_live for router in self.routers)

    def snapshot(self) -> dict[str, Any]:
        """State of this process and, as last reported, of the replicas of all models."""
        parts = {router.key: router.snapshot() for router in self.routers}
        return {
            "router": self._totals(),
            "batches": self.batches.snapshot() if self.batches is not None else None,
            "replicas": {name: replica for part in parts.values() for name, replica in part["replicas"].items()},
            "models": {
                router.key: {
                    "name": router.config.model_name,
                    "state": router.state,
                    "router": parts[router.key]["router"],
                    "replicas": list(parts[router.key]["replicas"]),
                }
                for router in self.routers
            },
        }

    def _totals(self) -> dict[str, Any]:
        """What the routers of all models count together."""
        counts = [router.counts() for router in self.routers]
        return {
            **{name: sum(each[name] for each in counts) for name in counts[0]},
            "channel": asdict(self.hub.counters),
            **self.access.snapshot(),
            **self.adapters.snapshot(),
        }

    def fleet_event(self) -> dict[str, Any]:
        """The current state for the fleet page: the process, each model with its replicas, and what happened."""
        records = [(router.key, router.record) for router in self.routers]
        return {
            "at": time.time(),
            "router_id": self._peers.router_id,
            "router": self._totals(),
            "batches": self.batches.snapshot() if self.batches is not None else None,
            "models": [self._with_adapters(router.fleet_event()) for router in self.routers],
            "events": _newest_first((key, event) for key, record in records for event in record.events.items()),
            "departures": _newest_first((key, left) for key, record in records for left in record.departures()),
        }

    def _with_adapters(self, model: dict[str, Any]) -> dict[str, Any]:
        """A model's part of the state, in which the adapters that its replicas hold have names."""
        replicas = {}
        for replica_id, replica in model["replicas"].items():
            names = self.adapters.names_of(replica["adapters"])
            told = {"num": len(replica["adapters"]), "names": names[:_MOST_ADAPTER_NAMES]}
            replicas[replica_id] = {**replica, "adapters": told}
        return {**model, "replicas": replicas}

    def figures(self) -> list[RouterFigures]:
        """This process's parts of the metrics: one for each model, and one for what concerns none."""
        own = [router.metrics.figures() for router in self.routers]
        shared = [key_figures(self._peers.router_id, self.access.snapshot(), self.access.meter.counts)]
        if self.batches is not None:
            shared.append(batch_figures(self._peers.router_id, self.batches.snapshot()))
        return [*own, *shared]

    async def metrics(self, *, shows_keys: bool = True) -> bytes:
        """The metrics of all routers and replicas in Prometheus' text format, whichever router is asked.

        Routers that do not answer are left out; nothing that is left out makes a counter fall, as each router's series
        carry its name.

        Args:
            shows_keys: whether to include the metrics that name API keys.
        """
        others = [one for one in await self._peers.figures() if one.router_id != self._peers.router_id]
        figures = [*self.figures(), *others]
        if not shows_keys:
            figures = [replace(one, families=without_keys(one.families)) for one in figures]
        return write_metrics(figures)

    def histories(self) -> list[RouterHistory]:
        """This process's parts of the last 15 minutes, one for each model."""
        return [router.history() for router in self.routers]

    async def fleet_history(self) -> dict[str, Any]:
        """The last 15 minutes as seen by all routers that answer; see `history.describe`."""
        others = [one for one in await self._peers.histories() if one.router_id != self._peers.router_id]
        return await asyncio.to_thread(describe, [*self.histories(), *others], time.time())

    def stop_following(self) -> None:
        """Stop looking for changes of keys and adapters; what is known stays as it is."""
        self.access.stop_following()
        self._unnamed.close()
        self.adapters.close()

    def close(self) -> None:
        """Stop listening."""
        self.stop_following()
        self.access.close()
        for router in self.routers:
            router.close()
        self.hub.close()
        if self.tracer is not None:
            self.tracer.close()


def _newest_first(items: Iterable[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """What happened to all models, each with its model's key."""
    return sorted(({**item, "model": key} for key, item in items), key=lambda item: item["at"], reverse=True)
