"""`RouterIngress`: the router that Ray Serve starts."""

import asyncio
import gc
import logging
import os
import sys
import time
from typing import Any

import msgspec
from pydantic import ValidationError

from deployments.adapters.known import KnownAdapters
from deployments.api.application import create_api
from deployments.api.in_process_calls import create_runner
from deployments.api.openai.response_store import ResponseStore, own_store
from deployments.api.upgrades import decline_upgrades
from deployments.batches.desk import own_desk
from deployments.batches.runner import BatchRunner
from deployments.config import AppConfig, LiveConfig
from deployments.observe.exposition import RouterFigures
from deployments.observe.history import RouterHistory
from deployments.observe.terminal import show_warnings
from deployments.router.access import Access
from deployments.router.directory import ModelDirectory
from deployments.router.keys import KeySource
from deployments.router.meter import Meter
from deployments.serve.accountant import ServeAccountantClient, ServeLedgerClient
from deployments.serve.adapter_catalog import ServeCatalogClient
from deployments.serve.banner import AnnouncedModel, Announcement, ready_banner
from deployments.serve.engine_client import ServeEngineClient
from deployments.serve.following import Following
from deployments.serve.response_store import ServeResponseStore
from deployments.serve.router_peers import ServePeers
from deployments.usage.place import RecordPlace
from llm.config import describe
from llm.errors import ConfigError

logger = logging.getLogger("ray.serve")

_LOOPBACK = "127.0.0.1"
_NODES_INTERVAL_S = 2.0
_END_INTERVAL_S = 0.02


class RouterIngress(Following):
    """A `Router` with its HTTP application, behind Ray Serve's HTTP front end.

    Args:
        config: the application's configuration, without keys.
        keys: where the clients' API keys come from.
        engines: handles of the deployments with engine replicas, by the keys of `AppConfig.by_key`.
        accountant: handle of the `Accountant` deployment; None if there is none.
        store: handle of the `ResponseStore` deployment; None if this router keeps responses itself.
        place: where the record of usage is.
        catalog: handle of the `AdapterCatalog` deployment; None if no model takes adapters.
    """

    async def __init__(  # type: ignore[misc]
        self,
        config: AppConfig,
        keys: KeySource,
        engines: dict[str, Any],
        accountant: Any = None,
        store: Any = None,
        place: RecordPlace | None = None,
        catalog: Any = None,
    ) -> None:
        # Asynchronous, so that it runs on the requests' event loop: Ray Serve awaits it.
        # Actors without GPUs still see those of their node.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        show_warnings()
        decline_upgrades()  # where clients reach the routers without Serve's proxy
        shared = ServeAccountantClient(accountant) if accountant is not None else None
        ledger = ServeLedgerClient(accountant) if accountant is not None else None
        when_away = config.limits.when_accountant_is_away
        self._batches: BatchRunner | None = None
        self._desk = own_desk(config.batches)
        self._directory = ModelDirectory(
            config,
            {key: ServeEngineClient(handle) for key, handle in engines.items()},
            channel_host(config.token_channel.host),
            ServePeers(),
            Access(keys, shared, when_away, meter=Meter(place, ledger, when_away)),
            KnownAdapters(ServeCatalogClient(catalog) if catalog is not None else None),
        )
        self.until_the_end(self._directory.stop_following)
        self._store: ResponseStore | None = (
            ServeResponseStore(store) if store is not None else own_store(config.responses)
        )
        await self._directory.wait_for_own_versions()
        await self._directory.adapters.wait_until_settled()
        loop = asyncio.get_running_loop()
        self._banner = loop.create_task(self._print_banner())
        self._joining = None
        if config.token_channel.host == "auto" and self._directory.hub.host == _LOOPBACK:
            self._joining = loop.create_task(self._open_channel_when_a_node_joins())

    def reconfigure(self, user_config: dict[str, Any] | None) -> None:
        """Take a `LiveConfig` without a restart; Ray Serve calls this with the deployment's `user_config`.

        Raises:
            ConfigError: it is not a valid one; the message is one line.
        """
        try:
            live = LiveConfig.model_validate(user_config or {})
        except ValidationError as error:
            raise ConfigError(f"user_config of Router: {describe(error)}") from error
        self._directory.reconfigure(live)

    async def figures(self) -> list[RouterFigures]:
        """This router's parts of the metrics; the other routers ask for them."""
        return self._directory.figures()

    async def histories(self) -> list[RouterHistory]:
        """What this router saw of each model in the last 15 minutes; the other routers ask for it."""
        return self._directory.histories()

    def __serve_build_asgi_app__(self) -> Any:
        """Return the ASGI application that Ray Serve serves."""
        api = create_api(self._directory, self._store, self._desk)
        if self._desk is not None:
            self._batches = create_runner(self._desk, api, self._directory)
            self._batches.start()
        # A full collection blocks the event loop; objects loaded by now stay and are excluded from it.
        gc.collect()
        gc.freeze()
        return api

    async def announcement(self) -> bytes:
        """An encoded `Announcement`; waits for an engine of each model that may not be scaled to zero."""
        await self._directory.wait_until_ready()
        return msgspec.msgpack.encode(self._announce())

    async def end_requests(self, timeout_s: float) -> int:
        """Take no new requests and end all open ones with an error, as the server is about to stop.

        Returns how many generations are still open: 0, unless it takes longer than `timeout_s`.
        """
        if self._batches is not None:
            await self._batches.stop()  # another router can go on with them
        self._directory.shut_down()
        deadline = time.monotonic() + timeout_s
        while self._directory.num_live and time.monotonic() < deadline:
            await asyncio.sleep(_END_INTERVAL_S)
        return self._directory.num_live

    async def _open_channel_when_a_node_joins(self) -> None:
        """Replicas on a node that joins later could not reach loopback."""
        while await asyncio.to_thread(num_nodes) < 2:
            await asyncio.sleep(_NODES_INTERVAL_S)
        self._directory.hub.listen_on(node_address())

    def _announce(self) -> Announcement:
        models = [
            AnnouncedModel(router.key, router.config.model_name, router.config.replicas.fewest_replicas, router.info)
            for router in self._directory.routers
        ]
        return Announcement(models, self._directory.access.needs_key)

    async def _print_banner(self) -> None:
        await self._directory.wait_until_ready()
        url = self._directory.platform.public_url or "http://127.0.0.1:8000"
        banner = ready_banner(url, self._announce())
        # This bypasses Serve's own redirection of sys.stdout, so that the text reaches the terminal of `serve run` in
        # every mode. It does not use print, which under Serve prints a tuple.
        if sys.__stdout__ is not None:
            sys.__stdout__.write(banner + "\n")
            sys.__stdout__.flush()


def channel_host(setting: str) -> str:
    """Address for the token channel: with `auto`, loopback while the cluster has one node."""
    if setting != "auto":
        return setting
    return node_address() if num_nodes() > 1 else _LOOPBACK


def num_nodes() -> int:
    """Number of the cluster's nodes that are alive."""
    import ray

    return sum(1 for node in ray.nodes() if node["Alive"])


def node_address() -> str:
    """Address by which other nodes reach this one."""
    import ray

    return str(ray.util.get_node_ip_address())
