"""`RouterIngress`: the router as Ray Serve starts it."""

import asyncio
import gc
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from deployments.api.routes import create_api
from deployments.config import AppConfig, LiveConfig
from deployments.observe.exposition import RouterFigures
from deployments.router.keys import ApiKey
from deployments.router.router import Router
from deployments.serve.engine_client import ServeEngineClient
from deployments.serve.router_peers import ServePeers
from llm.config import describe
from llm.errors import ConfigError

logger = logging.getLogger("ray.serve")

_LOOPBACK = "127.0.0.1"
_NODES_INTERVAL_S = 2.0


class RouterIngress:
    """A `Router` with its HTTP application, behind Ray Serve's HTTP front end.

    Args:
        config: the application's configuration, without keys.
        keys: those that clients may use.
        engines: handle of the `EngineReplica` deployment.
    """

    async def __init__(self, config: AppConfig, keys: Sequence[ApiKey], engines: Any) -> None:  # type: ignore[misc]
        # Asynchronous, so that it runs on the event loop of the requests: Ray Serve awaits it.
        # Actors without GPUs still see those of their node.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        self._keys = tuple(keys)
        self._router = Router(config, ServeEngineClient(engines), channel_host(config.token_channel.host), ServePeers())
        loop = asyncio.get_running_loop()
        self._banner = loop.create_task(self._announce())
        self._joining = None
        if config.token_channel.host == "auto" and self._router.channel_host == _LOOPBACK:
            self._joining = loop.create_task(self._open_channel_when_a_node_joins())

    def reconfigure(self, user_config: dict[str, Any] | None) -> None:
        """Take a `LiveConfig` without a restart; Ray Serve calls this with the deployment's `user_config`.

        Raises:
            ConfigError: it is none, in one line.
        """
        try:
            live = LiveConfig.model_validate(user_config or {})
        except ValidationError as error:
            raise ConfigError(f"user_config of Router: {describe(error)}") from error
        self._router.reconfigure(live)

    async def figures(self) -> RouterFigures:
        """This router's part of the metrics; the other routers ask for it."""
        return self._router.metrics.figures()

    def __serve_build_asgi_app__(self) -> Any:
        """Ray Serve serves what this returns."""
        api = create_api(self._router, self._keys)
        # A full collection holds up the event loop: what has been loaded by now stays, and is left out.
        gc.collect()
        gc.freeze()
        return api

    async def _open_channel_when_a_node_joins(self) -> None:
        """Replicas on a node that joins later could not reach loopback."""
        while await asyncio.to_thread(num_nodes) < 2:
            await asyncio.sleep(_NODES_INTERVAL_S)
        self._router.listen_on(node_address())

    async def _announce(self) -> None:
        info = await self._router.wait_until_ready()
        url = self._router.config.public_url or "http://127.0.0.1:8000"
        banner = ready_banner(url, info.model, info.max_seq_len, info.num_slots, bool(self._keys))
        # Past Serve's own redirection of sys.stdout, so that it reaches the terminal of `serve run` in every mode; and
        # not by print, which Serve makes print a tuple.
        if sys.__stdout__ is not None:
            sys.__stdout__.write(banner + "\n")
            sys.__stdout__.flush()


def channel_host(setting: str) -> str:
    """Address for the token channel: with `auto`, loopback while the cluster has one node."""
    if setting != "auto":
        return setting
    return node_address() if num_nodes() > 1 else _LOOPBACK


def num_nodes() -> int:
    """Nodes of the cluster that are alive."""
    import ray

    return sum(1 for node in ray.nodes() if node["Alive"])


def node_address() -> str:
    """Address by which other nodes reach this one."""
    import ray

    return str(ray.util.get_node_ip_address())


def ready_banner(url: str, model: str, max_seq_len: int, num_slots: int, needs_key: bool) -> str:
    """What to print when requests can be answered."""
    key = " -H 'Authorization: Bearer YOUR_KEY'" if needs_key else ""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "What is 17 + 25?"}}]}}'
    return (
        f"Rayline is ready: {url} (API description at {url}/docs)\n"
        f"  model {model}, context {max_seq_len} tokens, {num_slots} slots\n"
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'"
    )
