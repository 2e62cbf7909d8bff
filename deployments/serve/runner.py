"""A server with a Ray cluster of its own: `python -m deployments.serve.runner CONFIG EVENTS`.

`rayline serve` starts it and reads its events, one JSON object per line, from the file descriptor EVENTS. It runs
until SIGTERM, SIGINT or the end of its standard input; then it ends every open request before the cluster.
"""

import asyncio
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import msgspec

from deployments.config import resolve_paths
from deployments.serve.banner import Announcement, ready_banner
from deployments.serve.config_file import ServerConfig, check_model, read_config_file
from deployments.serve.engine_names import ENGINE_DEPLOYMENT
from deployments.serve.failures import failure_of, root_cause
from deployments.serve.processes import adopt_orphans, kill_descendants
from deployments.serve.resources import check_device, check_resources
from llm.errors import LLMError

ROUTER = "Router"

_POLL_S = 0.2
_END_REQUESTS_S = 2.0
"""How long open requests may take to be answered with the error that ends them."""
_FLUSH_S = 0.4
"""Time for the last bytes to get from the routers through the front end to the clients."""


class StartError(LLMError):
    """The server did not start; the message is the root cause."""


class Events:
    """Tells the process that started this one what is happening."""

    def __init__(self, descriptor: int) -> None:
        self._file = os.fdopen(descriptor, "w", buffering=1)

    def stage(self, text: str) -> None:
        """What is being done now."""
        self._tell(stage=text)

    def ready(self, banner: str) -> None:
        """Requests can be answered."""
        self._tell(ready=banner)

    def failed(self, message: str) -> None:
        """The server ends, for this reason."""
        self._tell(failed=message)

    def _tell(self, **event: str) -> None:
        with suppress(OSError):  # nobody reads anymore
            self._file.write(json.dumps(event) + "\n")


async def run_server(path: Path, events: Events) -> None:
    """Start Ray and Serve with a configuration file, and run until this process is told to stop.

    Raises:
        CheckpointError, ConfigError, StartError: it cannot be served; the message says why.
    """
    import ray

    server = read_config_file(path)
    events.stage("Checking the model")
    for config in server.apps.values():
        for entry in resolve_paths(config).entries:
            check_model(entry)
            check_device(entry)
    events.stage("Starting Ray")
    context = ray.init(address="local", namespace="serve", log_to_driver=True)
    check_resources(server.apps.values(), ray.cluster_resources())
    events.stage("Starting Ray Serve")
    _deploy(path)
    stop = _when_to_stop()
    starting = asyncio.ensure_future(_start(server, events))
    await asyncio.wait((starting, stop), return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        return
    handles, told = starting.result()
    for announcement in told:
        events.ready(ready_banner(server.front_end.url, announcement, _other_ports(context.dashboard_url)))
    await stop
    await _end_requests(handles)


def _other_ports(dashboard_url: str | None) -> dict[str, str]:
    """Lines of the banner that name the other ports in use."""
    rows = {"dashboard": f"http://{dashboard_url}"} if dashboard_url else {}
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
        statistics, metrics = (os.environ[f"RAY_SERVE_HAPROXY_{name}_PORT"] for name in ("STATS", "METRICS"))
        rows["HAProxy"] = f"statistics on ports {statistics} and {metrics} of every interface"
    return rows


def _deploy(path: Path) -> None:
    """Start Serve and hand it the file, as `serve run` does."""
    from ray.serve.scripts import cli

    try:
        cli.main(["run", str(path), "--non-blocking"], standalone_mode=False)
    except SystemExit:  # it has printed why
        raise StartError("Ray Serve did not start") from None


async def _start(server: ServerConfig, events: Events) -> tuple[list[Any], list[Announcement]]:
    """Wait until every application answers HTTP requests; returns handles of their routers and their announcements.

    Raises:
        StartError: one has failed.
    """
    from ray import serve

    shown = ""
    while True:
        status = serve.status()
        apps = {name: app for name, app in status.applications.items() if name in server.apps}
        for name, app in apps.items():
            cause = failure_of(app)
            if cause is not None:
                raise StartError(f"{name}: {cause}" if len(server.apps) > 1 else cause)
        if len(apps) == len(server.apps) and all(app.status == "RUNNING" for app in apps.values()):
            break
        if (stage := _stage(apps.values())) != shown:
            events.stage(stage)
            shown = stage
        await asyncio.sleep(_POLL_S)
    events.stage("Waiting for the first answer")
    handles = [serve.get_deployment_handle(ROUTER, name) for name in server.apps]
    told = [msgspec.msgpack.decode(await handle.announcement.remote(), type=Announcement) for handle in handles]
    async with httpx.AsyncClient(base_url=server.front_end.url, trust_env=False) as client:
        while not await _answers(client):
            await asyncio.sleep(_POLL_S)
    return handles, told


async def _answers(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/health", timeout=5)).status_code == 200
    except httpx.HTTPError:
        return False


def _stage(apps: Iterable[Any]) -> str:
    engines = [
        deployment.replica_states
        for app in apps
        for name, deployment in app.deployments.items()
        if name.startswith(ENGINE_DEPLOYMENT)
    ]
    total = sum(sum(states.values()) for states in engines)
    if not total:
        return "Starting the application"
    running = sum(states.get("RUNNING", 0) for states in engines)
    return f"Loading the model{'s' if len(engines) > 1 else ''} ({running} of {total} replicas)"


def _when_to_stop() -> "asyncio.Future[None]":
    """A future that is done on the first SIGTERM or SIGINT, or when the process that started this one is gone."""
    loop = asyncio.get_running_loop()
    stop = loop.create_future()

    def end() -> None:
        if not stop.done():
            stop.set_result(None)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    loop.add_reader(sys.stdin.fileno(), end)  # nobody writes there: it can only be the end of the input
    return stop


async def _end_requests(handles: Iterable[Any]) -> None:
    """Have all routers answer open requests with an error, and wait until the clients have it."""
    started = time.monotonic()
    calls = [handle.broadcast("end_requests", _END_REQUESTS_S) for handle in handles]
    for call in calls:
        with suppress(Exception):  # a router that does not answer has no streams to end
            await call.results_async(timeout_s=_END_REQUESTS_S + 0.5, return_exceptions=True)
    # On a busy machine, everything takes longer.
    await asyncio.sleep(max(_FLUSH_S, min(1.0, time.monotonic() - started)))


def main() -> None:
    """Run the server; every process it started ends with it."""
    path, events = Path(sys.argv[1]), Events(int(sys.argv[2]))
    adopt_orphans()
    exit_code = 1
    try:
        asyncio.run(run_server(path, events))
        exit_code = 0
    except LLMError as error:
        events.failed(str(error))
    except Exception as error:  # noqa: BLE001 - the edge of the process; -v shows all of it
        traceback.print_exc()
        events.failed(f"the server did not start ({type(error).__name__}: {root_cause(str(error))}); -v shows more")
    finally:
        # The cluster belongs only to this server: nothing in it has to be saved, and Serve's own shutdown takes 10 s.
        kill_descendants()
        os._exit(exit_code)


if __name__ == "__main__":
    main()
