"""Which ports a server takes, and whether it can have them."""

import errno
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from deployments.serve.front_end import FrontEnd
from llm.errors import ConfigError

HAPROXY_PORTS = {
    "RAY_SERVE_HAPROXY_STATS_PORT": 8404,
    "RAY_SERVE_HAPROXY_METRICS_PORT": 9101,
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": 8500,
}
"""Ports of HAProxy and of the proxy that it falls back on, by the environment variable that moves each; their defaults."""
_ROUTER_PORTS = range(30_000, 32_600, 100)
"""Beginnings of the ranges from which Serve gives each router a port behind HAProxy; below Linux's ephemeral ports."""


def bind_error(host: str, port: int) -> OSError | None:
    """Why nothing could listen at this address now, or None.

    A listener that shares its port (SO_REUSEPORT), as Serve's proxy does, counts as one.

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
    """See that a server can listen where the configuration says.

    Raises:
        ConfigError: it cannot; why, and what to change.
    """
    host, port = front_end.host, front_end.port
    try:
        error = bind_error(host, port)
    except OSError as unknown:
        raise ConfigError(f"http_options.host {host!r} is no address or name here ({unknown.strerror})") from unknown
    if error is None:
        return
    match error.errno:
        case errno.EADDRINUSE:
            raise ConfigError(f"port {port} of {host} is in use by another program: end it, or choose another --port")
        case errno.EADDRNOTAVAIL:
            raise ConfigError(f"{host} is not an address of this machine: set --host to one, or to 0.0.0.0 for all")
        case errno.EACCES:
            raise ConfigError(f"port {port} is reserved for root: choose a --port above 1023")
        case _:
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}")


def haproxy_ports() -> dict[str, str]:
    """Environment variables that give HAProxy ports of its own: the usual ones, or free ones where these are taken.

    What is set already stays.

    Raises:
        ConfigError: a port that the environment asks for is in use.
    """
    chosen = {}
    for name, usual in HAPROXY_PORTS.items():
        wanted = os.environ.get(name)
        if wanted is None:
            chosen[name] = str(usual if bind_error("0.0.0.0", usual) is None else _free_port())
        elif not wanted.isdigit() or bind_error("0.0.0.0", int(wanted)) is not None:
            raise ConfigError(f"{name}={wanted} is in use or no port: unset it, and a free one is taken")
    return chosen


@contextmanager
def router_ports() -> Iterator[dict[str, str]]:
    """Environment variables with a range of ports for this server's routers, which no other one uses meanwhile.

    With the same range for all, a router that is started may get the port that another server's HAProxy still sends
    requests to. The range is claimed by a name that the kernel gives back when this process ends, however it does.
    """
    if sys.platform != "linux" or "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT" in os.environ:
        yield {}
        return
    with socket.socket(socket.AF_UNIX) as claim:
        for first in _ROUTER_PORTS:
            try:
                claim.bind(f"\0rayline/router-ports/{first}")
            except OSError:
                continue
            yield {
                "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first),
                "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + _ROUTER_PORTS.step),
            }
            return
        yield {}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("0.0.0.0", 0))
        port: int = probe.getsockname()[1]
        return port
