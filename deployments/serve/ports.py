"""The ports that a server takes, and whether they are free."""

import errno
import os
import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from deployments.serve.front_end import FrontEnd
from llm.errors import ConfigError

HAPROXY_PORTS = {
    "RAY_SERVE_HAPROXY_STATS_PORT": 8404,
    "RAY_SERVE_HAPROXY_METRICS_PORT": 9101,
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": 8500,
}
"""Ports of HAProxy, and of the proxy that it falls back on, by the environment variables that move them."""
_FIRST_ROUTER_PORT = "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT"
_LAST_ROUTER_PORT = "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT"
_ROUTER_PORTS = range(30_000, 32_600, 100)
"""Beginnings of the ranges from which Serve gives each router a port behind HAProxy; below Linux's ephemeral ports."""
_NUM_TRIES = 200


def bind_error(host: str, port: int) -> OSError | None:
    """Why no server could listen at this address now; None if one could.

    A listener that shares its port (SO_REUSEPORT), as Serve's proxy does, counts as an obstacle.

    Raises:
        OSError: `host` is no name or address.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        # Connections of a server that has just ended are no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            return error
    return None


def check_port(front_end: FrontEnd) -> None:
    """Check that a server can listen where the configuration says.

    Raises:
        ConfigError: it cannot; the message says why and what to change.
    """
    host, port = front_end.host, front_end.port
    try:
        error = bind_error(host, port)
    except OSError as unknown:
        raise ConfigError(
            f"http_options.host {host!r} is not an address or a name here ({unknown.strerror})"
        ) from unknown
    if error is None:
        return
    match error.errno:
        case errno.EADDRINUSE:
            raise _in_use(front_end)
        case errno.EADDRNOTAVAIL:
            raise ConfigError(f"{host} is not an address of this machine: set --host to one, or to 0.0.0.0 for all")
        case errno.EACCES:
            raise ConfigError(f"port {port} is reserved for root: choose a --port above 1023")
        case _:
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}")


@contextmanager
def claimed_ports(front_end: FrontEnd, *, haproxy: bool) -> Iterator[dict[str, str]]:
    """Claim all ports of a server that is about to start; yields the environment variables that make Serve use them.

    HAProxy gets its usual ports or the next free ones, and routers behind it a range of their own: with the same range
    for all, a router may get the port to which another server's HAProxy still sends requests. Ports that the
    environment sets already stay. A claim keeps out other servers that claim ports, from before the port is bound until
    this process ends in any way.

    Raises:
        ConfigError: the server's own port, or one that the environment asks for, is in use.
    """
    check_port(front_end)
    with ExitStack() as claims:
        if not _claim(claims, f"port/{front_end.port}"):
            raise _in_use(front_end)
        environment = {}
        if haproxy:
            for name, usual in HAPROXY_PORTS.items():
                environment[name] = str(_haproxy_port(claims, name, usual))
            if _FIRST_ROUTER_PORT not in os.environ:
                first = next(first for first in _ROUTER_PORTS if _claim(claims, f"router-ports/{first}"))
                environment[_FIRST_ROUTER_PORT] = str(first)
                environment[_LAST_ROUTER_PORT] = str(first + _ROUTER_PORTS.step)
        yield environment


def _haproxy_port(claims: ExitStack, name: str, usual: int) -> int:
    wanted = os.environ.get(name)
    candidates: Iterable[int] = range(usual, usual + _NUM_TRIES)
    if wanted is not None:
        candidates = [int(wanted)] if wanted.isdigit() else []
    for port in candidates:
        if bind_error("0.0.0.0", port) is None and _claim(claims, f"port/{port}"):
            return port
    raise ConfigError(f"{name}={wanted} is in use or not a port: unset it to have a free one chosen")


def _claim(claims: ExitStack, name: str) -> bool:
    """Take a name that the kernel gives to only one process at a time (Linux); True if it was free."""
    if sys.platform != "linux":
        return True
    claim = claims.enter_context(socket.socket(socket.AF_UNIX))
    try:
        claim.bind(f"\0rayline/{name}")
    except OSError:
        return False
    return True


def _in_use(front_end: FrontEnd) -> ConfigError:
    return ConfigError(
        f"port {front_end.port} of {front_end.host} is in use by another program: end it, or choose another --port"
    )
