"""The fleet under test: Ray and Ray Serve on this machine, and the processes of its replicas."""

import asyncio
import contextlib
import itertools
import os
import random
import signal
import socket
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

from chaos.streams import Clients
from deployments.api.send_timeout import PROXY_VARIABLES
from deployments.serve.front_end import FrontEnd
from deployments.serve.haproxy import haproxy_environment
from deployments.serve.ports import claimed_ports

ROOT = Path(__file__).parent.parent
_numbers = itertools.count(1)
_deploying = threading.Lock()
"""Ray Serve deploys from one thread at a time."""


def emulated(num_replicas: int, tokens_per_s: float = 50.0, **changes: Any) -> dict[str, Any]:
    """Arguments of an application whose engines make letters, 64 streams each."""
    return {
        "model": str(ROOT / "configs" / "demo"),
        "engine_kind": "emulated",
        "engine": {"max_batch_size": 64, "num_pages": 8192},
        "emulation": {"tokens_per_s": tokens_per_s, "max_seq_len": 4096},
        "replicas": {"num_replicas": num_replicas, "num_cpus": 0.1, "graceful_shutdown_timeout_s": 30},
        "router": {"num_cpus": 0.1},
        **changes,
    }


def free_port() -> int:
    """A port of this machine that nobody uses at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def cluster(num_gpus: int = 0, *, haproxy: bool = False) -> Iterator[str]:
    """Ray and Serve, started here and ended here; gives the address of Serve's front end.

    Args:
        num_gpus: GPUs that Ray counts, whether they exist or not.
        haproxy: HAProxy in front, not Serve's own proxy. Decided when Ray is first imported.
    """
    port = free_port()
    with (
        tempfile.TemporaryDirectory(prefix="rayline-") as directory,
        claimed_ports(FrontEnd("127.0.0.1", port), haproxy=haproxy) as ports,
    ):
        if haproxy:
            os.environ.update(haproxy_environment(Path(directory)), RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S="1")
        os.environ.update({**PROXY_VARIABLES, **ports})
        with _ray_and_serve(num_gpus, port) as front_end:
            yield front_end


@contextlib.contextmanager
def _ray_and_serve(num_gpus: int, port: int) -> Iterator[str]:
    import ray
    from ray import serve

    ray.init(num_cpus=8, num_gpus=num_gpus, include_dashboard=False, log_to_driver=False, namespace="serve",
             address="local", logging_level="ERROR")  # fmt: skip
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


class Fleet:
    """One application on the cluster, and ways to hurt it.

    Args:
        front_end: address of Serve's front end.
        name: of the application, and its path.

    Attributes:
        url: where it answers.
        name: of the application in Serve.
        path: below the front end's address.
        args: what it was deployed with last.
    """

    def __init__(self, front_end: str, name: str) -> None:
        self.args: dict[str, Any] = {}
        name = f"{name}-{next(_numbers)}"  # the one before may not be gone yet
        self.name = f"chaos-{os.getpid()}-{name}"
        self.path = f"/{name}"
        self.url = f"{front_end}{self.path}"

    def deploy(self, args: dict[str, Any]) -> None:
        """Start it, or bring it to other arguments; returns when Serve says that it runs."""
        import logging

        from ray import serve

        from deployments.app import build_app
        from deployments.config import AppConfig

        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        self.args = args
        with _deploying:
            serve.run(build_app(AppConfig.model_validate(args)), name=self.name, route_prefix=self.path)

    @property
    def num_replicas(self) -> int:
        """Engine replicas that it was deployed with."""
        return int(self.args["replicas"]["num_replicas"])

    def delete(self, *, wait: bool = True) -> None:
        """Take it away, which goes on for some seconds whether one waits for it or not."""
        from ray import serve

        serve.delete(self.name, _blocking=wait)

    def replica_pids(self) -> list[int]:
        """Processes of its engine replicas."""
        return pids_of(f"ray::ServeReplica:{self.name}:EngineReplica")

    def router_pids(self) -> list[int]:
        """Processes of its routers."""
        return pids_of(f"ray::ServeReplica:{self.name}:Router")

    def hurt_one(self, how: signal.Signals) -> int:
        """Send a signal to one of its replicas; returns the process."""
        pid = random.choice(self.replica_pids())
        os.kill(pid, how)
        return pid

    async def wait_for(
        self,
        clients: Clients,
        condition: Callable[[dict[str, Any]], bool],
        timeout_s: float,
        what: str,
        answer_timeout_s: float = 5,
    ) -> float:
        """Wait until `condition` holds for `/rayline/stats`; returns the seconds that it took.

        Args:
            clients: ask for it.
            condition: of what they get.
            timeout_s: for all.
            what: it waits for, for people.
            answer_timeout_s: for one answer; then it asks again, another router perhaps.

        Raises:
            TimeoutError: it does not.
        """
        started = time.monotonic()
        while True:
            with contextlib.suppress(Exception):  # the server may be what has just been hurt
                if condition(await asyncio.wait_for(clients.get("/rayline/stats"), answer_timeout_s)):
                    return time.monotonic() - started
            if time.monotonic() - started > timeout_s:
                raise TimeoutError(f"{what} within {timeout_s:g} s")
            await asyncio.sleep(0.05)

    async def wait_until_serving(self, clients: Clients, num_replicas: int, timeout_s: float = 60) -> float:
        """Wait until so many replicas get requests."""
        return await self.wait_for(
            clients, lambda stats: num_serving(stats) == num_replicas, timeout_s, f"{num_replicas} replicas serve"
        )

    async def all_serving(self, clients: Clients) -> set[str]:
        """Wait until all replicas get requests; returns their ids."""
        serving: set[str] = set()

        def do_all(stats: dict[str, Any]) -> bool:
            serving.clear()
            serving.update(serving_ids(stats))
            return len(serving) == self.num_replicas

        await self.wait_for(clients, do_all, 60, f"{self.num_replicas} replicas serve")
        return serving

    async def wait_until_replaced(self, clients: Clients, before: set[str], timeout_s: float = 60) -> float:
        """Wait until as many replicas get requests as `before`, and not the same ones.

        A replacement may come before anybody sees that fewer serve.
        """

        def is_replaced(stats: dict[str, Any]) -> bool:
            now = serving_ids(stats)
            return len(now) == len(before) and now != before

        return await self.wait_for(clients, is_replaced, timeout_s, "another replica serves in its place")

    async def wait_until_idle(self, clients: Clients, timeout_s: float = 10) -> float:
        """Wait until no request is live and no page in use."""
        return await self.wait_for(clients, _is_idle, timeout_s, "no request is live and no page in use")


Place = str | Fleet
"""Where to try a fault: the address of a front end, for a fleet of its own; or a fleet that runs already, as it is."""


@contextlib.asynccontextmanager
async def running(place: Place, name: str, args: dict[str, Any]) -> AsyncIterator[tuple[Fleet, Clients]]:
    """A fleet with all its replicas serving, and clients for it.

    Args:
        place: a fleet that runs already is neither changed nor taken away.
        name: of a fleet that is started.
        args: what it is started with.
    """
    if isinstance(place, Fleet):
        async with _serving(place) as clients:
            yield place, clients
        return
    fleet = Fleet(place, name)
    await asyncio.to_thread(fleet.deploy, args)
    try:
        async with _serving(fleet) as clients:
            yield fleet, clients
    finally:
        await asyncio.to_thread(fleet.delete, wait=False)


@contextlib.asynccontextmanager
async def _serving(fleet: Fleet) -> AsyncIterator[Clients]:
    async with Clients(fleet.url) as clients:
        await fleet.wait_until_serving(clients, fleet.num_replicas)
        yield clients


def serving_ids(stats: dict[str, Any]) -> set[str]:
    """Replicas that get requests."""
    return {replica_id for replica_id, replica in stats["replicas"].items() if replica["is_serving"]}


def num_serving(stats: dict[str, Any]) -> int:
    """How many replicas get requests."""
    return len(serving_ids(stats))


def every_replica_works(stats: dict[str, Any]) -> bool:
    """Whether each of the replicas that get requests says that it has some."""
    serving = [stats["replicas"][replica_id] for replica_id in serving_ids(stats)]
    return all(replica["num_running"] + replica["num_waiting"] for replica in serving)


@contextlib.contextmanager
def controller_stopped() -> Iterator[None]:
    """Serve's controller stands still: nothing is started, replaced, deployed or taken away until the end."""
    pids = [pid for pid in pids_of("ray::ServeController") if _is_ours(pid)]
    assert len(pids) == 1, "one cluster has one controller"
    with _deploying:  # a deployment that is on its way needs it
        os.kill(pids[0], signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pids[0], signal.SIGCONT)


def proxy_pids() -> list[int]:
    """Processes of Serve's HTTP proxies under this process."""
    return [pid for pid in pids_of("ray::ProxyActor") if _is_ours(pid)]


def _is_idle(stats: dict[str, Any]) -> bool:
    used = sum(r["num_used_pages"] for r in stats["replicas"].values() if r["is_serving"])
    return stats["router"]["num_live"] == 0 and used == 0


def pids_of(prefix: str) -> list[int]:
    """Processes whose command line begins with a text."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().replace(b"\0", b" ").decode(errors="replace").startswith(prefix):
                pids.append(int(path.parent.name))
    return pids


def _is_ours(pid: int) -> bool:
    """Whether a process descends from this one's Ray."""
    own = os.getpid()
    while pid > 1:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
        if pid == own:
            return True
    return False


class Outcome:
    """What came of a fault.

    Attributes:
        figure: one line for people.
        is_ok: whether what must hold has held.
    """

    def __init__(self, figure: str, *checks: bool) -> None:
        self.figure = figure
        self.is_ok = all(checks)
